import re
from pathlib import Path

import pytest
import torch
from torch import nn

import analogfx
from analogfx.config import resolve
from analogfx.errors import KernelError, OnnxError
from analogfx.kernels import dispatch, integers, spec
from analogfx.kernels.spec import MVMSpec
from analogfx.modules.program import build

ROOT = Path(__file__).resolve().parents[2]

PROGRAMS = {
    "triton": ("kernels/triton/*.py", "kernels/plan.py", "kernels/dispatch.py"),
    "prepared": ("kernels/prepared.py", "kernels/weights.py", "kernels/integers.py"),
    "recurrent": ("kernels/ready.py", "kernels/recurrence.py", "kernels/weights.py"),
    "onnx": ("analogfx/onnx/*.py",),
}
"""Files with formulas of a tile beside the reference's."""

NOT_OF_A_FORWARD = {"decay", "input_min_percentage", "keep"}
SET_BY_PASSES = {"nonnegative", "activation", "part", "peers", "sums"}
"""What no config says: a pass that sets one knows which programs take it."""
NOISE = {"noise_std", "noise_per_channel", "out_noise", "out_noise_per_channel"}
"""Of training: prepared sites are for inference."""

QUANTIZED = MVMSpec(
    [8], [4], range_mode="static", inp_res=254.0, weight_states=14.0, out_bound=12.0,
    out_res=254.0,
)  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_knows_a_scalar_or_refuses_it(program):
    files = [path for pattern in PROGRAMS[program] for path in ROOT.glob(pattern)]
    text = "".join(path.read_text() for path in files)
    asked = set(MVMSpec._fields) - NOT_OF_A_FORWARD - SET_BY_PASSES - spec.REFERENCE_ONLY
    if program == "prepared":
        asked -= NOISE
    assert {name for name in asked if not re.search(rf"\.{name}\b|\"{name}\"", text)} == set()


@pytest.mark.parametrize("role", spec.ROLES)
def test_a_role_takes_scalars_that_both_a_config_and_a_spec_have(role):
    config = resolve(analogfx.recipes.afm())
    names = spec.ROLES[role].names
    assert names and {*names} <= {*MVMSpec._fields} & {*vars(config)}
    assert spec.all_scalars(role, config) == tuple(getattr(config, name) for name in names)
    assert spec.scalars(role, QUANTIZED) == tuple(
        getattr(QUANTIZED, name) for name in spec.ROLES[role].forward
    )


@pytest.mark.parametrize("learned", [True, False])
def test_the_scalars_of_every_role_reach_the_fused_op(learned):
    """Each has a value of its own, so that none can stand in another's place."""
    config = analogfx.recipes.afm()
    config.forward.inp_res, config.forward.out_res = 30, 62
    config.forward.out_noise, config.forward.out_bound = 0.125, 3.0
    config.modifier.std_dev, config.modifier.res = 0.25, 14
    config.modifier.quantization_type = (
        analogfx.WeightQuantizationType.DISCRETIZE_PER_CHANNEL
        if learned
        else analogfx.WeightQuantizationType.DISCRETIZE
    )
    config.pre_post.input_range.decay = 0.5
    config.pre_post.input_range.input_min_percentage = 0.75
    if learned:
        config.clip.type = analogfx.WeightClipType.LEARNABLE_PER_CHANNEL
    resolved = resolve(config)
    (lowered,) = build(nn.Linear(8, 4), resolved, True, ()).lowered
    values = [v for role in spec.ROLES for v in spec.all_scalars(role, lowered.spec)]
    assert values == [v for role in spec.ROLES for v in spec.all_scalars(role, resolved)]
    assert len({*values}) == len(values) - 1 and 0.0 not in values  # two roles hold the states


@pytest.fixture
def new(monkeypatch):
    """As if nothing but the reference computed an ADC's resolution."""
    monkeypatch.setattr(spec, "REFERENCE_ONLY", frozenset({"out_res", "activation"}))


def test_a_new_scalar_refuses_where_it_is_on(new):
    assert spec.reference_only(QUANTIZED) == "only the reference computes out_res"
    assert spec.reference_only(QUANTIZED._replace(out_res=0.0)) == ""


def test_nothing_is_refused_as_things_are():
    assert spec.reference_only(QUANTIZED) == "" and integers.depth(QUANTIZED) > 0


def model(layer):
    config = analogfx.TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound = 12
    config.modifier.quantization_type = analogfx.WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    config.modifier.res = 14
    config.pre_post.input_range.enable = True
    return analogfx.analogize(layer, config).eval()


def test_no_sum_is_taken_for_one_of_codes(new):
    assert integers.depth(QUANTIZED) == 0


def test_triton_leaves_the_site_to_torch(new, monkeypatch):
    monkeypatch.setattr(dispatch, "_refused_device", lambda device: "")
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    assert dispatch.refusal("linear", x, weight, QUANTIZED).endswith("computes out_res")
    assert dispatch.refusal("linear", x, weight, QUANTIZED._replace(out_res=0.0)) == ""


def test_prepared_weights_leave_the_site_to_the_reference(new):
    analog, x = model(nn.Linear(8, 4)), torch.randn(3, 8)
    with torch.no_grad():
        told = str(analogfx.explain(analog, None, x))
    assert "only the reference computes out_res" in told


def test_a_recurrent_layer_refuses(new):
    with torch.no_grad(), pytest.raises(KernelError, match=r"recurrent layer .* out_res"):
        model(nn.LSTM(8, 4))(torch.randn(3, 2, 8))


def test_a_file_refuses(new, tmp_path):
    with pytest.raises(OnnxError, match=r"a file cannot hold the site: .* out_res"):
        analogfx.export_onnx(model(nn.Linear(8, 4)), (torch.randn(3, 8),), tmp_path / "m.onnx")
