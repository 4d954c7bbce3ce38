import warnings

import pytest
import torch
from samples import merged, ranged
from torch import nn

import analogfx
from analogfx.ranges import range_states, warn_unset


def network(**fields):
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 2, 1), nn.Linear(4, 4))
    config = merged(ranged(**fields), {"mapping": {"max_input_size": 2}})
    return analogfx.analogize(model, {"0": config, "1": ranged(**fields), "2": None})


@pytest.mark.parametrize("fields", [{}, {"fast_mode": True}])
def test_layers_are_named_with_what_they_saw(fields):
    analog = network(**fields).train()
    analog[0](torch.randn(3, 4))
    with pytest.warns(UserWarning, match=r"0 \(1 of 3 batches\), 1 \(0 of 3 batches\)") as seen:
        warn_unset(analog)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_a_tile_without_data_counts():
    analog = network().train()
    for _ in range(3):
        analog[0](torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
        analog[1](torch.randn(2, 4, 3))
    unset = [state for state in range_states(analog) if state.is_unset]
    assert [(state.name, state.seen) for state in unset] == [("0", 0)]


def test_set_ranges_are_no_warning():
    trained = network().train()
    for _ in range(3):
        trained[0](torch.randn(3, 4))
        trained[1](torch.randn(2, 4, 3))
    calibrated = network()
    sample = torch.randn(5, 4, 4)
    analogfx.calibrate(nn.Sequential(calibrated[0], calibrated[1]), [sample], progress=False)
    digital = nn.Linear(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (trained, calibrated, network(init_from_data=0), network(dynamic=True)):
            warn_unset(model)
        warn_unset(digital)


def test_many_layers_are_not_all_listed():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    with pytest.warns(UserWarning, match="of 30 analog products .* and 22 more"):
        warn_unset(analogfx.analogize(model, ranged()))
