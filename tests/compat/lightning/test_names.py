import copy
import pickle

import pytest
import torch
from samples import COARSE, EVERYTHING, mlp
from torch import nn

import analogfx
from analogfx.compat import lightning

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.seq(x))


def test_conversion_is_that_of_analogize_with_lightnings_methods():
    digital = Net()
    analog = lightning.convert_to_analog(digital, COARSE).eval()
    assert torch.equal(analog(X), analogfx.analogize(digital, COARSE).eval()(X))
    assert isinstance(analog, Net) and isinstance(analog, lightning.AnalogWrapper)
    assert isinstance(analog.seq, lightning.AnalogSequential)
    assert isinstance(analog.head, lightning.AnalogLinear)
    assert not isinstance(analog.head, (lightning.AnalogConv2d, lightning.AnalogWrapper))
    assert [n for n, _ in analog.named_analog_layers()] == ["seq.0", "seq.2", "head"]
    assert len(list(analog.analog_layers())) == 3
    assert type(digital.head) is nn.Linear


def test_what_is_converted():
    class Own:
        @classmethod
        def from_digital(cls, module, rpu_config):
            return nn.Bilinear(module.in_features, 1, module.out_features)

    seen = []
    analog = lightning.convert_to_analog(
        Net(), COARSE, exclude_modules=["seq.0"], ensure_analog_root=False, module_name="net",
        specific_rpu_config_fun=lambda path, layer, config: seen.append(path) or config,
    )  # fmt: skip
    assert seen == ["net.seq.0", "net.seq.2", "net.head"]  # paths begin with the root's name
    seen.clear()
    analog = lightning.convert_to_analog(
        Net(), COARSE, exclude_modules=["seq"], ensure_analog_root=False,
        specific_rpu_config_fun=lambda path, layer, config: seen.append(path) or config,
    )  # fmt: skip
    assert seen == ["head"] and not isinstance(analog, lightning.AnalogWrapper)
    assert [n for n, _ in analogfx.named_analog_layers(analog)] == ["head"]
    analog = lightning.convert_to_analog(Net(), COARSE, conversion_map={})
    assert not list(analog.analog_layers()) and type(analog.seq) is nn.Sequential
    analog = lightning.convert_to_analog(Net(), COARSE, conversion_map={nn.Linear: Own})
    assert isinstance(analog.head, nn.Bilinear) and isinstance(analog.seq[2], nn.Bilinear)
    with pytest.raises(TypeError, match="expected a dict"):
        lightning.convert_to_analog(Net(), COARSE, conversion_map=[nn.Linear])


def test_a_config_of_its_own_for_each_layer():
    def specific(path, layer, config):
        if path == "head":
            config["forward"]["inp_res"] = 14
        return config

    analog = lightning.convert_to_analog(Net(), COARSE, specific_rpu_config_fun=specific)
    assert analog.head.rpu_config.forward.inp_res == 14
    assert analog.seq[0].rpu_config.forward.inp_res == 6


def test_in_place_and_back():
    model = Net()
    assert lightning.convert_to_analog(model, COARSE, inplace=True) is model
    digital = lightning.convert_to_digital(model)
    kinds = [type(m) for m in digital.modules()]
    assert kinds == [Net, nn.Sequential, nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert isinstance(model.head, lightning.AnalogLinear)
    assert lightning.convert_to_digital(model, set(), inplace=True) is model
    assert isinstance(model.head, lightning.AnalogLinear)
    lightning.convert_to_digital(model, {lightning.AnalogLinear}, inplace=True)
    assert type(model.head) is nn.Linear
    with pytest.raises(TypeError, match="expected a set"):
        lightning.convert_to_digital(model, [])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_names(copied):
    analog = lightning.convert_to_analog(Net(), EVERYTHING).eval()
    twin = copied(analog)
    assert torch.equal(twin(X), analog(X)) and isinstance(twin, lightning.AnalogWrapper)
    assert isinstance(twin.seq, lightning.AnalogSequential)
    assert torch.equal(twin.head(inp=X[:, :4]), analog.head(X[:, :4]))


def test_the_inputs_keyword_compiles():
    layer = lightning.AnalogLinear(8, 4, rpu_config=COARSE).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inp=X), layer(X)) and torch.equal(layer(inp=X), layer(input=X))


