import pytest
import torch
from samples import EVERYTHING, IDENTITY
from torch import nn

import analogfx

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = {
    "LSTM": lambda **o: nn.LSTMCell(3, 4, dtype=torch.float64, **o),
    "GRU": lambda **o: nn.GRUCell(3, 4, dtype=torch.float64, **o),
    "RNN": lambda **o: nn.RNNCell(3, 4, dtype=torch.float64, **o),
    "RNN, relu": lambda **o: nn.RNNCell(3, 4, nonlinearity="relu", dtype=torch.float64, **o),
}


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_an_ideal_cell_is_torchs(name, bias, shape):
    torch.manual_seed(0)
    digital, x = CELLS[name](bias=bias), torch.randn(shape, dtype=torch.float64)
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    outputs = []
    for cell in (digital, analog):
        state = cell(x)
        again = cell(x, state)
        assert isinstance(again, tuple) == (name == "LSTM")
        last = again[0] if name == "LSTM" else again
        grads = torch.autograd.grad(last.square().sum(), list(cell.parameters()))
        outputs.append((state, again, grads))
    torch.testing.assert_close(*outputs)


def test_both_weights_are_sites_with_ranges_of_their_own():
    analog = analogfx.analogize(nn.LSTMCell(3, 4), EVERYTHING)
    assert [s.name for s in analogfx.report(analog).sites] == ["weight_ih", "weight_hh"]
    assert {"input_range_ih", "input_range_hh"} <= dict(analog.named_parameters()).keys()
    assert analogfx.to_digital(analog).state_dict().keys() == nn.LSTMCell(3, 4).state_dict().keys()


def test_a_cell_computes_what_the_layer_does_in_every_time_step():
    torch.manual_seed(0)
    layer, cell = nn.GRU(3, 4), nn.GRUCell(3, 4)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.copy_(getattr(layer, f"{name}_l0"))
    config = {"pre_post": {"input_range": {"enable": True}}, "forward": {"inp_res": 6}}
    layer, cell = (analogfx.analogize(m, config) for m in (layer, cell))
    x, h, outputs = torch.randn(5, 2, 3), None, []
    for t in range(5):
        h = cell(x[t], h)
        outputs.append(h)
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs))
    torch.testing.assert_close(layer.input_range_hh_l0, cell.input_range_hh)
