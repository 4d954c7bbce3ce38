"""Integer products in a file: no kernel of any machine saturates on their operands."""

import numpy as np
import onnx
import onnx_cases as cases
import onnxruntime
import pytest
import torch
from torch import nn

import analogfx
from analogfx import export_onnx, load_onnx_sites


def bytes_config(states):
    return cases.config(
        forward__inp_res=254,
        forward__out_res=254,
        forward__out_bound=10,
        modifier__quantization_type="DiscretizePerChannel",
        modifier__res=states,
        mapping__max_input_size=40,
    )


PRODUCTS = {
    "linear, 2 tiles": (lambda: nn.Linear(64, 8), (4, 64)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), (2, 6, 9)),
}


def integer_operands(path, x):
    """Inputs by name of every integer product in a file, as it runs."""
    model = onnx.load(path)
    products = [n for n in model.graph.node if "Integer" in n.op_type or "QLinear" in n.op_type]
    known = {o.name for o in model.graph.output}
    if not products:
        return
    wanted = sorted({name for n in products for name in n.input} - known)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    feed = {model.graph.input[0].name: x.numpy()}
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(wanted, feed)
    values = dict(zip(wanted, found, strict=True))
    for node in products:
        names = {
            "MatMulInteger": ("x", "weight", "x_zero", "weight_zero"),
            "QLinearConv": ("x", "x_scale", "x_zero", "weight", "weight_scale", "weight_zero"),
        }[node.op_type]
        operands = {n: values[v] for n, v in zip(names, node.input, strict=False)}
        if node.op_type == "MatMulInteger":
            operands["weight"] = operands["weight"].T
        yield operands


def pmaddubsw(x, w):
    """x86's product of unsigned with signed bytes: pairs are added in 16 bits, saturating."""
    pairs = (x.astype(np.int32) * w).reshape(-1, 2).sum(1)
    return np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum()


@pytest.mark.parametrize("states", [14, 128, 130, 254])
@pytest.mark.parametrize("layer", PRODUCTS)
def test_no_kernel_saturates(layer, states, tmp_path):
    make, shape = PRODUCTS[layer]
    x = 4 * torch.randn(shape)
    analog = cases.analog(make, bytes_config(states), x)
    export_onnx(analog, (x,), tmp_path / "m", level="qdq")
    products = list(integer_operands(tmp_path / "m", x))
    (site,) = load_onnx_sites(tmp_path / "m").sites
    assert len(products) == site.tile_grid[0]
    written = []
    for operands in products:
        assert operands["x"].dtype == np.uint8 and operands["x_zero"] == 128
        weight = operands["weight"]
        flat = weight.reshape(len(weight), -1).astype(np.int32)
        if weight.dtype == np.uint8:  # kernels widen both before they multiply
            assert operands["weight_zero"] == 128
            written.append(flat - 128)
            continue
        assert weight.dtype == np.int8 and not operands.get("weight_zero", np.int8(0)).any()
        for row in np.sort(flat):
            for sign in (1, -1):  # the input that drives a row furthest
                driven = np.where(sign * row > 0, 255, 1).astype(np.uint8)
                assert pmaddubsw(driven, row) == driven.astype(np.int32) @ row
        written.append(flat.reshape(len(flat), 2 if states > 128 else 1, -1).sum(1))
    codes = site.codes()
    np.testing.assert_array_equal(np.concatenate(written, 1), codes.reshape(len(codes), -1))


@pytest.mark.parametrize("level", sorted(set(cases.LEVELS) - {"qdq"}))
def test_other_levels_multiply_no_integers(level, tmp_path):
    make, shape = PRODUCTS["conv"]
    x = torch.randn(shape)
    analog = cases.analog(make, bytes_config(254), x)
    export_onnx(analog, (x,), tmp_path / "m", level=level, verify=False)
    assert list(integer_operands(tmp_path / "m", x)) == []


def test_the_oracle_saturates():
    x, w = np.uint8([255, 255, 1, 1]), np.int32([65, 64, 127, 127])
    assert pmaddubsw(x, w) == (1 << 15) - 1 + 254


