"""A layer of experts beside as many analog nn.Linear, which have the same weights and rows."""

import copy

import pytest
import torch
from samples import CONFIGS, TILES, merged, ranged
from torch import nn

import analogfx
from analogfx import ops
from analogfx.kernels import experts, noise

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, OUTPUTS, INPUTS = 4, 7, 12
OWN = {"mapping": {"experts": "own"}}
ENDS = torch.tensor([3, 3, 4, 9])
"""The second expert has no row, the third has one."""


class Bank(nn.Module):
    """Experts by themselves, whose rows come sorted."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, OUTPUTS, INPUTS))
        self.bias = nn.Parameter(torch.randn(EXPERTS, OUTPUTS))

    def forward(self, x, offsets):
        return ops.experts.grouped_linear(x, self.weight, self.bias, offsets)


def bank(config, dtype=torch.float64):
    torch.manual_seed(0)
    digital = Bank().to(dtype)
    return digital, analogfx.analogize(digital, config, strict=True)


def linears(digital, config):
    """An analog nn.Linear for every expert."""
    found = []
    for weight, bias in zip(digital.weight, digital.bias, strict=True):
        layer = nn.Linear(INPUTS, OUTPUTS, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
        found.append(analogfx.analogize(layer, config))
    return found


def rows(x):
    return torch.tensor_split(x, ENDS[:-1])


def batch(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 1.0, 1.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    return (torch.randn(9, INPUTS, generator=generator) * scale[:, None]).to(dtype)


def forward_of_linears(layers, x, seed, monkeypatch):
    """What the layers give, each with the noise of the expert that it stands for."""
    outputs = []
    for number, (layer, part) in enumerate(zip(layers, rows(x), strict=True)):
        torch.manual_seed(seed)
        key = noise.draw_seed(torch.device("cpu")) + number
        with monkeypatch.context() as patch:
            patch.setattr(noise, "draw_seed", lambda device, key=key: key)
            outputs.append(layer(part) if len(part) else part.new_empty(0, OUTPUTS))
    return torch.cat(outputs)


def stacked(layers, name):
    """A value that every layer has, as a layer of experts keeps it."""
    values = [getattr(layer, name).detach() for layer in layers]
    return torch.cat(values, 1) if name == "learnable_weight_clip" else torch.stack(values)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_with_ranges_of_their_own_are_as_many_linear_layers(name, tiles, monkeypatch):
    config = merged(CONFIGS[name], tiles, OWN)
    digital, analog = bank(config)
    layers = linears(digital, config)
    if hasattr(analog, "learnable_weight_clip"):
        for module in (analog, *layers):
            module.learnable_weight_clip.data *= 0.7
    for step in range(5):  # beyond the three batches that set the ranges
        x = batch(step).requires_grad_()
        torch.manual_seed(step)
        y = analog(x, ENDS)
        x_of_layers = x.detach().requires_grad_()
        expected = forward_of_linears(layers, x_of_layers, step, monkeypatch)
        close(y, expected)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(step), dtype=y.dtype)
        y.backward(g)
        expected.backward(g)
        close(x.grad, x_of_layers.grad)
    for state in ("input_range", "input_range_update_idx", "x_min", "x_max"):
        if hasattr(analog, state):
            close(getattr(analog, state).detach(), stacked(layers, state))
    for parameter, value in analog.named_parameters():
        of_layers = [getattr(layer, parameter) for layer in layers]
        assert of_layers[1].grad is None
        if value.grad is None:
            continue
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in of_layers]
        join = torch.cat if parameter == "learnable_weight_clip" else torch.stack
        close(value.grad, join(grads, 1) if join is torch.cat else join(grads))
    close(
        analog.eval()(batch(9), ENDS),
        forward_of_linears([m.eval() for m in layers], batch(9), 0, monkeypatch),
    )


@pytest.mark.parametrize("name", ["DAC and ADC", "fast", "everything"])
def test_one_range_for_all_follows_the_rows_of_all(name):
    """The range is that of one nn.Linear that is given every row, whatever its weights."""
    _, analog = bank(CONFIGS[name])
    linear = analogfx.analogize(nn.Linear(INPUTS, OUTPUTS).double(), CONFIGS[name])
    for step in range(4):
        analog(batch(step), ENDS)
        linear(batch(step))
    assert analog.input_range.shape == (1,)
    for state in ("input_range", "input_range_update_idx", "x_min", "x_max"):
        close(getattr(analog, state).detach(), getattr(linear, state).detach())


@pytest.mark.parametrize("name", ["DAC and ADC", "fast"])
def test_the_gradient_of_one_range_for_all(name):
    """With one matrix for every expert it is that of one nn.Linear."""
    digital, _ = bank(CONFIGS[name])
    for parameter in (digital.weight, digital.bias):
        parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    linear = nn.Linear(INPUTS, OUTPUTS).double()
    linear.weight.data, linear.bias.data = digital.weight[0].data, digital.bias[0].data
    pair = [analogfx.analogize(m, CONFIGS[name]) for m in (digital, linear)]
    for step in range(4):
        for module, args in zip(pair, ((ENDS,), ()), strict=True):
            module.zero_grad()
            module.input_range.data *= 0.5 if step == 3 else 1.0  # let it clip
            module(batch(step), *args).square().sum().backward()
    close(*(module.input_range.grad for module in pair))
    close(pair[0].weight.grad.sum(0), pair[1].weight.grad)
    assert pair[0].input_range.grad.any()


def test_every_expert_has_noise_of_its_own():
    config = {"modifier": {"noise_type": "AddNormal", "std_dev": 0.1}}
    digital, _ = bank(config)
    digital.weight.data.copy_(digital.weight.data[:1].expand_as(digital.weight))
    digital.bias.data.zero_()
    analog = analogfx.analogize(digital, config)
    x = batch(0)[:1].expand(EXPERTS, INPUTS)
    with torch.no_grad():
        y = analog(x, torch.arange(1, EXPERTS + 1))
    for a in range(EXPERTS):
        assert all(not torch.equal(y[a], y[b]) for b in range(a))


@pytest.mark.parametrize("own", [{}, OWN], ids=["shared", "own"])
@pytest.mark.parametrize("offsets", [[0, 0, 0, 0], [2, 2, 2, 2]])
def test_rows_of_no_expert_give_0_and_change_nothing(own, offsets):
    _, analog = bank(merged(CONFIGS["DAC and ADC"], own))
    offsets, x = torch.tensor(offsets), batch(0).requires_grad_()
    loud = x.detach().clone()
    loud[offsets[-1] :] = 1e6
    twin = copy.deepcopy(analog)
    y = analog(x, offsets)
    assert not y[offsets[-1] :].any()
    y.sum().backward()
    assert not x.grad[offsets[-1] :].any()
    twin(loud, offsets).sum().backward()
    assert torch.equal(analog.input_range, twin.input_range)
    for module in (analog, twin):
        assert not module.weight.grad[1:].any() and not module.bias.grad[1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_other_dtypes_to_the_bit(dtype, monkeypatch):
    config = merged(CONFIGS["everything"], TILES, OWN)
    digital, analog = bank(config, dtype)
    layers = linears(digital, config)
    torch.manual_seed(3)
    y = analog(batch(0, dtype), ENDS)
    assert y.dtype == dtype
    assert torch.equal(y, forward_of_linears(layers, batch(0, dtype), 3, monkeypatch))


def test_a_route_sorts_by_expert_and_leaves_what_is_of_none_last():
    ids = torch.tensor([2, 0, 7, 2, -1, 1, 0])
    order, offsets = experts.route(ids, 4)
    assert [sorted(part) for part in (order[:2].tolist(), order[3:5].tolist())] == [[1, 6], [0, 3]]
    assert order[2] == 5 and sorted(order[5:].tolist()) == [2, 4]
    assert offsets.tolist() == [2, 3, 5, 5]
    y = torch.arange(7.0)[order].unsqueeze(-1)
    assert experts.unsorted(y, order).flatten().tolist() == list(range(7))


def test_a_range_of_its_own_is_asked_for_by_name():
    config = analogfx.TorchInferenceRPUConfig.from_dict({"schema": 1, **merged(ranged(), OWN)})
    assert config.mapping.experts is analogfx.ExpertRange.OWN
    again = analogfx.TorchInferenceRPUConfig.from_json(config.to_json())
    assert again == config and again.to_dict()["mapping"]["experts"] == "own"
    with pytest.raises(analogfx.errors.ConfigError, match=r"mapping\.experts.*SHARED, OWN"):
        config.mapping.experts = "each"
