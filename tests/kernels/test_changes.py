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
    view = w.t()
    before, of_view = changes.stamp(w), changes.stamp(view)
    assert changes.unchanged(w, before) and changes.unchanged(view, of_view)
    with torch.no_grad():
        w[1:].mul_(2)
    assert not changes.unchanged(w, before) and not changes.unchanged(view, of_view)


def test_a_write_in_inference_mode_is_seen():
    w = weight()
    before = changes.stamp(w)
    with torch.inference_mode():
        w.copy_(torch.zeros(4, 6))
    assert not changes.unchanged(w, before)


def test_a_write_through_data_is_seen_once_it_is_said():
    layer = analogfx.analogize(torch.nn.Linear(6, 4), analogfx.recipes.afm())
    stamps = [changes.stamp(layer.weight)]
    layer.weight.data.mul_(2)
    assert changes.unchanged(layer.weight, stamps[0])
    for say in (layer.eval, layer.train, lambda: analogfx.weights_written(layer)):
        say()
        assert not any(changes.unchanged(layer.weight, stamp) for stamp in stamps)
        stamps.append(changes.stamp(layer.weight))


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizers_step_is_seen_by_its_own_weights(fused):
    mine, other = weight(), weight()
    optimizer = torch.optim.AdamW([mine], lr=0.1, fused=fused)
    before = changes.stamp(mine), changes.stamp(other)
    mine.square().sum().backward()
    optimizer.step()
    assert not changes.unchanged(mine, before[0])
    assert changes.unchanged(other, before[1])


def test_other_data_at_an_address_that_was_free_is_seen():
    w = weight()
    before = changes.stamp(w)
    address = w.data_ptr()
    for _ in range(1000):  # until the allocator hands the address out again
        w.data = torch.empty(0)
        w.data = torch.ones(4, 6)
        if w.data_ptr() == address:
            break
    else:
        pytest.skip("the allocator did not hand the address out again")
    assert not changes.unchanged(w, before)


def test_a_stamp_keeps_no_elements_alive():
    class Tagged(torch.Tensor):
        pass

    w = torch.ones(1000).as_subclass(Tagged)
    seen = weakref.ref(w)
    kept = changes.stamp(w)
    del w
    gc.collect()
    assert seen() is None and kept.storage.expired()


def test_a_weight_whose_writes_are_counted_can_be_swapped_and_dies():
    w, other = weight(), weight()
    changes.written([w, w.t()])
    assert not weakref.getweakrefs(w)
    torch.utils.swap_tensors(w, other)
    gone = weakref.ref(w)
    del w
    gc.collect()
    assert gone() is None


def test_weights_of_inference_mode_may_always_have_changed():
    with torch.inference_mode():
        w = torch.ones(3)
    assert not changes.unchanged(w, changes.stamp(w))
