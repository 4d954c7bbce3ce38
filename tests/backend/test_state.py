import copy
import gc
import weakref

import pytest
import torch
from compiled import (
    DYNAMO_CONFIGS,
    QUIET,
    RESUMES,
    assert_same,
    compiled,
    evaluated,
    ranges,
    stack,
    step,
    twins,
)
from samples import TILES, merged, mlp, product
from torch import nn

import analogfx
from analogfx import backend_state
from analogfx.errors import PlacementError


def trained(config=QUIET, make=mlp, steps=2):
    """A compiled model that has seen data."""
    twin = compiled(make(), config)
    for seed in range(steps):
        torch.manual_seed(seed)
        twin(torch.randn(6, 8))
    return twin


def test_a_model_that_has_not_run_has_no_state():
    assert backend_state(compiled(mlp(), QUIET)).state_dict() == {}


@pytest.mark.parametrize("before_the_first_call", [True, False])
def test_state_is_saved_and_restored_into_a_fresh_model(before_the_first_call, tmp_path):
    source = trained(merged(QUIET, TILES))
    torch.save(backend_state(source).state_dict(), tmp_path / "ranges.pt")
    fresh = compiled(copy.deepcopy(source._orig_mod), merged(QUIET, TILES))
    if not before_the_first_call:
        fresh(5 * torch.randn(6, 8))
    backend_state(fresh).load_state_dict(torch.load(tmp_path / "ranges.pt"))
    x = torch.randn(6, 8)
    assert_same(fresh(x), source(x))
    assert_same(ranges(fresh), ranges(source))
    assert_same(evaluated(fresh, x), evaluated(source, x))


@pytest.mark.parametrize("name", ["DAC and ADC", "fast"])
def test_state_goes_to_an_analogized_model_and_back(name):
    config = merged(DYNAMO_CONFIGS[name], TILES)
    twin = trained(config)
    analog = analogfx.analogize(twin._orig_mod, config)
    missing, unexpected = analog.load_state_dict(backend_state(twin).state_dict(), strict=False)
    assert not unexpected and {n.rsplit(".")[-1] for n in missing} == {"weight", "bias"}
    x = torch.randn(6, 8)
    assert_same(evaluated(analog, x), evaluated(twin, x), exact=False)
    analog.train(), twin.train()
    analog(x)
    fresh = compiled(copy.deepcopy(twin._orig_mod), config)
    backend_state(fresh).load_state_dict(analog.state_dict())
    twin(x)
    assert_same(evaluated(fresh, x), evaluated(twin, x))


def test_several_sites_of_a_module_have_the_names_that_analogize_gives():
    def forward(self, x):
        return x @ self.up @ self.stack[0] @ self.stack[1]

    model = product(forward, dtype=torch.float32, up=(8, 4), stack=(2, 4, 4))
    twin, analog = twins(model, QUIET)
    x = torch.randn(6, 8)
    twin(x), analog(x)
    assert_same(ranges(twin), ranges(analog))
    fresh = compiled(copy.deepcopy(model), QUIET)
    backend_state(fresh).load_state_dict(backend_state(twin).state_dict())
    assert_same(evaluated(fresh, x), evaluated(twin, x))


def test_a_layer_under_two_names_is_listed_under_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = self.one

        def forward(self, x):
            return self.two(self.one(x))

    twin, analog = twins(Shared(), QUIET)
    twin(torch.ones(2, 8)), analog(torch.ones(2, 8))
    assert_same(ranges(twin), ranges(analog))


def test_state_that_belongs_nowhere_is_refused():
    state = backend_state(compiled(mlp(), QUIET))
    with pytest.raises(PlacementError, match=r"no module .*: third\.input_range"):
        state.load_state_dict({"third.input_range": torch.ones(1)})


