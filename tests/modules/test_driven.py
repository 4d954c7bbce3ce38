import pytest
import torch
from samples import EVERYTHING, IDENTITY, after, merged, ranged
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import analogfx
from analogfx.kernels import ready
from analogfx.modules.driven import is_driven, pieces, spread
from analogfx.passes import pipeline
from analogfx.state import StateNames

pytestmark = pytest.mark.usefixtures("one_thread")


def test_layers_that_loop_are_driven_and_others_are_not():
    assert is_driven(nn.LSTM(2, 2)) and is_driven(analogfx.analogize(nn.GRU(2, 2), IDENTITY))
    assert not is_driven(nn.LSTMCell(2, 2)) and not is_driven(nn.Linear(2, 2))


def test_a_graph_is_cut_into_a_piece_for_every_product_that_stores_its_own_ranges():
    graph, _ = after(pipeline.EXPLICIT + pipeline.FUSED, nn.GRU(3, 4), EVERYTHING, training=True)
    cut = pieces(graph)
    assert len(cut) == 2
    for piece, name, other in zip(cut, ("ih", "hh"), ("hh", "ih"), strict=True):
        piece.lint()
        read = {n.target for n in piece.find_nodes(op="get_attr")}
        assert f"weight_{name}_l0" in read and f"input_range_{name}_l0" in read
        assert not any(other in target for target in read)
        stores = piece.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        assert len(stores) == 4
        assert len(piece.find_nodes(op="placeholder")) == 1


LEARNED = ranged(init_from_data=2, decay=0.0)
NOISY = {"modifier": {"noise_type": "AddNormal", "std_dev": 0.1}}
SPREAD = {
    "ideal": (IDENTITY, True, 0, False),
    "noise is drawn": (NOISY, True, 0, True),
    "noise is not drawn in inference": (NOISY, False, 0, False),
    "statistics are open": (LEARNED, True, 1, True),
    "statistics are closed": (LEARNED, True, 2, False),
    "statistics are not taken in inference": (LEARNED, False, 0, False),
    "a decay counts calls": (merged(LEARNED, ranged(decay=0.1)), False, 3, True),
    "a range that is not learned does not decay": (
        merged(LEARNED, ranged(decay=0.1, learn_input_range=False)), True, 3, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SPREAD)
def test_inputs_are_spread_over_calls_only_where_calls_count(name):
    config, training, count, expected = SPREAD[name]
    analog = analogfx.analogize(nn.GRU(3, 4), config).train(training)
    if hasattr(analog, "input_range_ih_l0"):
        analog.input_range_update_idx_ih_l0.fill_(count)
    names = [StateNames(suffix="_ih_l0"), StateNames(suffix="_hh_l0")]
    apart = spread(names, analog._analog.resolved, training)
    assert apart(analog, 0) is expected
    with torch.no_grad():
        assert apart(analog, 0) is (expected and "decay" not in name)


def test_what_tiles_hold_is_made_once_a_call(monkeypatch):
    made = []
    make = ready.make
    monkeypatch.setattr(ready, "make", lambda *args: made.append(1) or make(*args))
    analog = analogfx.analogize(nn.LSTM(3, 4), EVERYTHING).eval()
    with torch.no_grad():
        analog(torch.randn(7, 2, 3))
    assert len(made) == 2
    analog(torch.randn(7, 2, 3))
    assert len(made) == 4


def test_who_watches_ops_sees_the_products_in_inference_too():
    layer = analogfx.analogize(nn.LSTM(16, 12), ranged()).eval()
    x = torch.randn(3, 2, 16)
    with torch.no_grad():
        seen = analogfx.audit(layer, x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert seen.ok and seen.coverage == 1.0
    assert counter.get_total_flops() == 2 * 6 * 48 * (16 + 12)
