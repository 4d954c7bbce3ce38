import copy
import functools

import onnx_cases as cases
import onnx_compare
import pytest
import torch
from samples import EVERYTHING, IDENTITY, TILES, merged
from torch import nn

import analogfx
from analogfx import chip

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = torch.randn(3, 5, 8)
MEMORY = torch.randn(3, 4, 8)


def layers(**options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True} | options
    return {
        "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, **options), 2),
        "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, **options), 2),
        "both": nn.Transformer(8, 2, 1, 1, 16, **options),
    }


CALLS = {
    "encoder": lambda m: m(X, mask=nn.Transformer.generate_square_subsequent_mask(5)),
    "decoder": lambda m: m(X, MEMORY, tgt_is_causal=False),
    "both": lambda m: m(X, MEMORY, src_key_padding_mask=torch.zeros(3, 5).bool()),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("training", [True, False])
def test_torchs_transformers_and_their_gradients_are_what_they_were(name, training):
    digital = layers()[name].train(training)
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    results = []
    for model in (digital, analog):
        out = CALLS[name](model)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0])
    sites = [s.name for s in analogfx.report(analog).sites]
    attentions = sum(isinstance(m, nn.MultiheadAttention) for m in analog.modules())
    assert sum(".out_proj" in s for s in sites) == attentions  # once each, not twice
    assert sum(s.endswith("in_proj_weight") for s in sites) == 3 * attentions


def test_dropout_is_drawn_as_in_torch():
    digital = nn.MultiheadAttention(8, 2, dropout=0.4)
    analog = analogfx.analogize(digital, IDENTITY)
    outputs = []
    for model in (digital, analog):
        torch.manual_seed(5)
        outputs.append(model(X, X, X))
    torch.testing.assert_close(outputs[1], outputs[0])


def noisy():
    digital = nn.MultiheadAttention(8, 2, batch_first=True)
    return analogfx.analogize(digital, merged(EVERYTHING, TILES))


def called(model, seed=3):
    torch.manual_seed(seed)
    return model(X, MEMORY, MEMORY)[0]


def test_copies_and_state_dicts_give_the_same_numbers():
    analog = noisy()
    called(analog).sum().backward()
    twin = copy.deepcopy(analog)
    other = noisy()
    other.load_state_dict(analog.state_dict())
    assert torch.equal(called(twin), called(analog))
    assert not torch.equal(called(twin), called(analog, seed=4))
    for model in (twin, analog, other):
        model.eval()
    other.load_state_dict(analog.state_dict())
    assert torch.equal(called(other), called(analog))


def test_back_to_digital_it_is_torchs_own():
    digital = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    back = analogfx.to_digital(analogfx.analogize(digital, EVERYTHING))
    assert type(back) is nn.MultiheadAttention
    assert back.state_dict().keys() == digital.state_dict().keys()
    assert torch.equal(called(back), called(digital))


def test_a_saved_one_is_loaded(tmp_path):
    analog = noisy()
    called(analog)
    analogfx.save(analog.eval(), tmp_path)
    loaded = analogfx.load(nn.MultiheadAttention(8, 2, batch_first=True), tmp_path)
    assert torch.equal(called(loaded.eval()), called(analog))


def test_a_chip_holds_its_four_matrices():
    analog = noisy()
    called(analog)
    exact = called(analog.eval())
    device = analogfx.program(analog, chip.AdditiveNoiseModel(0.0))
    assert [tuple(w.shape) for w in device.weights(0).values()] == [(8, 8)] * 4
    with device.at(0):
        torch.testing.assert_close(called(analog), exact)
    with analogfx.program(analog, chip.AdditiveNoiseModel(0.1)).at(0):
        assert not torch.allclose(called(analog), exact, atol=1e-3)


def test_compiled_it_is_one_graph():
    analog = analogfx.analogize(layers()["encoder"].layers[0], EVERYTHING).eval()
    compiled = torch.compile(analog, backend="analogfx", options={"compiler": "eager"},
                             fullgraph=True)  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), analog(X))


def test_nested_tensors_are_refused_by_name():
    analog = analogfx.analogize(nn.MultiheadAttention(8, 2, batch_first=True).eval(), EVERYTHING)
    with pytest.warns(UserWarning, match="nested"):
        x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    with torch.no_grad(), pytest.raises(TypeError, match="nested"):
        analog(x, x, x, need_weights=False)


def test_an_encoder_layer_is_exported_to_onnx(tmp_path):
    layer = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True)
    analog = cases.analog(layer, cases.CONFIGS["int8"], X)
    analogfx.export_onnx(analog, (X,), tmp_path / "encoder.onnx")
    for x in (X, torch.randn(2, 7, 8)):
        onnx_compare.compare(tmp_path / "encoder.onnx", analog, [x])
    assert len(analogfx.onnx.load_onnx_sites(tmp_path / "encoder.onnx").sites) == 6
