from types import SimpleNamespace

import pytest
import torch
from triton_cases import (
    ADC,
    CASES,
    DEVICE,
    NOISY,
    SEED,
    TILES,
    Case,
    assert_as_good,
    data,
    oracle,
    run,
)

from analogfx.kernels import changes, philox, plan
from analogfx.kernels import linear as plain
from analogfx.kernels.triton import blocks, eight_bit, linear, tile
from analogfx.kernels.triton.blocks import Blocks

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]
)
def test_it_is_as_exact_as_torch(name, dtype):
    case = CASES[name]
    d = data(case, dtype)
    assert_as_good(run(linear, case, d), *oracle(case, d, dtype), dtype)


UNLIKE = {
    "static, clip": Case({**ADC, **NOISY}, (18, 17), out_sizes=(7, 60), clip=True, lead=(17,)),
    "dynamic": Case(
        {**ADC, **NOISY, "range_mode": "dynamic", "weight_states": 14.0}, (35,), 67, lead=(17,),
        dtypes=(torch.bfloat16,),
    ),
    "fast": Case({**ADC, "range_mode": "fast"}, (18, 17), 67, lead=(17,), dtypes=(torch.float16,)),
    "int8": Case(
        {**ADC, "inp_res": 254.0, "weight_states": 254.0, "keep": False}, (18, 17), 67, lead=(17,),
        dtypes=(torch.bfloat16,),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "prepared"), [*((n, False) for n in UNLIKE), ("dynamic", True)])
def test_results_do_not_depend_on_blocks(monkeypatch, name, prepared):
    case = UNLIKE[name]
    (dtype,) = case.dtypes
    d = data(case, dtype)
    expected, marks = run(linear, case, d), linear.forward(d.inputs(), case.spec)[1]
    deep = 32 if plan.in_integers(case.spec) else 16  # what an int8 product needs on sm_90
    monkeypatch.setattr(blocks, "choose", lambda *_: Blocks(16, 64, deep, 4, 1))
    monkeypatch.setattr(blocks, "ELEMENTS", 128)
    monkeypatch.setattr(blocks, "ROWS", 8)
    monkeypatch.setattr(blocks, "COLUMNS", 8)
    monkeypatch.setattr(plan, "REUSED", 0 if prepared else 99)
    monkeypatch.setattr(plan, "FEW", 0)
    found = run(linear, case, d)
    assert torch.equal(linear.forward(d.inputs(), case.spec)[1], marks)
    assert marks.any() == case.spec.keep
    exact = {n: t.cpu().double() for n, t in expected.items()}
    assert_as_good(found, exact, {n: t.cpu() for n, t in expected.items()}, dtype)


