import gc
import weakref

import pytest
import torch

import analogfx
from analogfx.kernels import changes


def weight():
    return torch.nn.Parameter(torch.randn(4, 6))


def test_a_counted_write_is_seen_in_every_view():
    w = weight()
    before, of_view = changes.stamp(w), changes.stamp(w.t())
    assert changes.stamp(w) == before and changes.stamp(w.t()) == of_view
    with torch.no_grad():
        w[1:].mul_(2)
    assert changes.stamp(w) != before and changes.stamp(w.t()) != of_view


def test_a_write_through_data_is_seen_once_it_is_said():
    layer = analogfx.analogize(torch.nn.Linear(6, 4), analogfx.recipes.afm())
    stamps = [changes.stamp(layer.weight)]
    layer.weight.data.mul_(2)
    assert changes.stamp(layer.weight) == stamps[0]
    for say in (layer.eval, layer.train, lambda: analogfx.weights_written(layer)):
        say()
        assert changes.stamp(layer.weight) not in stamps
        stamps.append(changes.stamp(layer.weight))


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizers_step_is_seen_by_its_own_weights(fused):
    mine, other = weight(), weight()
    optimizer = torch.optim.AdamW([mine], lr=0.1, fused=fused)
    before = changes.stamp(mine), changes.stamp(other)
    mine.square().sum().backward()
    optimizer.step()
    assert changes.stamp(mine) != before[0]
    assert changes.stamp(other) == before[1]


def test_a_weight_whose_writes_are_counted_can_be_swapped_and_dies():
    w, other = weight(), weight()
    changes.written([w, w.t()])
    assert not weakref.getweakrefs(w)
    torch.utils.swap_tensors(w, other)
    gone = weakref.ref(w)
    del w
    gc.collect()
    assert gone() is None


def test_weights_of_inference_mode_have_a_stamp():
    with torch.inference_mode():
        w = torch.ones(3)
    assert changes.stamp(w) == changes.stamp(w)
