import copy
import pickle

import pytest
import torch
from samples import EVERYTHING, clip, merged, mlp, ranged
from torch import nn

import analogfx
from analogfx import AnalogModule, TorchInferenceRPUConfig

TILED = merged(ranged(), {"mapping": {"max_input_size": 3}})


def made(module, config=TILED):
    return analogfx.analogize(module, config)


def test_layers_by_name_are_those_that_are_analog():
    model = nn.ModuleDict({"mlp": mlp(), "norm": nn.LayerNorm(4), "left": nn.Linear(4, 4)})
    analog = made(model, {"left": None, "*": TILED})
    named = dict(analogfx.named_analog_layers(analog))
    assert list(named) == ["mlp.first", "mlp.second"]
    assert list(analogfx.analog_layers(analog)) == list(named.values())
    assert all(isinstance(layer, AnalogModule) for layer in named.values())
    assert not isinstance(analog.left, AnalogModule) and not isinstance(analog, AnalogModule)


def test_layers_are_found_inside_wrappers():
    analog = nn.DataParallel(torch.compile(made(mlp())))
    assert [name for name, _ in analogfx.named_analog_layers(analog)] == ["first", "second"]
    assert list(analogfx.analog_layers(mlp())) == []


def test_a_config_is_a_copy_and_set_config_changes_it():
    layer = made(nn.Linear(8, 4))
    with torch.no_grad():
        layer.input_range.fill_(0.7)
    config = layer.rpu_config
    assert config == TorchInferenceRPUConfig.from_dict({"schema": 1, **TILED})
    config.forward.inp_res = 14
    assert layer.rpu_config.forward.inp_res == -1
    analogfx.set_config(layer, config)
    assert layer.rpu_config == config
    assert layer.input_range.tolist() == pytest.approx([0.7] * 3)


def test_assigning_a_config_says_what_would_do():
    layer = made(nn.Linear(8, 4))
    with pytest.raises(AttributeError, match="set_config"):
        layer.rpu_config = layer.rpu_config
    assert isinstance(layer.rpu_config, TorchInferenceRPUConfig)


def test_sizes_of_tiles():
    assert made(nn.Linear(8, 4)).in_sizes == [3, 3, 2]
    assert made(nn.Conv2d(2, 4, 2)).in_sizes == [3, 3, 2]
    assert made(nn.LSTM(4, 2)).in_sizes == {"weight_ih_l0": [2, 2], "weight_hh_l0": [2]}


class Occupied(nn.Linear):
    """A layer whose author used all of our names."""

    def __init__(self):
        super().__init__(8, 4)
        self.in_sizes = "a list of the author's"
        self.register_buffer("rpu_config", torch.ones(2))

    def get_weights_and_biases(self):
        return "the author's"

    @property
    def set_weights_and_biases(self):
        return "the author's, too"


def test_an_authors_names_stay_the_authors():
    for layer in (made(Occupied()), pickle.loads(pickle.dumps(made(Occupied())))):
        assert layer.in_sizes == "a list of the author's"
        assert layer.rpu_config.tolist() == [1, 1]
        assert layer.get_weights_and_biases() == "the author's"
        assert layer.set_weights_and_biases == "the author's, too"
        layer.in_sizes = 3
        assert layer.in_sizes == 3 and copy.deepcopy(layer).in_sizes == 3
        layer.rpu_config = torch.zeros(2)
        assert layer.state_dict()["rpu_config"].tolist() == [0, 0]
        assert analogfx.to_digital(layer).in_sizes == 3


def test_a_digital_layer_has_none_of_the_names():
    layer = analogfx.to_digital(made(nn.Linear(8, 4)))
    assert not hasattr(layer, "rpu_config") and not hasattr(layer, "in_sizes")


def test_weights_are_the_parameters_and_are_written_in_place():
    config = merged(EVERYTHING, clip("LearnablePerChannel"), {"mapping": {"max_input_size": 4}})
    layer = made(nn.Linear(8, 4), config)
    weight, bias = layer.get_weights_and_biases()
    assert weight is layer.weight and bias is layer.bias
    new = torch.randn(4, 8, dtype=torch.float64)
    layer.set_weights_and_biases(new, torch.arange(4))
    assert layer.weight is weight and layer.bias is bias
    assert torch.equal(weight, new.float()) and bias.tolist() == [0, 1, 2, 3]
    peaks = torch.stack([half.abs().amax(1) for half in new.float().split(4, 1)])
    assert torch.equal(layer.learnable_weight_clip, peaks)
    layer.set_weights_and_biases(new * 2)
    assert bias.tolist() == [0, 1, 2, 3]


def test_what_inference_kept_of_the_weights_is_made_anew():
    config = merged(ranged(init_from_data=0), {"forward": {"inp_res": 254}})
    config = merged(config, {"modifier": {"quantization_type": "Discretize", "res": 254}})
    layer, x = made(nn.Linear(8, 4), config).eval(), torch.randn(3, 8)
    with torch.no_grad():
        before = layer(x)
        layer.set_weights_and_biases(layer.weight * 2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (lambda: nn.Linear(8, 4), (torch.ones(8, 4),), r"weight has the shape \[4, 8\]"),
        (lambda: nn.Linear(8, 4, bias=False), (torch.ones(4, 8), torch.ones(4)), "bias has none"),
        (lambda: nn.Linear(8, 4), (torch.ones(4, 8), torch.ones(8)), "bias has the shape"),
    ],
)
def test_other_shapes_are_refused_and_nothing_is_written(make, values, message):
    layer = made(make())
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        layer.set_weights_and_biases(*values)
    assert torch.equal(layer.weight, before)


def test_a_layer_of_several_products_says_so():
    layer = made(nn.GRU(4, 2))
    with pytest.raises(
        TypeError, match=r"2 weights \(weight_ih_l0, weight_hh_l0\): read and write"
    ):
        layer.get_weights_and_biases()
