"""``analogfx.calibrate`` as a user calls it."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import LAYERS, layer_and_input, merged, ranged
from torch import nn
from torch.nn.functional import linear as linear_product
from torch.nn.functional import unfold
from torch.utils.data import DataLoader, TensorDataset

import analogfx
from analogfx.errors import CalibrationError
from analogfx.kernels import reference as ref

METHODS = ["max", "quantile", "moving_std", "moving_quantile", "mse", "entropy"]
DAC = {"forward": {"inp_res": 30}}


def calibrate(analog, batches, method="max", **arguments):
    return analogfx.calibrate(analog, batches, method, progress=False, **arguments)


def linear(inputs=6, tile=-1, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = merged(ranged(**fields), {"mapping": {"max_input_size": tile}}, DAC)
    return analogfx.analogize(nn.Linear(inputs, 3, dtype=dtype), config)


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def changed(model, before):
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


# ------------------------------------------------------------------------- what tiles are given


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "conv2d circular"])
def test_every_kind_of_layer_and_tile_sees_its_own_inputs(name):
    """The largest input of each, found by a digital layer that has one weight at a time."""
    layer, x = layer_and_input(name)
    config = merged(ranged(), {"mapping": {"max_input_size": 2}})
    analog = analogfx.analogize(layer, config)
    calibrate(analog, [x, -3 * x[..., :1].expand_as(x)])

    probe = copy.deepcopy(layer)
    expected = []
    with torch.no_grad():
        if probe.bias is not None:
            probe.bias.zero_()
        for column in range(layer.weight[0].numel()):
            probe.weight.zero_().flatten(1)[:, column] = 1.0
            outputs = [probe(x), probe(-3 * x[..., :1].expand_as(x))]
            expected.append(max(y.abs().max().item() for y in outputs))
    (sizes,) = (s.in_sizes for s in analog._analog.sites)
    assert len(sizes) > 1
    tiles = torch.tensor(expected, dtype=torch.float64).split(list(sizes))
    torch.testing.assert_close(analog.input_range.double(), torch.stack([t.max() for t in tiles]))


def test_the_zeros_of_padding_count():
    """A quantile of patches, by torch's own unfold."""
    analog = analogfx.analogize(nn.Conv2d(2, 3, 3, padding=1), ranged())
    x = torch.rand(2, 2, 4, 4) + 1
    calibrate(analog, [x], "quantile", quantile=0.6)
    patches = unfold(x, 3, padding=1).abs().flatten()
    torch.testing.assert_close(analog.input_range.detach(), patches.quantile(0.6).view(1))
    assert not torch.allclose(analog.input_range, x.flatten().quantile(0.6))


class Twice(nn.Module):
    """Two products in one module, the second of what the first gives."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.rand(s) + 1) for s in ((5, 4), (4, 5)))

    def forward(self, x):
        return torch.relu(x @ self.up.t()) @ self.down.t()


def test_several_sites_of_a_module_are_told_apart():
    model = Twice()
    analog = analogfx.analogize(model, ranged())
    x = torch.rand(7, 4)
    result = calibrate(analog, [x])
    assert [s.name for s in result.sites] == ["up", "down"]
    assert result.sites[0].after == (x.max().item(),)
    hidden = x @ model.up.t()
    torch.testing.assert_close(analog.down_input_range.detach(), hidden.max().view(1))


class ReadsItsChild(nn.Module):
    """Multiplies by its child's weight, as Mamba does, and by its own."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.own = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        hidden = linear_product(x, self.child.weight, self.child.bias)
        return linear_product(hidden, self.own)


def test_a_childs_product_is_the_childs_wherever_it_is_computed():
    torch.manual_seed(0)
    model, x = ReadsItsChild(), torch.randn(5, 4)
    analog = analogfx.analogize(model, merged(ranged(), DAC))
    calibrate(analog, [x], adc=True)
    assert analog.child.input_range.item() == x.abs().max()
    hidden = model.child(x)
    torch.testing.assert_close(analog.input_range[0], hidden.abs().max())


def test_an_input_that_does_not_fit_is_refused_by_the_layers_name():
    analog = analogfx.analogize(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), merged(ranged(), DAC))
    with pytest.raises(RuntimeError, match=r"^1: expected an input \(..., 4\), found \(2, 5\)"):
        calibrate(analog, [torch.randn(2, 5)])


