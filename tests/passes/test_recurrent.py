import pytest
import torch
from compiled import FIXED, assert_same, compiled, evaluated, report_of, step, twins
from samples import EVERYTHING, IDENTITY, merged
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import analogfx
from analogfx.passes.recurrent import Even, Layers, Packed, run

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

CONFIG = merged(EVERYTHING, FIXED, {"clip": {"type": "None"}})


class First(nn.Module):
    """A recurrent layer's outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
    "LSTM, projected": lambda: nn.LSTM(3, 4, proj_size=2),
    "GRU": lambda: nn.GRU(3, 4, 2, bias=False),
    "RNN": lambda: nn.RNN(3, 4, bidirectional=True),
    "RNN, relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_has_the_sites_and_numbers_of_an_analogized_one(name):
    torch.manual_seed(0)
    model, x = First(LAYERS[name]()), torch.randn(4, 2, 3)
    twin, analog = twins(model, CONFIG)
    for seed in range(2):
        assert_same(step(twin, x, seed, update=False), step(analog, x, seed, update=False))
    assert report_of(twin) == report_of(analog)
    assert_same(evaluated(twin, x), evaluated(analog, x), exact=False)
    assert not torch.equal(evaluated(twin, x), evaluated(model, x))


def test_sequences_of_other_lengths_get_graphs_of_their_own():
    model = First(nn.GRU(3, 4)).eval()
    twin, analog = twins(model, CONFIG)
    for length in (4, 6, 3, 6):
        x = torch.randn(length, 2, 3)
        assert_same(evaluated(twin, x), evaluated(analog, x), exact=False)
    assert {status for status, _ in report_of(twin).values()} == {"analog"}


def test_packed_sequences_stay_digital_in_a_graph_and_the_report_says_so():
    class Packs(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.layer = nn.Linear(3, 3), nn.LSTM(3, 4)

        def forward(self, x):
            packed = pack_padded_sequence(self.up(x), torch.tensor([4, 2]))
            return self.layer(packed)[1][0]

    model = Packs().eval()
    twin = compiled(model, IDENTITY)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(evaluated(twin, x), model(x).detach())
    found = report_of(twin)
    assert found["up"][0] == "analog"
    assert found["layer.weight_hh_l0"][0] == found["layer.weight_ih_l0"][0] == "digital"
    assert len(found["layer.weight_hh_l0"][1]) > 20
    assert analogfx.report(analogfx.analogize(model, IDENTITY)).coverage == 1.0


class Recorded:
    """Products by two fixed matrices, and what they were asked for."""

    def __init__(self, apart):
        self.weights = torch.randn(4, 3), torch.randn(4, 4)
        self.asked, self._apart = [], apart

    def __call__(self, number, x):
        self.asked.append((number, tuple(x.shape)))
        return x @ self.weights[number].T

    def apart(self, number):
        return self._apart

    def whole(self, *args):
        return None


@pytest.mark.parametrize("apart", [False, True])
def test_the_inputs_of_all_steps_are_one_product_unless_it_makes_a_difference(apart):
    products = Recorded(apart)
    x, h = torch.randn(3, 2, 3), torch.zeros(1, 2, 4)
    layers = Layers("rnn_tanh", 1, False, False, 0.0)
    y, _ = run(layers, products, x, Even(3), (h,))
    of_x = [shape for number, shape in products.asked if number == 0]
    assert of_x == (3 * [(2, 3)] if apart else [(3, 2, 3)])
    for t in range(3):
        h = torch.tanh(x[t] @ products.weights[0].T + h @ products.weights[1].T)
        torch.testing.assert_close(y[t], h[0])


def test_a_packed_step_multiplies_only_what_goes_on():
    products = Recorded(True)
    layers = Layers("rnn_tanh", 1, True, False, 0.0)
    products.weights = products.weights * 2
    h = torch.zeros(2, 3, 4)
    run(layers, products, torch.randn(6, 3), Packed([3, 2, 1]), (h,))
    of_h = [(number, shape[0]) for number, shape in products.asked if number % 2]
    assert of_h == [(1, 3), (1, 2), (1, 1), (3, 1), (3, 2), (3, 3)]
