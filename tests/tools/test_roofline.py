import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import roofline
from roofline import H200, Launch, Shape

SHAPE = Shape(rows=100, inputs=32, outputs=16)
X, W, Y, BIAS = 2 * 100 * 32, 2 * 32 * 16, 2 * 100 * 16, 2 * 16
PRODUCT = 2 * 100 * 32 * 16
SCALES = 4 * 16
MARKS = 7 * 1  # one for each 16 rows and 32 outputs
BITS = 100 * 2  # one for each of 16 outputs


def by_name(launches):
    """(bytes, operations) of every launch; one that comes twice is listed twice."""
    return [(launch.name, launch.bytes, launch.operations) for launch in launches]


def test_a_digital_step_by_hand():
    assert by_name(roofline.digital_step(SHAPE)) == [
        ("forward", 6400 + 1024 + 3200 + 32, 102_400),
        ("dX", X + W + Y, PRODUCT),
        ("dW", X + W + Y, PRODUCT),
        ("bias gradient", Y + BIAS, 0),
        ("SGD", 3 * (W + BIAS), 0),
    ]


@pytest.mark.parametrize("k", [1, 8])
def test_an_analog_step_by_hand(k):
    weights = [("row maxima", W + k * SCALES, 0), ("weight noise", 2 * W + k * SCALES, 0)]
    assert by_name(roofline.analog_step(SHAPE, k)) == [
        *weights,
        ("DAC", 2 * X, 0),
        ("forward", X + W + BIAS + Y + k * (SCALES + MARKS), PRODUCT),
        *weights,
        ("clipped outputs, none", k * (MARKS + BITS), 0),
        ("dX", Y + W + X, PRODUCT),
        ("clamp", 3 * X, 0),
        ("DAC", 2 * X, 0),
        ("dW", Y + X + W, PRODUCT),
        ("bias gradient", Y + BIAS, 0),
        ("SGD", 3 * (W + BIAS), 0),
        ("clip", 3 * W, 0),
    ]


def test_marks_and_bits_fill_whole_bytes():
    odd = Shape(100, 32, 33)
    one, two = (roofline.analog_step(odd, k) for k in (1, 2))
    forward, clipped = (two[i].bytes - one[i].bytes for i in (3, 6))
    assert forward == 4 * 33 + 7 * 2
    assert clipped == 7 * 2 + 100 * 5


def test_inference_by_hand():
    assert by_name(roofline.analog_forward(SHAPE, 8)) == [
        ("row maxima", W + 8 * SCALES, 0),
        ("DAC", 2 * X, 0),
        ("forward", X + W + BIAS + Y + 8 * SCALES, PRODUCT),
    ]
    dac, product = roofline.eight_bit_forward(SHAPE, 1)
    assert dac.bytes == 6400 + 3200
    assert product == Launch("forward", 3200 + 512 + 32 + 3200 + 2 * 64, PRODUCT, "int8")


def test_the_slower_of_memory_and_tensor_cores_counts():
    memory = Launch("", 43_000_000, 790_000_000)
    assert H200.seconds(memory) == pytest.approx(10e-6) and H200.is_memory_bound(memory)
    cores = Launch("", 4_300_000, 7_900_000_000)
    assert H200.seconds(cores) == pytest.approx(10e-6) and not H200.is_memory_bound(cores)
    assert H200.seconds(cores._replace(operands="int8")) == pytest.approx(5e-6)
    assert H200.total([memory, cores]) == pytest.approx(20e-6)


def test_a_large_product_of_an_h200_by_hand():
    (launch,) = roofline.digital_forward(Shape(8192, 4096, 4096))
    assert H200.seconds(launch) == pytest.approx(2 * 8192 * 4096 * 4096 / 790e12)  # 0.348 ms


def test_tables_give_every_ratio_to_its_own_digital_figure():
    header, *lines = roofline.totals(H200, [Shape(8192, 4096, 4096)])
    assert header[1] == "8192 rows, 4096 → 4096"
    cells = dict(lines)
    assert cells["forward, nn.Linear"] == "0.348 ×1.00"
    assert cells["step, nn.Linear"].endswith("×1.00")
    linear = H200.total(roofline.digital_step(Shape(8192, 4096, 4096)))
    ours = H200.total(roofline.analog_step(Shape(8192, 4096, 4096), 8))
    assert cells["step, 8 tiles"] == f"{1e3 * ours:.3f} ×{ours / linear:.2f}"


def test_every_launch_is_listed():
    lines = roofline.launches(H200, SHAPE)
    figures = roofline.paper_figures(SHAPE)
    assert len(lines) == 1 + sum(map(len, figures.values()))
    assert ["step, 1 tile", "clip", "0.0", "0.0", "0.0", "memory"] in lines