def test_deeper_layers_see_exact_products():
    """The ranges in use while it runs, which are far too small here, change nothing."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    config = merged(ranged(init_value=1e-3), {"forward": {"inp_res": 6, "out_bound": 0.01}})
    analog = analogfx.analogize(nn.Sequential(first, second), config)
    x = torch.randn(9, 4)
    calibrate(analog, [x])
    torch.testing.assert_close(
        analog[1].input_range.detach(), first(x).detach().abs().max().view(1)
    )


def test_works_in_half_precision_under_autocast_and_in_double():
    x = torch.randn(50, 6, dtype=torch.float64)
    exact = x.abs().max()
    for dtype, tolerance in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 0)):
        for method in METHODS:
            analog = linear(dtype=dtype)
            calibrate(analog, [x.to(dtype)], method)
            assert analog.input_range.isfinite().all() and (analog.input_range > 0).all()
        analog = linear(dtype=dtype)
        calibrate(analog, [x.to(dtype)])
        assert analog.input_range.dtype == (
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        assert abs(analog.input_range.double().item() - exact) <= tolerance * exact
    analog = linear()
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(analog, [x.float()])
    assert abs(analog.input_range.item() - exact) <= 2**-8 * exact


# --------------------------------------------------------------------------- batches, all kinds


@settings(max_examples=6)
@given(st.permutations(range(24)), st.integers(1, 24))
def test_order_and_division_of_the_data_do_not_matter(order, size):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    for method in ("max", "quantile", "mse", "entropy"):
        together, apart = linear(tile=4), linear(tile=4)
        calibrate(together, [x], method, quantile=0.9)
        calibrate(apart, x[list(order)].split(size), method, quantile=0.9)
        torch.testing.assert_close(apart.input_range, together.input_range)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, scale=None):
        return self.fc(x if scale is None else x * scale)


@pytest.mark.parametrize(
    ("batches", "largest"),
    [
        (DataLoader(torch.eye(3), batch_size=2), 1),
        (DataLoader(TensorDataset(torch.eye(3)), batch_size=2), 1),
        ([(torch.eye(3), torch.tensor(4.0))], 4),
        ([[torch.eye(3), torch.tensor(4.0), "label"]], 4),
        ([{"x": torch.eye(3), "index": 7}], 1),
        ([((torch.eye(3),), {"scale": torch.tensor(5.0)})], 5),
        (((torch.eye(3) * i,) for i in range(3)), 2),
    ],
)
def test_batches_of_every_kind(batches, largest):
    analog = analogfx.analogize(Keywords(), ranged())
    calibrate(analog, batches)
    assert analog.fc.input_range.item() == largest


@pytest.mark.parametrize("batch", [{"y": torch.eye(3)}, 3, "text"])
def test_a_batch_that_says_nothing_is_refused(batch):
    analog = analogfx.analogize(Keywords(), ranged())
    with pytest.raises(CalibrationError, match="a batch"):
        calibrate(analog, [batch])


# -------------------------------------------------------------------------- nothing else changes


class Restless(nn.Module):
    """Draws, drops and counts, in training alone but for the drawing."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.fc(x + torch.rand_like(x))))


@pytest.mark.parametrize("method", METHODS)
def test_mode_generators_and_all_but_ranges_stay(method):
    analog = analogfx.analogize(Restless(), merged(ranged(), DAC)).train()
    analog.drop.eval()
    modes = [m.training for m in analog.modules()]
    before = snapshot(analog)
    loader = DataLoader(torch.randn(20, 6), batch_size=5, shuffle=True)
    generator = torch.get_rng_state()
    calibrate(analog, loader, method, adc=True)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in analog.modules()] == modes
    assert changed(analog, before) == {
        f"fc.{name}" for name in ("input_range", "input_range_update_idx", "x_min", "x_max")
    }
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in analog.parameters())


