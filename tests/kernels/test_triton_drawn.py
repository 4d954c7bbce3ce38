"""Sites drawn at random, with blocks drawn at random, against torch in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_cases import Case, assert_as_good, data, oracle, run

from analogfx.kernels import plan
from analogfx.kernels.triton import blocks, linear
from analogfx.kernels.triton.blocks import Blocks

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]

BLOCKS = [None, Blocks(16, 64, 16, 4, 1), Blocks(32, 64, 32, 4, 1)]


def one(*values):
    return st.sampled_from(values)


@st.composite
def cases(draw):
    """A site and its data. Odd ADC resolutions: no output rounds to its bound, a gradient's tie."""
    inputs = draw(one(1, 2, 5, 13, 16, 17, 33))
    tiles = draw(one(*(k for k in (1, 2, 3, 9) if k <= inputs)))
    size, larger = divmod(inputs, tiles)
    outputs = draw(one(1, 3, 8, 9, 17, 33, 70))
    cut = draw(st.integers(0, outputs - 1))
    fields = {"range_mode": draw(one("none", "static", "fast", "dynamic")), "keep": draw(one(0, 1))}
    if fields["range_mode"] == "static":
        fields |= {"decay": draw(one(0.0, 0.01)), "input_min_percentage": draw(one(0.3, 0.95))}
    if fields["range_mode"] != "none":
        fields["inp_res"] = draw(one(0.0, 30.0, 254.0, 6.0, 0.1, 2046.0, 5000.0))
        fields |= draw(one({}, {"out_noise": 0.1}, {"out_noise": 0.1, "out_noise_per_channel": 1}))
        if draw(st.booleans()):
            fields |= {"out_bound": draw(one(0.3, 0.7, 3.0)), "out_res": draw(one(0.0, 61.0, 7.0))}
            fields["bound_per_channel"] = draw(one(0, 1))
    fields |= draw(one({}, {"weight_states": 14.0}, {"weight_states": 13.0}))
    fields |= draw(one({}, {"noise_std": 0.1}, {"noise_std": 0.1, "noise_per_channel": 1}))
    return Case(
        fields,
        (*[size + 1] * larger, *[size] * (tiles - larger)),
        outputs,
        (cut, outputs - cut) if cut else (),
        draw(one((5,), (), (2, 3), (18,), (0,), (1,))),
        bias=draw(st.booleans()),
        clip=draw(st.booleans()),
        layout=draw(one("contiguous", "every second", "transposed", "expanded")),
        dtypes=(draw(one(torch.float32, torch.float32, torch.bfloat16, torch.float16)),),
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), tile=one(*BLOCKS), reused=one(0, 4, 99), small=st.booleans())
def test_it_is_as_exact_as_torch(case, tile, reused, small):
    (dtype,) = case.dtypes
    d = data(case, dtype)
    with pytest.MonkeyPatch.context() as patched:
        if tile is not None:
            patched.setattr(blocks, "choose", lambda *_: tile)
        if small:
            for name, value in (("ELEMENTS", 16), ("ROWS", 2), ("COLUMNS", 8)):
                patched.setattr(blocks, name, value)
            patched.setattr(plan, "FEW", 0)
        patched.setattr(plan, "REUSED", reused)
        found = run(linear, case, d)
    assert_as_good(found, *oracle(case, d, dtype), dtype)
