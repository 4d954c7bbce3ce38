"""prepare_training with one process; two are in ``tests/distributed``."""

import copy
import sys

import pytest
import torch
from samples import CONFIGS, LAYERS, clip, layer_and_input, merged, mlp, ranged
from torch import nn

import analogfx
from analogfx.errors import PlacementError

pytestmark = pytest.mark.usefixtures("one_thread")

STATES = ["DAC and ADC", "frozen range", "fast", "fast, ever seen"]


def train(model, optimizer, batches, compiled=None):
    for x in batches:
        optimizer.zero_grad()
        (model if compiled is None else compiled)(x).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def batches(x, number=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x) for _ in range(number)]


@pytest.mark.parametrize("config", STATES)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_process_trains_as_it_does_without(layer, config):
    digital, x = layer_and_input(layer)
    made = merged(CONFIGS[config], {"mapping": {"max_input_size": 5}})
    plain, prepared = (analogfx.analogize(digital, made) for _ in range(2))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (plain, prepared)]
    analogfx.prepare_training(optimizers[1], prepared)
    expected = train(plain, optimizers[0], batches(x))
    found = train(prepared, optimizers[1], batches(x))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_weights_are_clipped_after_the_step():
    digital, x = layer_and_input("linear")
    model = analogfx.analogize(digital, merged(ranged(), clip("LayerGaussian", sigma=1.0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    analogfx.prepare_training(optimizer, model)
    train(model, optimizer, batches(x, 1))
    bound = digital.weight.std()
    torch.testing.assert_close(model.weight.detach(), digital.weight.detach().clamp(-bound, bound))


def test_ranges_reach_their_parameter_at_the_step():
    model = analogfx.analogize(nn.Linear(4, 3), ranged(learn_input_range=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    analogfx.prepare_training(optimizer, model)
    model(torch.randn(9, 4)).sum().backward()
    assert model.input_range == 3.0 and model.input_range_update_idx == 0
    optimizer.step()
    assert model.input_range != 3.0 and model.input_range_update_idx == 1


def test_a_skipped_step_forgets_nothing():
    """A scaler that finds an overflow makes no step: the batch is gathered by the next one."""
    model = analogfx.analogize(nn.Linear(4, 3), ranged(init_std_alpha=2.0, decay=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    analogfx.prepare_training(optimizer, model)
    x = torch.randn(2, 9, 4)
    for part in x:
        model(part).sum().backward()
    optimizer.step()
    assert model.input_range_update_idx == 2
    torch.testing.assert_close(model.input_range.detach(), 2 * x.std().view(1))


def test_remove_gives_the_forward_its_ranges_back():
    model = analogfx.analogize(nn.Linear(4, 3), ranged())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = set(model.__dict__)
    handle = analogfx.prepare_training(optimizer, model)
    handle.remove()
    model(torch.randn(9, 4)).sum().backward()
    assert model.input_range_update_idx == 1
    assert set(model.__dict__) == names
    optimizer.step()
    assert model.input_range_update_idx == 1


def test_the_state_is_lightnings_whether_prepared_or_not():
    model = analogfx.analogize(mlp(), ranged())
    names = model.state_dict().keys()
    buffers = [name for name, _ in model.named_buffers()]
    analogfx.prepare_training(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert model.state_dict().keys() == names
    assert [name for name, _ in model.named_buffers()] == buffers


def test_loading_opens_and_closes_ranges():
    model = analogfx.analogize(nn.Linear(4, 3), ranged())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    analogfx.prepare_training(optimizer, model)
    fresh = copy.deepcopy(model.state_dict())
    x = torch.randn(9, 4)
    train(model, optimizer, [x] * 4)
    assert model.input_range_update_idx == 3 and not model.range_initializes
    trained = copy.deepcopy(model.state_dict())
    model.load_state_dict(fresh)
    train(model, optimizer, [x])
    assert model.input_range_update_idx == 1
    model.load_state_dict(trained)
    train(model, optimizer, [10 * x])
    torch.testing.assert_close(
        model.input_range.detach(), trained["input_range"], rtol=0.01, atol=0
    )


def test_a_model_is_moved_copied_and_made_digital_while_prepared():
    digital = nn.Linear(4, 3)
    model = analogfx.analogize(digital, ranged())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    analogfx.prepare_training(optimizer, model)
    twin = copy.deepcopy(model).double()
    twin(torch.randn(9, 4).double())
    assert model.range_statistics[0, 0] == 0 and twin.range_statistics[0, 0] == 1
    assert twin.range_statistics.dtype == torch.float64
    on_meta = copy.deepcopy(model).to("meta")
    assert on_meta.range_statistics.is_meta
    filled = on_meta.to_empty(device="cpu")
    assert not filled.range_statistics.is_meta and filled.range_statistics[0, 0] == 0
    assert not hasattr(analogfx.to_digital(model), "range_statistics")


def test_scaled_gradients_of_an_optimizer_that_unscales_them_itself():
    """GradScaler hands fused optimizers its scale: their gradients are not unscaled yet."""
    start, decay = 50.0, 0.1
    made = ranged(init_from_data=0, init_value=start, decay=decay, input_min_percentage=0.9)
    model = analogfx.analogize(nn.Linear(4, 3), made)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    analogfx.prepare_training(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.randn(5, 4)).square().mean()).backward()
    scaler.step(optimizer)
    assert model.input_range.item() == pytest.approx(start - decay * start, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_neither_a_loss_scale_nor_accumulation_changes_the_decay_of_ranges(micro_batches, options):
    made = ranged(init_from_data=0, init_value=50.0, decay=0.1, input_min_percentage=0.9)
    found = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = analogfx.analogize(nn.Linear(4, 3), made)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, **options)
        analogfx.prepare_training(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            for x in torch.randn(12, 4).chunk(micro_batches):
                scaler.scale(model(x).square().mean() / micro_batches).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert model.input_range.item() == pytest.approx(50.0 * (1 - 0.5 * 0.1) ** 3, rel=1e-5)
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=0)


def test_a_compiled_step_gathers_as_eager_does():
    digital, x = layer_and_input("linear")
    plain, compiled = (analogfx.analogize(digital, CONFIGS["DAC and ADC"]) for _ in range(2))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (plain, compiled)]
    for model, optimizer in zip((plain, compiled), optimizers, strict=True):
        analogfx.prepare_training(optimizer, model)
    expected = train(plain, optimizers[0], batches(x))
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    found = train(compiled, optimizers[1], batches(x), run)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("way", ["argument", "by its name"])
def test_a_closure_that_makes_the_gradients_is_waited_for(way):
    """PyTorch Lightning steps so, and whoever writes a loop as torch's page of optimizers does."""
    digital, x = layer_and_input("linear")
    plain, closed = (analogfx.analogize(digital, CONFIGS["DAC and ADC"]) for _ in range(2))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (plain, closed)]
    for model, optimizer in zip((plain, closed), optimizers, strict=True):
        analogfx.prepare_training(optimizer, model)
    expected = train(plain, optimizers[0], batches(x))
    for each in batches(x):

        def closure(each=each):
            optimizers[1].zero_grad()
            loss = closed(each).square().mean()
            loss.backward()
            return loss

        loss = (
            optimizers[1].step(closure)
            if way == "argument"
            else optimizers[1].step(closure=closure)
        )
        assert loss.isfinite()
    for name, value in closed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_accelerates_wrapper_of_an_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model = analogfx.analogize(nn.Linear(4, 3), ranged(learn_input_range=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerate.Accelerator(cpu=True)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer)
    analogfx.prepare_training(wrapped, model)
    model(torch.randn(9, 4)).sum().backward()
    optimizer.step()
    assert model.input_range_update_idx == 1


def test_neither_ranges_nor_clips_decay():
    model = analogfx.analogize(mlp(), merged(ranged(), clip("LearnablePerChannel")))
    next(p for n, p in model.named_parameters() if n.endswith("bias")).requires_grad_(False)
    decaying, kept = analogfx.parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decaying["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    own = {n for n in names.values() if n.endswith(("input_range", "learnable_weight_clip"))}
    assert {names[id(p)] for p in kept["params"]} == own
    rest = {n for n, p in model.named_parameters() if p.requires_grad} - own
    assert {names[id(p)] for p in decaying["params"]} == rest
    assert len(analogfx.parameter_groups(nn.Linear(2, 2), 0.1)) == 1


@pytest.mark.parametrize("decay", [None, 0.9], ids=["SWA", "EMA"])
def test_an_average_keeps_ranges_closed(decay):
    """With ``use_buffers=False``, which copies counts; the page says why."""
    averages = torch.optim.swa_utils
    model = analogfx.analogize(nn.Linear(4, 3), ranged(init_from_data=3))
    how = {} if decay is None else {"multi_avg_fn": averages.get_ema_multi_avg_fn(decay)}
    average = averages.AveragedModel(model, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    analogfx.prepare_training(optimizer, model)
    for _ in range(6):
        train(model, optimizer, [torch.randn(8, 4)])
        average.update_parameters(model)
    assert average.module.input_range_update_idx == model.input_range_update_idx == 3
    before = average.module.input_range.clone()
    average.train()(10 * torch.randn(8, 4))
    assert torch.equal(average.module.input_range, before)


def test_it_names_what_it_cannot_use():
    model = analogfx.analogize(nn.Linear(4, 3), ranged())
    with pytest.raises(TypeError, match="takes an optimizer"):
        analogfx.prepare_training(model, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="no analog layer"):
        analogfx.prepare_training(optimizer, nn.Linear(4, 3))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds no parameter"):
        analogfx.prepare_training(other, model)
    assert not model._analog.resolved.collects


class ZeRO:
    """What DeepSpeed's public functions do with the copies that ZeRO-1 and ZeRO-2 train."""

    def __init__(self, parameter):
        self.parameter, self.copy = parameter, parameter.detach().float()

    def safe_get_full_fp32_param(self, parameter):
        return self.copy.clone() if parameter is self.parameter else None

    def safe_set_full_fp32_param(self, parameter, value):
        assert parameter is self.parameter
        self.copy = value.clone()


@pytest.mark.parametrize("kind", ["LayerGaussian", "LayerGaussianPerChannel"])
def test_what_zero_trains_in_place_of_a_weight_is_clipped(kind, monkeypatch):
    """tests/distributed/test_deepspeed.py has DeepSpeed itself, where it is installed."""
    made = merged(ranged(), clip(kind, sigma=1.0))
    digital = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    dense, model = analogfx.analogize(digital, made), analogfx.analogize(digital, made).bfloat16()
    zero = ZeRO(model[0].weight)
    zero.copy = digital[0].weight.detach().clone()  # more bits than the weight
    monkeypatch.setitem(sys.modules, "deepspeed", zero)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", zero)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "range" in n], lr=0.1)
    analogfx.prepare_training(optimizer, model)
    train(model, optimizer, [torch.randn(3, 6).bfloat16()])
    analogfx.clip_weights(dense)
    assert not torch.equal(dense[0].weight, digital[0].weight)
    torch.testing.assert_close(zero.copy, dense[0].weight.detach())
    assert torch.equal(model[0].weight, zero.copy.bfloat16())
    torch.testing.assert_close(model[1].weight.float(), dense[1].weight, rtol=0.02, atol=0.01)
    other = torch.optim.SGD([nn.Parameter(zero.copy.flatten())], lr=0.1)
    with pytest.raises(ValueError, match=r"ZeRO trains flat copies .*keep input ranges out of it"):
        analogfx.prepare_training(other, model)
    model[1].weight.ds_id = 0
    with pytest.raises(PlacementError, match=r"^1[.]weight is in stage 3 .*use fully_shard"):
        analogfx.prepare_training(optimizer, model)


def test_experts_are_refused_by_name():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.bmm(x, self.weight)

    analog = analogfx.analogize(
        nn.ModuleDict({"experts": Experts()}), {"pre_post": {"input_range": {"enable": True}}}
    )
    optimizer = torch.optim.SGD(analog.parameters(), lr=0.1)
    with pytest.raises(PlacementError, match=r"^experts: the ranges of experts"):
        analogfx.prepare_training(optimizer, analog)


def test_no_step_of_any_optimizer_decays_ranges():
    model = analogfx.analogize(mlp(), merged(ranged(), clip("LearnablePerChannel")))
    own = {n for n, _ in model.named_parameters() if n.endswith(("range", "clip"))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    layout = optimizer.state_dict()["param_groups"]
    handles = analogfx.distributed.keep_decay_off_ranges(optimizer, model)

    def step():
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return {n for n, p in model.named_parameters() if torch.equal(p, before[n])}

    assert step() == own
    assert optimizer.state_dict()["param_groups"] == layout

    def failing():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert step() == own
    assert optimizer.state_dict()["param_groups"] == layout
    for handle in handles:
        handle.remove()
    assert step() == set()
