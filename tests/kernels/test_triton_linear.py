import pytest
import torch
from triton_cases import (
    ADC,
    CASES,
    NOISY,
    SEED,
    TILES,
    Case,
    assert_as_good,
    data,
    oracle,
    run,
)

from analogfx.kernels import linear as plain
from analogfx.kernels import philox, plan
from analogfx.kernels.triton import blocks, eight_bit, linear
from analogfx.kernels.triton.blocks import Blocks

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]

POISON = {torch.uint8: 255, torch.int8: 77, torch.int64: -(1 << 60)}


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that was not written is not 0."""

    def poisoning(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else POISON.get(t.dtype, 77))

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]
)
def test_it_is_as_exact_as_torch(name, dtype):
    case = CASES[name]
    d = data(case, dtype)
    assert_as_good(run(linear, case, d), *oracle(case, d, dtype), dtype)


OTHER_BLOCKS = [Blocks(16, 16, 16, 4, 1), Blocks(32, 16, 32, 4, 2)]


@pytest.mark.parametrize("tile", OTHER_BLOCKS, ids=lambda tile: tile.text)
@pytest.mark.parametrize("prepared", [False, True])
def test_results_do_not_depend_on_blocks(monkeypatch, tile, prepared):
    case = Case({**ADC, **NOISY}, (9, 8), out_sizes=(9, 8), clip=True, lead=(17,))
    d = data(case, torch.float32)
    expected, bits = run(linear, case, d), linear.forward(*d.inputs(), case.spec)[1]
    monkeypatch.setattr(blocks, "choose", lambda *_: tile)
    monkeypatch.setattr(blocks, "ELEMENTS", 64)
    monkeypatch.setattr(plan, "REUSED", 0 if prepared else 99)
    monkeypatch.setattr(plan, "FEW", 0)
    found = run(linear, case, d)
    assert torch.equal(linear.forward(*d.inputs(), case.spec)[1], bits)
    assert bits.any()
    assert_as_good(
        found, {n: t.cpu().double() for n, t in expected.items()}, expected, torch.float32
    )


def test_output_noise_is_philox_by_element_and_tile():
    for outputs in (8, 7):  # four to a counter, and not
        spec = Case({**ADC, "out_bound": 0.0, "out_res": 0.0, "out_noise": 0.5}, TILES, outputs)
        d = data(spec, torch.float32)
        quiet = spec.spec._replace(out_noise=0.0)
        d.weight.zero_()
        d.weight[:, [0, 5, 9]] = 1.0  # a maximum of 1 in every tile
        drawn = linear.forward(*d.inputs(), spec.spec)[0] - linear.forward(*d.inputs(), quiet)[0]
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
        found = linear.forward(*d.inputs(), spec)[0].cpu()
        expected = oracle_forward(spec, d)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.isnan().any() and found.isfinite().any()


def oracle_forward(spec, d):
    return plain.forward(*d.to(None, "cpu").inputs(), spec)[0]


def test_no_input_is_written():
    case = CASES["everything"]
    d = data(case, torch.float32)
    before = [t.clone() for t in (*d.inputs(), d.grad)]
    run(linear, case, d)
    assert all(torch.equal(a, b) for a, b in zip((*d.inputs(), d.grad), before, strict=True))


def test_what_is_kept_is_a_bit_for_an_output_and_tile():
    case = Case(ADC, TILES, 16)
    d = data(case, torch.float32)
    y, clipped, modified = linear.forward(*d.inputs(), case.spec)
    assert clipped.dtype == torch.uint8 and clipped.shape == (3, 5, 2)
    assert clipped.numel() * 8 == y.numel() * 3 and modified.numel() == 0


# --------------------------------------------------------------------------- 8-bit inference

EIGHT_BIT = {**ADC, "inp_res": 254.0, "weight_states": 254.0, "keep": False}


@pytest.mark.parametrize("fields", [{}, {"range_mode": "dynamic"}, {"out_bound": 0, "out_res": 0}])
@pytest.mark.parametrize(
    "shape", [{"in_sizes": TILES, "clip": True}, {"in_sizes": (16, 16), "lead": (66,)}]
)
def test_eight_bit_inference(fields, shape):
    case = Case({**EIGHT_BIT, **fields}, **shape)
    assert plan.eight_bit(case.spec)
    d = data(case, torch.bfloat16)
    found = {"output": linear.forward(*d.inputs(), case.spec)[0]}
    # Not by the float64 oracle alone: half of a maximum lies on a tie of 254 states.
    same = {"output": oracle_forward(case.spec, d)}
    exact = {"output": oracle_forward(case.spec, d.to(torch.float64))}
    assert_as_good(found, exact, same, torch.bfloat16)


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
    count = len(eight_bit._prepared)
    del d
    assert len(eight_bit._prepared) < count


@pytest.mark.parametrize(
    "fields",
    [{"keep": True}, {"inp_res": 256.0}, {"inp_res": 0.0}, {"weight_states": 255.0},
     {"noise_std": 0.1}, {"out_noise": 0.1}, {"range_mode": "none"}],
)  # fmt: skip
def test_what_is_no_eight_bit_inference(fields):
    assert not plan.eight_bit(Case({**EIGHT_BIT, **fields}).spec)
