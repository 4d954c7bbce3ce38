import pytest
import torch
import torch.nn.functional as F
from samples import (
    CONFIGS,
    IDENTITY,
    LAYERS,
    TILES,
    clip,
    layer_and_input,
    merged,
    mlp,
    product,
    ranged,
)
from torch import nn

import analogfx
from analogfx.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

SIGMA = 1.5
WHOLE = clip("LayerGaussian", sigma=SIGMA)
BY_ROW = clip("LayerGaussianPerChannel", sigma=SIGMA)


def clipped(matrix, per_row=False):
    bound = SIGMA * (matrix.std(1, keepdim=True) if per_row else matrix.std())
    return torch.clamp(matrix, -bound, bound)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer_is_clipped_over_its_whole_rows(layer, tiles, per_row):
    digital, _ = layer_and_input(layer)
    analog = analogfx.analogize(digital, merged(BY_ROW if per_row else WHOLE, tiles))
    parameter = analog.weight
    analogfx.clip_weights(analog)
    expected = clipped(digital.weight.flatten(1), per_row).view_as(digital.weight)
    torch.testing.assert_close(analog.weight.detach(), expected.detach(), rtol=1e-12, atol=0)
    assert analog.weight is parameter
    assert (analog.weight != digital.weight).any()
    assert digital.bias is None or torch.equal(analog.bias, digital.bias)


def transposed(w):
    return w.t()


def permuted(w):
    return w.permute(2, 0, 1).reshape(6, 4)


VIEWS = {
    # name: (product, shape of the parameter, the weight as a matrix (O, I))
    "t": (lambda s, x: x @ s.w, (6, 4), transposed),
    "einsum": (
        lambda s, x: torch.einsum("ni,iod->nod", x, s.w), (4, 2, 3), lambda w: w.flatten(1).t()),
    "a copy on the way": (lambda s, x: F.linear(x, permuted(s.w)), (2, 4, 3), permuted),
    "view": (lambda s, x: F.linear(x, s.w.view(6, 4)), (24,), lambda w: w.view(6, 4)),
    "cast": (lambda s, x: F.linear(x, s.w.to(x.dtype)), (6, 4), lambda w: w),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_seen_through_a_view_is_clipped_where_it_lies(name):
    forward, shape, view = VIEWS[name]
    digital = product(forward, w=shape)
    analog = analogfx.analogize(digital, WHOLE)
    analogfx.clip_weights(analog)
    torch.testing.assert_close(view(analog.w.detach()), clipped(view(digital.w)).detach())
    assert (analog.w != digital.w).any() and analog.w.is_contiguous()


def test_chunks_are_clipped_one_by_one():
    def forward(self, x):
        a, b = self.w.chunk(2)
        return F.linear(x, a) + F.linear(x, b)

    digital = product(forward, w=(8, 5))
    with torch.no_grad():
        digital.w[:4] *= 10
    analog = analogfx.analogize(digital, WHOLE)
    analogfx.clip_weights(analog)
    expected = torch.cat([clipped(part) for part in digital.w.chunk(2)])
    torch.testing.assert_close(analog.w, expected)


def test_only_the_part_that_is_multiplied_by_is_clipped():
    digital = product(lambda self, x: x @ self.w[:, :3], w=(6, 5))
    analog = analogfx.analogize(digital, WHOLE)
    analogfx.clip_weights(analog)
    assert torch.equal(analog.w[:, 3:], digital.w[:, 3:])
    torch.testing.assert_close(analog.w[:, :3], clipped(digital.w[:, :3]))


def test_tied_weights_are_clipped_in_both_places():
    digital = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    digital[1].weight = digital[0].weight
    analog = analogfx.analogize(digital, WHOLE)
    analogfx.clip_weights(analog)
    assert analog[0].weight is analog[1].weight
    torch.testing.assert_close(analog[0].weight, clipped(digital[0].weight))


@pytest.mark.parametrize("name", ["identity", "DAC and ADC", "learned clip", "discrete"])
def test_other_configs_clip_nothing(name):
    digital = mlp()
    analog = analogfx.analogize(digital, CONFIGS[name])
    analogfx.clip_weights(analog)
    assert torch.equal(analog.first.weight, digital.first.weight)


def test_layers_that_stayed_digital_are_not_clipped():
    digital = mlp()
    analog = analogfx.analogize(digital, {"first": WHOLE})
    analogfx.clip_weights(analog)
    assert torch.equal(analog.second.weight, digital.second.weight)
    assert not torch.equal(analog.first.weight, digital.first.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_clipped_by_single_precision_statistics(dtype):
    digital = nn.Linear(64, 8).to(dtype)
    analog = analogfx.analogize(digital, WHOLE)
    analogfx.clip_weights(analog)
    bound = (SIGMA * digital.weight.float().std()).to(dtype)
    assert torch.equal(analog.weight, torch.clamp(digital.weight, -bound, bound))


# ------------------------------------------------------------------------------ clip_after_step

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adam, one by one": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def closure_of(optimizer, model):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_clips_after_its_step_until_the_handle_is_removed(name):
    analog = analogfx.analogize(mlp(), WHOLE)
    optimizer = OPTIMIZERS[name](analog.parameters())
    handle = analogfx.clip_after_step(optimizer, analog)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, analog))
    once = analog.first.weight.detach().clone()
    # Clipped weights lie within the bound that was the bound before they were clipped.
    largest = once.abs().max()
    assert (once.abs() == largest).sum() > 1

    handle.remove()
    with torch.no_grad():
        analog.first.weight[0, 0] = 100.0
    optimizer.step(closure_of(optimizer, analog))
    assert analog.first.weight.abs().max() > 50


