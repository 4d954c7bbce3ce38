import onnx_cases as cases
import pytest
import torch
from torch import nn

from analogfx import export_onnx
from analogfx.errors import OnnxError
from analogfx.kernels import reference as ref
from analogfx.onnx import operators, verify

FIELDS = {
    "forward__inp_res": 254,
    "forward__out_res": 254,
    "forward__out_bound": 10,
    "modifier__quantization_type": "DiscretizePerChannel",
    "modifier__res": 254,
}
BYTES = cases.config(**FIELDS)

LAYERS = {
    "linear": (lambda: nn.Linear(64, 8), (1, 64)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (1, 4, 6, 6)),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (1, 4, 9)),
}


@pytest.mark.parametrize("level", ["fused", "qdq"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_clamp_that_the_example_never_reaches_is_checked(layer, level, tmp_path, monkeypatch):
    make, shape = LAYERS[layer]
    x = torch.randn(shape)
    analog = cases.analog(make, BYTES, x)
    small = (x * 1e-3,)
    export_onnx(analog, small, tmp_path / "right", level=level)
    right = operators._clamp

    def wide(w, value, bound, dtype, scalar=True):
        twice = w.op("Mul", bound, w.scalar(2.0, dtype))
        return right(w, value, twice, dtype, scalar)

    monkeypatch.setattr(operators, "_clamp", wide)
    remedy = 'level="standard" does without' if level == "qdq" else "another version, opset"
    with pytest.raises(OnnxError, match=rf"outputs, driven to the ends of its codes,.*{remedy}"):
        export_onnx(analog, small, tmp_path / "wrong", level=level)


def test_an_end_of_the_adc_may_be_its_bound_or_its_last_code(tmp_path):
    """QLinearConv ends at the last code, whose value may be one bit from the bound."""
    torch.manual_seed(0)
    config = cases.config(**FIELDS, clip__type="LayerGaussianPerChannel", clip__sigma=2.5)
    x = torch.randn(2, 16, 8, 8)
    analog = cases.analog(lambda: nn.Conv2d(16, 64, 3), config, x)
    # Bounds just below a power of two are those that a step of 127 parts may miss.
    rows = analog.weight.detach().flatten(1)
    bound = torch.linspace(15.85, 16, 64)
    rows *= (bound / (10 * analog.input_range * rows.abs().amax(1)))[:, None]
    bound = ref.adc_bound(analog.input_range.detach(), rows.abs().amax(1), 10.0)
    apart = 127 * ref.adc_step(bound, 254) != bound
    assert apart.any() and not apart.all()
    export_onnx(analog, (x,), tmp_path / "file", level="qdq")


class Computed(nn.Module):
    """A bias that depends on another input, behind a site that is called twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6))

    def forward(self, x, b):
        return nn.functional.linear(self.layer(self.layer(x)), self.weight, 2 * b)


def test_sites_run_apart_with_what_else_they_read(tmp_path):
    x, b = torch.randn(3, 6), torch.randn(4)
    analog = cases.analog(Computed, BYTES, x, b)
    for level in cases.LEVELS:
        export_onnx(analog, (x, b), tmp_path / level, level=level, dynamic_shapes=False)


def test_nan_is_refused(tmp_path):
    x = torch.randn(3, 12)
    analog = cases.analog(cases.mlp, BYTES, x)
    nan = x.clone()
    nan[1, 2] = torch.nan
    with pytest.raises(OnnxError, match="input 0 holds 1 NaN in 36 values"):
        export_onnx(analog, (nan,), tmp_path / "m")
    with torch.no_grad():
        analog[2].weight[1] = torch.nan
    with pytest.raises(OnnxError, match=r"output 0 holds .* NaN .* an example and a model without"):
        export_onnx(analog, (x,), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_infinities_are_numbers():
    verify._check_numbers("input", [torch.tensor([-torch.inf, 1.0])])
