"""Parts of one layer, computed one after another, make the layer."""

from types import SimpleNamespace

import torch
from samples import merged, ranged
from torch import nn

import analogfx
from analogfx.kernels.part import Part
from analogfx.modules.capture import default_pattern
from analogfx.modules.program import build
from analogfx.passes.take_part import Share

CONFIG = merged(
    ranged(init_value=1.0, init_from_data=0),
    {
        "forward": {"inp_res": 14, "out_res": 30, "out_bound": 2.0},
        "mapping": {"max_input_size": 4},
        "clip": {"type": "LayerGaussianPerChannel", "sigma": 2.5},
    },
)


def part_of(model, share, rows, columns, tiles):
    """The output of a part of a layer, without its bias."""
    config = model._analog.resolved
    program = build(model, config, False, default_pattern(model), share=share)
    own = SimpleNamespace(
        weight=model.weight[rows, columns].contiguous(),
        bias=torch.zeros(6).double()[rows],
        input_range=model.input_range[tiles],
        _analog=model._analog,
    )
    return lambda x: program.fused(own, x[:, columns])


def test_parts_along_inputs_add_up_and_along_outputs_stand_side_by_side():
    torch.manual_seed(0)
    model = analogfx.analogize(nn.Linear(8, 6).double(), CONFIG).eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = model(x) - model.bias
    every = slice(None)
    halves = []
    for tile in (0, 1):
        share = Share(Part(6, 8, 0, 4 * tile, tile, 0, 1), (4,), (6,), "", "")
        own = slice(4 * tile, 4 * tile + 4)
        halves.append(part_of(model, share, every, own, slice(tile, tile + 1))(x))
    torch.testing.assert_close(halves[0] + halves[1], expected)
    sides = []
    for row in (0, 3):
        share = Share(Part(6, 8, row, 0, 0, 0, 1), (4, 4), (3,), "", "")
        sides.append(part_of(model, share, slice(row, row + 3), every, every)(x))
    torch.testing.assert_close(torch.cat(sides, dim=1), expected)
