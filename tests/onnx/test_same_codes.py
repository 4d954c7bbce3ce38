"""Integer-exact sites: a file gives the bits of PyTorch at every level, on outputs at ties, too."""

import onnx
import onnx_cases as cases
import onnx_compare
import pytest
import torch
from torch import nn

from analogfx import export_onnx

LAYERS = {
    "linear": (lambda: nn.Linear(64, 8), (600, 64)),
    "deep": (lambda: nn.Linear(2200, 4), (8, 2200)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (8, 4, 16, 16)),
    "deep conv": (lambda: nn.Conv2d(130, 4, 3), (1, 130, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (8, 4, 16, 16)),
}


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("states", [14, 254])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_bit_is_the_same(layer, states, per_row, tmp_path):
    """Per row weight and bound have the same maxima; else the scales hold their ratio."""
    make, shape = LAYERS[layer]
    tiles = {} if "deep" in layer else {"mapping__max_input_size": 40}
    config = cases.config(
        forward__inp_res=254,
        forward__out_res=254,
        forward__out_bound=12,
        modifier__quantization_type="DiscretizePerChannel",
        modifier__res=states,
        clip__type="LearnablePerChannel" if per_row else "None",
        **tiles,
    )
    torch.manual_seed(1)
    x = torch.randn(shape)
    analog = cases.analog(make, config, x)
    expected = analog(x).detach()
    for level in cases.LEVELS:
        path = tmp_path / f"{level}.onnx"
        export_onnx(analog, (x,), path, level=level, opset=21)
        model = onnx.load(path)
        feed = {model.graph.input[0].name: x.numpy()}
        runs = [onnx_compare.onnx_runtime]
        if not ((level == "qdq" and "conv" in layer) or layer == "grouped"):
            runs.append(onnx_compare.reference_evaluator)
        if level == "fused":
            runs.append(onnx_compare.backend)
        for run in runs:
            (found,) = run(model, feed)
            assert torch.equal(torch.from_numpy(found), expected), (level, run.__name__)
