import pytest
import torch
from compiled import FIXED, assert_same, report_of, step, twins
from samples import EVERYTHING, merged
from torch import nn

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIG = merged(EVERYTHING, FIXED, {"clip": {"type": "None"}})


class Loop(nn.Module):
    """A cell in a loop, as it is written by hand."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        h = None
        for row in x.unbind(0):
            h = self.cell(row, h)
        return h[0] if isinstance(h, tuple) else h


CELLS = {
    "LSTM": lambda: nn.LSTMCell(3, 4),
    "GRU": lambda: nn.GRUCell(3, 4),
    "RNN": lambda: nn.RNNCell(3, 4),
    "RNN, relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu", bias=False),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_compiled_cell_has_the_sites_and_numbers_of_an_analogized_one(name):
    torch.manual_seed(0)
    model, x = Loop(CELLS[name]()), torch.randn(4, 2, 3)
    twin, analog = twins(model, CONFIG)
    for seed in range(2):
        assert_same(step(twin, x, seed, update=False), step(analog, x, seed, update=False))
    assert set(report_of(twin)) == {"cell.weight_ih", "cell.weight_hh"}
    assert report_of(twin) == report_of(analog)
