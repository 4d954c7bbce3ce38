import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import analogfx
from analogfx.config import resolve
from analogfx.errors import CaptureError, CompatError, KernelError, OnnxError
from analogfx.kernels import dispatch, integers, ready, small, spec
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
    kind = analogfx.WeightQuantizationType
    config.modifier.quantization_type = kind.DISCRETIZE_PER_CHANNEL if learned else kind.DISCRETIZE
    config.modifier.res, config.forward.out_noise = 14, 0.125
    if learned:
        config.clip.type = analogfx.WeightClipType.LEARNABLE_PER_CHANNEL
    resolved = resolve(config)
    names = sorted({name for role in spec.ROLES.values() for name in role.names})
    numbers = [name for name in names if type(getattr(resolved, name)) is float]
    values = {name: 2.0 + number / 64 for number, name in enumerate(numbers)}
    resolved = dataclasses.replace(resolved, **values)
    (lowered,) = build(nn.Linear(8, 4), resolved, True, ()).lowered
    for name in names:
        assert getattr(lowered.spec, name) == getattr(resolved, name), name


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


def test_a_recurrent_layer_goes_step_by_step(new, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.LSTM(8, 4), torch.randn(3, 2, 8)
    with torch.no_grad():
        found = model(layer)(x)[0]
        monkeypatch.setattr(spec, "REFERENCE_ONLY", frozenset())
        torch.testing.assert_close(found, model(layer)(x)[0])


def test_a_product_that_is_made_ready_refuses(new):
    with pytest.raises(KernelError, match=r"recurrent layer .* out_res"):
        ready.make(torch.zeros(4, 8), None, torch.ones(1), None, QUANTIZED)


def test_a_small_site_is_left_to_the_reference(new):
    plain = QUANTIZED._replace(weight_states=0.0)
    assert small.made(plain) is None
    assert small.made(plain._replace(out_res=0.0)) is not None


def test_files_of_tiles_refuse(new, tmp_path):
    analog = model(nn.Linear(8, 4))
    with pytest.raises(CaptureError, match=r"files of tiles cannot hold it: .* out_res"):
        analogfx.export_tiles(analog, tmp_path / "tiles")


def test_aihwkit_has_no_such_tile(new):
    pytest.importorskip("aihwkit")
    from analogfx.compat import aihwkit

    with pytest.raises(CompatError, match=r"AIHWKIT has no such tile: .* out_res"):
        aihwkit.export(model(nn.Linear(8, 4)))


def test_a_file_refuses(new, tmp_path):
    with pytest.raises(OnnxError, match=r"a file cannot hold the site: .* out_res"):
        analogfx.export_onnx(model(nn.Linear(8, 4)), (torch.randn(3, 8),), tmp_path / "m.onnx")