def test_clipping_works_under_a_scheduler_and_a_scaler():
    analog = analogfx.analogize(mlp(), WHOLE)
    optimizer = torch.optim.SGD(analog.parameters(), lr=0.1)
    analogfx.clip_after_step(optimizer, analog)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    with torch.no_grad():
        analog.first.weight[0, 0] = 100.0
    scaler.scale(analog(torch.ones(2, 8)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert analog.first.weight.abs().max() < 50


# ----------------------------------------------------------------------------- quantize_weights

QUANTIZED = {
    "rows": CONFIGS["discrete rows"],
    "tiles": CONFIGS["discrete"],
    "with a bound": merged(CONFIGS["DAC and ADC"], CONFIGS["discrete rows"]),
    "learned clip": CONFIGS["learned clip"],
    "learned clip, discrete": CONFIGS["learned clip, discrete"],
    "everything": CONFIGS["everything"],
    "everything, dynamic": CONFIGS["everything, dynamic"],
}


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "grouped"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_give_the_same_outputs_in_eval(name, layer, tiles):
    digital, x = layer_and_input(layer)
    analog = analogfx.analogize(digital, merged(QUANTIZED[name], tiles))
    if hasattr(analog, "learnable_weight_clip"):
        analog.learnable_weight_clip.data *= 0.8
    analog(x)
    expected = analog.eval()(x)
    analogfx.quantize_weights(analog)
    assert not torch.equal(analog.weight, digital.weight)
    torch.testing.assert_close(analog(x), expected, rtol=1e-12, atol=1e-12)
    assert analog._analog.config.modifier.quantization_type.value == "None"
    again = analog.weight.detach().clone()
    analogfx.quantize_weights(analog)
    torch.testing.assert_close(analog.weight.detach(), again, rtol=1e-12, atol=1e-12)


def test_quantized_weights_take_few_values():
    analog = analogfx.analogize(nn.Linear(200, 3), CONFIGS["discrete rows"])  # 15 levels
    analogfx.quantize_weights(analog)
    assert all(10 <= len(row.unique()) <= 15 for row in analog.weight)


def test_no_config_that_was_handed_in_is_changed():
    config = analogfx.TorchInferenceRPUConfig.from_dict({"schema": 1, **CONFIGS["discrete"]})
    before = config.to_dict()
    digital = mlp()
    first, second = analogfx.analogize(digital, config), analogfx.analogize(digital, config)
    analogfx.quantize_weights(first)
    assert config.to_dict() == before
    assert second.first._analog.config.to_dict() == before
    assert torch.equal(second.first.weight, digital.first.weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(first.eval()(x), second.eval()(x))


def test_configs_that_quantize_nothing_leave_weights_alone():
    digital = mlp()
    analog = analogfx.analogize(digital, IDENTITY)
    analogfx.quantize_weights(analog)
    assert torch.equal(analog.first.weight, digital.first.weight)


def test_a_computed_weight_cannot_be_quantized_for_good():
    analog = analogfx.analogize(
        product(lambda self, x: F.linear(x, self.w * self.mask), w=(3, 4), mask=(3, 4)),
        CONFIGS["discrete"],
    )
    with pytest.raises(
        analogfx.errors.CaptureError, match="computed from w, so nothing can be written back"
    ):
        analogfx.quantize_weights(analog)


@pytest.mark.parametrize("kind", ["LayerGaussian", "LayerGaussianPerChannel"])
def test_a_gaussian_clip_without_a_bound_is_an_error_where_clipping_is_asked_for(kind):
    digital = mlp()
    config = clip(kind)  # legal: the type says what the ADC's bound refers to
    analog = analogfx.analogize(digital, {"second": config, "*": WHOLE})
    optimizer = torch.optim.SGD(analog.parameters(), lr=0.1)
    for asked in (
        lambda: analogfx.clip_weights(analog),
        lambda: analogfx.clip_after_step(optimizer, analog),
    ):
        with pytest.raises(ConfigError, match=r"second: clip.sigma = -1.0: expected a number"):
            asked()
    assert torch.equal(analog.first.weight, digital.first.weight)
    analog(torch.randn(3, 8)).sum().backward()
    optimizer.step()  # the refused hook is gone


def test_prepare_training_was_not_asked_to_clip():
    analog = analogfx.analogize(mlp(), merged(ranged(), clip("LayerGaussian")))
    optimizer = torch.optim.SGD(analog.parameters(), lr=0.0)
    before = analog.first.weight.detach().clone()
    analogfx.prepare_training(optimizer, analog)
    analog(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(analog.first.weight, before)