@pytest.mark.parametrize("adc", [False, True])
def test_an_exception_leaves_everything(adc):
    analog = linear(tile=2)
    before, config = snapshot(analog), analog._analog.config.to_dict()
    x = torch.ones(2, 6)

    class Breaks(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield x
            if self.passes == 1 + adc:
                raise KeyError("data")

    with pytest.raises(KeyError):
        calibrate(analog, Breaks(), adc=adc)
    assert not changed(analog, before)
    assert analog._analog.config.to_dict() == config
    assert analog.training
    analog(x)  # and it runs as before


def test_training_goes_on_from_the_ranges():
    for fields in ({}, {"fast_mode": True}):
        analog = linear(tile=3, **fields)
        x = torch.randn(20, 6)
        calibrate(analog, [x])
        found = analog.input_range.detach().clone()
        assert analog.input_range_update_idx.tolist() == [3, 3]  # init_from_data
        assert torch.equal(analog.x_max, found) and torch.equal(analog.x_min, -found)
        optimizer = torch.optim.SGD(analog.parameters(), lr=0.1)
        analog(5 * x).square().sum().backward()
        assert torch.equal(analog.input_range, found)
        optimizer.step()
        assert not torch.equal(analog.input_range, found)
        assert analog.input_range.isfinite().all()
        calibrate(analog, [x])
        assert torch.equal(analog.input_range, found)


def test_a_compiled_model_is_calibrated_as_it_is_written():
    analog = linear()
    compiled = torch.compile(analog, backend="analogfx")
    x = torch.randn(4, 6)
    calibrate(compiled, [x])
    assert analog.input_range.item() == x.abs().max()
    torch.testing.assert_close(compiled.eval()(x), analog.eval()(x))


# -------------------------------------------------------------------------------- what is warned


def test_non_finite_inputs_are_left_out_and_named():
    x = torch.randn(30, 6)
    broken = x.clone()
    broken[3, 1], broken[5, 5], broken[6, 0] = torch.inf, torch.nan, -torch.inf
    for method in METHODS:
        analog = analogfx.analogize(nn.Sequential(nn.Linear(6, 2)), merged(ranged(), DAC))
        with pytest.warns(UserWarning, match=r"NaN inputs were left out of the ranges of 0 \(3\)"):
            calibrate(analog, [broken], method)
        assert analog[0].input_range.isfinite().all()
    rest = broken[broken.isfinite()]
    with pytest.warns(UserWarning, match="left out"):
        calibrate(analog, [broken], "quantile", quantile=0.5)
    assert analog[0].input_range.item() == pytest.approx(rest.abs().quantile(0.5).item())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_data_keeps_its_range_and_is_named(method):
    config = merged(ranged(), DAC, {"mapping": {"max_input_size": 2}})
    analog = analogfx.analogize(Unused(), config)
    x = torch.rand(3, 4)
    x[:, 2:] = 0
    with pytest.warns(UserWarning, match=r"reached used \(tiles 1\), spare: ranges stay"):
        result = calibrate(analog, [x], method)
    assert analog.spare.input_range.tolist() == [3.0, 3.0]
    assert analog.used.input_range[1] == 3.0
    assert analog.used.input_range_update_idx.tolist() == [3, 0]  # the other may still follow
    assert analog.used.input_range[0] != 3.0
    json.dumps(result.to_dict(), allow_nan=False)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "median"}, "method = 'median': expected one of max, quantile"),
        ({"quantile": 0.0}, "quantile = 0.0"),
        ({"quantile": 99.9}, "quantile = 99.9"),
        ({"max_samples": 0}, "max_samples = 0"),
        ({"std_alpha": -1.0}, "std_alpha = -1.0"),
        ({"adc_clipped": 1.0}, "adc_clipped = 1.0"),
        ({"adc": True, "batches": iter([torch.ones(1, 6)])}, "reads the batches twice"),
        ({"batches": []}, "no batch"),
    ],
)
def test_what_cannot_be_is_refused(arguments, text):
    analog = linear()
    before = snapshot(analog)
    with pytest.raises(CalibrationError, match=text):
        calibrate(analog, **{"batches": [torch.ones(1, 6)], **arguments})
    assert not changed(analog, before)


def test_a_model_without_ranges_is_refused():
    for fields in ({"enable": False}, {"dynamic": True}):
        analog = analogfx.analogize(nn.Linear(6, 3), ranged(**fields))
        with pytest.raises(CalibrationError, match=r"input_range\.enable = True"):
            calibrate(analog, [torch.ones(1, 6)])
    with pytest.raises(TypeError, match="no analog layer"):
        calibrate(nn.Linear(6, 3), [torch.ones(1, 6)])
    with torch.device("meta"), pytest.raises(CalibrationError, match="meta"):
        calibrate(analogfx.analogize(nn.Linear(6, 3), ranged()), [torch.ones(1, 6)])