@pytest.mark.parametrize(
    ("made", "digital", "size"),
    [
        (lightning.AnalogLinear(8, 4, True, None, None, COARSE), nn.Linear, (8,)),
        (lightning.AnalogConv1d(2, 3, 2, rpu_config=COARSE), nn.Conv1d, (2, 5)),
        (lightning.AnalogConv2d(2, 3, [2, 1], rpu_config=COARSE), nn.Conv2d, (2, 5, 5)),
        (lightning.AnalogConv3d(2, 3, 2, rpu_config=COARSE), nn.Conv3d, (2, 4, 4, 4)),
    ],
)
def test_layers(made, digital, size):
    kind = getattr(lightning, f"Analog{digital.__name__}")
    assert isinstance(made, kind) and isinstance(made, digital)
    x, back = torch.randn(3, *size), kind.to_digital(made)
    assert type(back) is digital and torch.equal(back.weight, made.weight)
    again = kind.from_digital(back, COARSE)
    assert torch.equal(again.eval()(x), made.eval()(x))
    made.set_weights(torch.zeros_like(made.weight))
    assert not torch.equal(again(x), made(x))
    assert list(made.analog_layers()) == [made]


def test_recurrent_layers():
    cell, made = lightning.AnalogGRUCell, lightning.AnalogRNN
    layer = made(cell, 8, 4, 2, bidir=True, xavier=True, rpu_config=COARSE)
    assert isinstance(layer, made) and isinstance(layer, nn.GRU)
    assert not any(layer.bias_ih_l1_reverse) and layer(torch.randn(3, 2, 8))[0].shape == (3, 2, 8)
    with pytest.raises(TypeError, match="expected AnalogLSTMCell"):
        made(nn.LSTM, 8, 4, rpu_config=COARSE)


def test_misuse():
    with pytest.raises(ValueError, match="rpu_config = None"):
        lightning.AnalogLinear(8, 4)
    with pytest.raises(TypeError, match="AnalogLinear is a name"):

        class Mine(lightning.AnalogLinear):
            pass


def test_the_optimizer_clips_after_each_step_and_a_tied_weight_once():
    config = {"clip": {"type": "LayerGaussian", "sigma": 1.0}}
    digital = mlp()
    analog = lightning.convert_to_analog(digital, config)
    optimizer = lightning.AnalogOptimizer(
        torch.optim.SGD, analog.analog_layers, analog.parameters(), lr=0.0
    )
    assert type(optimizer) is torch.optim.SGD
    analog(X).sum().backward()
    optimizer.step()
    bound = digital.first.weight.std()
    torch.testing.assert_close(analog.first.weight, digital.first.weight.clamp(-bound, bound))

    layer = nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.weight = layer.weight
    tied = lightning.convert_to_analog(nn.Sequential(layer, twin), config)
    optimizer = lightning.AnalogOptimizer(
        torch.optim.SGD, tied.analog_layers, tied.parameters(), lr=0.0
    )
    optimizer.step()
    bound = layer.weight.std()
    torch.testing.assert_close(tied[1].weight, layer.weight.clamp(-bound, bound))


def test_a_clip_without_a_bound_is_a_named_error_in_the_step():
    analog = lightning.convert_to_analog(mlp(), {"clip": {"type": "LayerGaussian"}})
    optimizer = lightning.AnalogOptimizer(
        torch.optim.SGD, analog.analog_layers, analog.parameters(), lr=0.1
    )
    with pytest.raises(ValueError, match=r"clip\.sigma = -1\.0"):
        optimizer.step()


@pytest.mark.parametrize("start", [{"forward": {}}, COARSE])
def test_calibration(start):
    kinds = lightning.InputRangeCalibrationType
    analog = lightning.convert_to_analog(mlp(), start)
    batches = [((X,), {})]
    result = lightning.calibrate_input_ranges(analog, kinds.MAX, batches, verbose=False)
    assert result.method == "max"
    assert analog.first.input_range.tolist() == [X.abs().max().item()]
    layer = lightning.AnalogLinear(8, 4, rpu_config=start)
    lightning.calibrate_input_ranges(layer, kinds.MAX, iter([((), {"inp": X})]), verbose=False)
    assert layer.input_range.tolist() == [X.abs().max().item()]
    with pytest.raises(analogfx.errors.CalibrationError, match="expected a method"):
        lightning.calibrate_input_ranges(analog, kinds.NONE, batches)