def warned(analog, x, tmp_path):
    with pytest.warns(UserWarning, match="no site of") as told:
        export_onnx(analog, (x,), tmp_path / "m", level="qdq", verify=False)
    (warning,) = told
    assert warning.filename == __file__
    return str(warning.message)


def test_a_file_without_integers_says_why(tmp_path):
    x = torch.randn(4, 64)

    def linear(**fields):
        discrete = {"modifier__quantization_type": "Discretize", "modifier__res": 254}
        config = cases.config(**discrete | {"forward__inp_res": 254} | fields)
        return cases.analog(lambda: nn.Sequential(nn.Linear(64, 8)), config, x)

    floats = linear(modifier__quantization_type="None")
    assert "0: its weights are floats" in warned(floats, x, tmp_path)
    assert "its range is dynamic" in warned(
        linear(pre_post__input_range__dynamic=True), x, tmp_path
    )
    assert "set forward.inp_res to at most 254" in warned(
        linear(forward__inp_res=1022), x, tmp_path
    )
    image = torch.randn(2, 4, 6, 6)
    no_adc = cases.config(modifier__quantization_type="Discretize", modifier__res=254,
                          forward__inp_res=254)  # fmt: skip
    conv = cases.analog(lambda: nn.Conv2d(4, 6, 3), no_adc, image)
    assert "set forward.out_bound" in warned(conv, image, tmp_path)


def test_the_table_counts_one_as_one(tmp_path):
    x = torch.randn(4, 16)
    analog = cases.analog(lambda: nn.Linear(16, 8), bytes_config(254), x)
    export_onnx(analog, (x,), tmp_path / "m", level="qdq", verify=False)
    assert "1 site on 1 tile, level qdq" in str(load_onnx_sites(tmp_path / "m"))
    assert str(load_onnx_sites(tmp_path / "m")).endswith("1 of 1 site multiplies integers")


@pytest.mark.parametrize("states", [14, 254])
@pytest.mark.parametrize("clip", ["None", "LearnablePerChannel"])
@pytest.mark.parametrize("kind", ["Discretize", "DiscretizePerChannel"])
def test_codes_stay_codes_after_quantize_weights(kind, clip, states, tmp_path):
    if (kind, clip) == ("Discretize", "LearnablePerChannel"):
        pytest.skip("the config is refused: learned clips are of channels")
    config = cases.config(
        forward__inp_res=254, forward__out_res=254, forward__out_bound=10, clip__type=clip,
        modifier__quantization_type=kind, modifier__res=states, mapping__max_input_size=40,
        mapping__max_output_size=5,
    )  # fmt: skip
    x = torch.randn(6, 64)
    analog = cases.analog(lambda: nn.Linear(64, 8), config, x)
    export_onnx(analog, (x,), tmp_path / "before", level="qdq", opset=21)
    analogfx.quantize_weights(analog)
    export_onnx(analog, (x,), tmp_path / "after", level="qdq", opset=21)  # warns of no floats
    (before,), (after,) = (load_onnx_sites(tmp_path / n).sites for n in ("before", "after"))
    assert after.integer and after.weight_type == before.weight_type
    np.testing.assert_array_equal(after.codes(), before.codes())
    np.testing.assert_allclose(after.scales(), before.scales(), rtol=3e-7)
    sizes = [(tmp_path / n).stat().st_size for n in ("before", "after")]
    assert sizes[1] < 1.02 * sizes[0]


@pytest.mark.parametrize(
    ("weight", "weight_type"),
    [(21 / 70, "int8"), (100 / 257, "float")],
    ids=["of 70 steps", "beside every grid of 8 bits"],
)
def test_only_weights_beside_every_grid_stay_floats(weight, weight_type, tmp_path):
    config = cases.config(forward__inp_res=254, forward__out_res=254, forward__out_bound=10)
    x = torch.randn(6, 64)
    analog = cases.analog(lambda: nn.Linear(64, 8), config, x)
    with torch.no_grad():
        analog.weight.copy_(torch.randint(-7, 8, (8, 64)) / 7)
        analog.weight[:, 0] = 1
        analog.weight[3, 5] = weight  # beside sevenths
    export_onnx(analog, (x,), tmp_path / "m", verify=False)
    (site,) = load_onnx_sites(tmp_path / "m").sites
    assert site.weight_type == weight_type