def test_output_noise_is_philox_by_element_and_tile():
    for outputs in (8, 7):  # four to a counter, and not
        spec = Case({**ADC, "out_bound": 0.0, "out_res": 0.0, "out_noise": 0.5}, TILES, outputs)
        d = data(spec, torch.float32)
        quiet = spec.spec._replace(out_noise=0.0)
        d.weight.zero_()
        d.weight[:, [0, 5, 9]] = 1.0  # a maximum of 1 in every tile
        drawn = linear.forward(d.inputs(), spec.spec)[0] - linear.forward(d.inputs(), quiet)[0]
        seed = torch.tensor(SEED)
        expected = sum(
            philox.normal(seed, t + 1, drawn.numel()).view(drawn.shape) * 0.5 * float(r)
            for t, r in enumerate(d.input_range)
        )
        torch.testing.assert_close(drawn.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_pass_as_in_torch():
    case = Case(ADC, TILES)
    d = data(case, torch.float32)
    d.x[1, 2], d.x[2, 6], d.x[3, 0] = float("nan"), float("inf"), float("-inf")
    for mode in ("static", "dynamic"):
        spec = case.spec._replace(range_mode=mode)
        if mode == "dynamic":
            d.input_range = None
        found = linear.forward(d.inputs(), spec)[0].cpu()
        expected = oracle_forward(spec, d)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.isnan().any() and found.isfinite().any()


def oracle_forward(spec, d):
    return plain.forward(d.to(None, "cpu").inputs(), spec)[0]


def test_no_input_is_written():
    case = CASES["everything"]
    d = data(case, torch.float32)
    before = [t.clone() for t in (*d.inputs(), d.grad)]
    run(linear, case, d)
    assert all(torch.equal(a, b) for a, b in zip((*d.inputs(), d.grad), before, strict=True))


def test_what_is_kept_is_a_mark_for_a_patch_of_outputs_and_tile():
    case = Case(ADC, TILES, 70, lead=(35,))
    d = data(case, torch.float32)
    d.x[:16] *= 0.01  # nothing is clipped in the first patch of rows
    y, marks, modified = linear.forward(d.inputs(), case.spec)
    assert marks.dtype == torch.uint8 and marks.shape == (3, 3, 3) and modified.numel() == 0
    assert marks[:, 0].eq(0).all() and marks[:, 1:].eq(1).any()
    seen = {"y": y, "marks": marks}
    again = linear.forward(d.inputs(), case.spec)
    assert torch.equal(again[0], seen["y"]) and torch.equal(again[1], marks)


def test_only_marked_blocks_are_computed_again(monkeypatch):
    case = Case(ADC, TILES, 70, lead=(35,))
    d = data(case, torch.float32)
    forward = linear.forward(d.inputs(), case.spec)

    def gradients(marks):
        needs = [True, True, True, True, False]
        return linear.backward(d.grad, d.inputs(), marks, forward[2], needs, case.spec)

    right, all_marked = gradients(forward[1]), gradients(torch.ones_like(forward[1]))
    none = gradients(torch.zeros_like(forward[1]))
    for name in ("x", "weight", "input_range"):
        assert torch.equal(getattr(right, name), getattr(all_marked, name)), name
        assert not torch.equal(getattr(right, name), getattr(none, name)), name


# --------------------------------------------------------------------------- 8-bit inference

EIGHT_BIT = {**ADC, "inp_res": 254.0, "weight_states": 254.0, "keep": False}


@pytest.mark.parametrize("fields", [{}, {"range_mode": "dynamic"}, {"out_bound": 0, "out_res": 0}])
@pytest.mark.parametrize(
    "shape", [{"in_sizes": TILES, "clip": True}, {"in_sizes": (16, 16), "lead": (66,)}]
)
def test_eight_bit_inference(fields, shape):
    case = Case({**EIGHT_BIT, **fields}, **shape)
    assert plan.in_integers(case.spec)
    d = data(case, torch.bfloat16)
    found = {"output": linear.forward(d.inputs(), case.spec)[0]}
    # Not by the float64 oracle alone: half of a maximum lies on a tie of 254 states.
    same = {"output": oracle_forward(case.spec, d)}
    exact = {"output": oracle_forward(case.spec, d.to(torch.float64))}
    assert_as_good(found, exact, same, torch.bfloat16)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_an_integer_hides_no_nan(mode):
    case = Case({**EIGHT_BIT, "range_mode": mode}, TILES, lead=(70,))
    d = data(case, torch.bfloat16)
    d.x[1, 2], d.x[2, 6] = float("nan"), float("inf")
    found = linear.forward(d.inputs(), case.spec)[0].cpu()
    expected = oracle_forward(case.spec, d)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[1].isnan().all() and found[0].isfinite().all()


def test_codes_are_kept_until_the_weight_or_its_clip_changes():
    case = Case(EIGHT_BIT, TILES, clip=True)
    d = data(case, torch.bfloat16)
    first = eight_bit.prepare(d.weight, d.clip, case.spec)
    assert eight_bit.prepare(d.weight, d.clip, case.spec) is first
    assert eight_bit.prepare(d.weight, None, case.spec) is not first
    for t in (d.weight, d.clip):
        before = eight_bit.prepare(d.weight, d.clip, case.spec)
        t.mul_(0.5)
        assert eight_bit.prepare(d.weight, d.clip, case.spec) is not before
    changed = eight_bit.prepare(d.weight, d.clip, case.spec)
    changes.written([d.weight])
    assert eight_bit.prepare(d.weight, d.clip, case.spec) is not changed
    count = len(eight_bit._prepared)
    del d, t
    assert len(eight_bit._prepared) < count


def test_codes_are_kept_for_their_stream_and_not_by_a_graph_that_is_captured(monkeypatch):
    spec = Case(EIGHT_BIT, TILES).spec
    weight = torch.randn(7, 13, device=DEVICE)
    stream = {"now": 1}
    monkeypatch.setattr(eight_bit, "_stream", lambda weight: stream["now"])
    first = eight_bit.prepare(weight, None, spec)
    stream["now"] = 2
    second = eight_bit.prepare(weight, None, spec)
    assert second is not first and torch.equal(second.codes, first.codes)
    stream["now"] = None  # what is made now is in the graph's memory
    captured = eight_bit.prepare(weight, None, spec)
    assert captured is not eight_bit.prepare(weight, None, spec)
    stream["now"] = 1
    assert eight_bit.prepare(weight, None, spec) is first


def test_the_stream_of_codes_is_the_current_one_of_the_weights_device(monkeypatch):
    weight = SimpleNamespace(is_cuda=True, device="cuda:1")
    capturing = {"now": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing["now"])
    monkeypatch.setattr(
        torch.cuda, "current_stream", {"cuda:1": SimpleNamespace(cuda_stream=7)}.__getitem__
    )
    assert eight_bit._stream(weight) == 7
    capturing["now"] = True
    assert eight_bit._stream(weight) is None
    assert eight_bit._stream(torch.ones(1)) == 0


def test_codes_of_parts_of_a_parameter_are_kept_beside_one_another():
    spec = Case(EIGHT_BIT, TILES).spec
    whole = torch.randn(13, 14, device=DEVICE)
    parts = [lambda: whole.T[:7], lambda: whole.T[7:]]
    first = [eight_bit.prepare(part(), None, spec) for part in parts]
    again = [eight_bit.prepare(part(), None, spec) for part in parts]
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].codes, first[1].codes)


@pytest.mark.parametrize(
    "fields",
    [{"keep": True}, {"inp_res": 256.0}, {"inp_res": 0.0}, {"weight_states": 255.0},
     {"noise_std": 0.1}, {"out_noise": 0.1}, {"range_mode": "none"}],
)  # fmt: skip
def test_what_is_no_eight_bit_inference(fields):
    assert not plan.in_integers(Case({**EIGHT_BIT, **fields}).spec)


# ------------------------------------------------------------------------------ precision


@pytest.fixture
def precision():
    """torch's precision of float32 products, put back."""
    yield torch.backends.cuda.matmul
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_float32_is_multiplied_as_torchs_setting_says(monkeypatch, precision):
    monkeypatch.setattr(tile, "is_interpreted", lambda kernel: False)
    assert tile.precision_of(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert tile.precision_of(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert tile.precision_of(torch.float32) == "ieee"
    precision.fp32_precision = "tf32"
    assert tile.precision_of(torch.float32) == "tf32"
    assert tile.precision_of(torch.bfloat16) == "ieee"
    assert tile.precision_of(torch.int8) == "int8"