# ------------------------------------------------------------------------------------- the ADC


def test_the_bound_is_the_smallest_that_clips_little_enough():
    torch.manual_seed(0)
    config = merged(ranged(), DAC, {"mapping": {"max_input_size": 8}})
    handed = analogfx.TorchInferenceRPUConfig.from_dict({"schema": 1, **config})
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    analog = analogfx.analogize(model, handed)
    batches = [torch.randn(64, 16) for _ in range(3)]
    result = calibrate(analog, batches, "quantile", adc=True, adc_clipped=0.01)

    # What every tile gives in units of range x largest weight, by arithmetic of its own.
    sizes = []
    for x in batches:
        for module in analog:
            y = 0
            for i, (part, w) in enumerate(
                zip(x.split(8, 1), module.weight.split(8, 1), strict=True)
            ):
                r = module.input_range[i].detach()
                part = part.clamp(-r, r).div(2 * r / 30).round() * (2 * r / 30)
                tile = part @ w.t()
                sizes.append((tile.abs() / (r * w.abs().max())).flatten())
                y = y + tile
            x = y + module.bias
    sizes = torch.cat(sizes).detach()
    exact = sizes.sort().values[int(0.99 * len(sizes))].item()
    assert exact / 1.01 <= result.out_bound <= exact * 1.01
    share = (sizes > result.out_bound).double().mean().item()
    assert result.out_clipped == pytest.approx(share, abs=2 / len(sizes))
    assert result.out_clipped <= 0.01
    assert [m._analog.config.forward.out_bound for m in analog] == [result.out_bound] * 2
    assert handed.forward.out_bound == 0.0
    assert "out_bound" in str(result)

    # And it acts: with the bound as chosen the outputs of one tile end there.
    big = analog[0].eval()
    y = big(1e3 * torch.sign(big.weight[:1, :].repeat(2, 1)))
    limit = result.out_bound * sum(
        r * w.abs().max() for r, w in zip(big.input_range, big.weight.split(8, 1), strict=True)
    )
    assert (y - big.bias).abs().max() <= limit * 1.0001


def test_dynamic_ranges_get_a_bound_but_no_range():
    analog = analogfx.analogize(nn.Conv2d(2, 4, 3, groups=2), ranged(dynamic=True))
    result = calibrate(analog, [torch.randn(2, 2, 5, 5)], adc=True, adc_clipped=0.0)
    assert analog._analog.config.forward.out_bound == result.out_bound > 0
    assert result.out_clipped == 0 and result.sites[0].after == ()
    assert str(result)


# --------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("method", METHODS)
def test_gpt2_from_the_config_to_a_saved_file(method, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16, use_cache=False
    )
    digital = transformers.GPT2LMHeadModel(small)
    config = merged(ranged(), DAC, {"mapping": {"max_input_size": 8}})
    analog = analogfx.analogize(digital, config)
    batches = [
        {"input_ids": torch.randint(0, 40, (2, 12)), "labels": torch.randint(0, 40, (2, 12))}
        for _ in range(3)
    ]
    result = calibrate(analog, batches, method, adc=True)
    assert len(result.sites) == 9  # four in each block, and the head
    assert all(r > 0 and r != 3.0 for s in result.sites for r in s.after)
    assert {len(s.after) for s in result.sites} == {2, 8}
    assert str(result).count("\n") == 2 + 9 + 1
    analog.train()
    loss = analog(**batches[0]).loss
    loss.backward()
    assert loss.isfinite() and analog.lm_head.input_range.grad.isfinite().all()

    analogfx.save(analog, tmp_path)
    again = analogfx.load(digital, tmp_path).eval()
    ids = batches[0]["input_ids"]
    assert torch.equal(again(ids).logits, analog.eval()(ids).logits)


def test_clipped_shares_are_those_of_the_data():
    analog = linear()
    x = torch.randn(200, 6)
    (site,) = calibrate(analog, [x], "quantile", quantile=0.9).sites
    assert site.before == (3.0,)
    assert site.after == (analog.input_range.item(),)
    assert site.clipped == (pytest.approx((x.abs() > site.after[0]).double().mean().item()),)
    assert ref.inside(x, analog.input_range.detach()).mean().item() == pytest.approx(0.9, abs=1e-3)