@pytest.mark.parametrize("before_the_first_call", [True, False])
def test_state_for_other_tiles_is_refused(before_the_first_call):
    twin = compiled(mlp(), QUIET)
    if not before_the_first_call:
        twin(torch.ones(2, 8))
    message = r"first\.input_range: the state loaded is for 2 tiles, the config cuts .* into 1"

    def load_and_run(tiles):
        loaded = {
            "first.input_range": torch.full((tiles,), 3.0),
            "first.input_range_update_idx": torch.full((tiles,), 1e9),  # no data moves it
        }
        backend_state(twin).load_state_dict(loaded)
        twin(torch.ones(2, 8))

    with pytest.raises(Exception, match=message):
        load_and_run(tiles=2)
    torch._dynamo.reset()
    load_and_run(tiles=1)  # what was refused has left nothing behind
    assert ranges(twin)["first.input_range"] == 3.0


class Optional(nn.Module):
    """One product, or two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, 8)) for _ in range(2))

    def forward(self, x, both):
        y = nn.functional.linear(x, self.a)
        return y + nn.functional.linear(x, self.b) if both else y


def test_state_of_one_product_for_a_module_that_has_run_two_is_refused():
    one, two = compiled(Optional(), QUIET), compiled(Optional(), QUIET)
    x = torch.randn(6, 8)
    one(x, False), two(x, True)
    before = ranges(two)
    saved = backend_state(one).state_dict()
    message = "the model: .*'input_range', of a single product, .* 2 weights: rename it to 'a_input"
    with pytest.raises(PlacementError, match=message):
        backend_state(two).load_state_dict(saved)
    assert_same(ranges(two), before)
    backend_state(two).load_state_dict({f"a_{name}": value for name, value in saved.items()})
    assert_same(ranges(two)["a_input_range"], ranges(one)["input_range"])
    assert_same(ranges(two)["b_input_range"], before["b_input_range"])


def test_a_whole_checkpoint_with_counts_in_floats_may_be_given():
    twin = compiled(mlp(), QUIET)
    loaded = {
        "first.weight": torch.zeros(12, 8),
        "first.input_range": torch.tensor([2.5]),
        "first.input_range_update_idx": torch.tensor([float("-inf")]),
    }
    backend_state(twin).load_state_dict(loaded)
    twin(torch.randn(2, 8))
    assert ranges(twin)["first.input_range"] == 2.5  # closed: no data moves it
    assert twin.first.weight.any()


def test_only_modules_have_state():
    with pytest.raises(TypeError, match="compiled module, found function"):
        backend_state(compiled(lambda x: x, QUIET))


# ------------------------------------------------------------------------- what becomes of weights


def replaced(model):
    for module in (model.first, model.second):
        module.weight = nn.Parameter(2 * module.weight.detach())


def assigned(model):
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [replaced, assigned, lambda m: m.to(torch.float64).float()])
@pytest.mark.parametrize("recompile", [True, False])
def test_state_stays_with_the_module_when_its_weight_is_replaced(change, recompile):
    model = mlp()
    twin, analog = twins(model, QUIET)
    x = torch.randn(6, 8)
    step(twin, x, 0), step(analog, x, 0)
    evaluated(twin, x)
    change(model)
    if recompile:
        torch._dynamo.reset()
    analog.load_state_dict(model.state_dict(), strict=False)
    assert_same(evaluated(twin, x), evaluated(analog, x))
    assert_same(ranges(twin), ranges(analog))


def test_a_copy_of_a_model_starts_anew():
    twin = trained()
    copied = compiled(copy.deepcopy(twin._orig_mod), QUIET)
    assert backend_state(copied).state_dict() == {}
    copied(torch.randn(6, 8))
    assert ranges(copied)["first.input_range_update_idx"] == 1
    assert ranges(twin)["first.input_range_update_idx"] == 2


@pytest.mark.parametrize("make", [mlp, stack])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_nothing_keeps_a_model_alive(make, compiler):
    model = make()
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    twin = compiled(model, QUIET, compiler)
    step(twin, torch.randn(6, 8), 0)
    state = weakref.ref(next(iter(backend_state(twin).state_dict().values())))
    evaluated(twin, torch.randn(6, 8))
    analogfx.report(twin)
    seen = weakref.ref(model), weakref.ref(linear.weight), state
    del model, twin, linear
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]


@RESUMES
def test_a_model_that_is_gone_keeps_the_graphs_of_others():
    one, two = trained(make=stack), trained(make=stack)
    x = torch.randn(6, 8)
    expected = evaluated(two, x)
    del one
    gc.collect()
    assert_same(evaluated(two, x), expected)
