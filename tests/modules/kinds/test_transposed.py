import copy

import onnx_cases as cases
import onnx_compare
import pytest
import torch
from samples import EVERYTHING, IDENTITY, TILES, merged
from torch import nn

import analogfx
from analogfx import chip

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LAYERS = {
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5), (10,)),
    "2d": (lambda: nn.ConvTranspose2d(4, 3, (3, 2), (2, 3), bias=False), (4, 5, 3), (12, 10)),
    "3d": (lambda: nn.ConvTranspose3d(4, 2, 2, (2, 1, 2), dilation=(1, 2, 1)), (2, 4, 2, 3, 2),
           (5, 5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_the_sizes_that_they_are_asked_for_are_torchs(name):
    make, shape, size = LAYERS[name]
    digital = make().double()
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    x = torch.randn(shape, dtype=torch.float64)
    for arguments in ((), (list(size),)):
        results = []
        for module in (digital, analog):
            inputs = x.clone().requires_grad_()
            y = module(inputs, *arguments)
            module.zero_grad()
            y.square().sum().backward()
            results.append((y, inputs.grad, *(p.grad for p in module.parameters())))
        torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
    assert results[0][0].shape[-len(size) :] == size
    with pytest.raises(ValueError, match="requested an output size"):
        analog(x, [999] * len(size))


def decoder():
    return nn.Sequential(
        nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)
    )


X = torch.randn(2, 4, 4, 4)


def test_copies_checkpoints_chips_and_the_way_back(tmp_path):
    analog = analogfx.analogize(decoder(), merged(EVERYTHING, TILES))
    digital = analogfx.to_digital(analog)
    analog(X).sum().backward()
    exact = analog.eval()(X)
    analogfx.save(analog, tmp_path)
    for twin in (copy.deepcopy(analog), analogfx.load(decoder(), tmp_path).eval()):
        assert torch.equal(twin(X), exact)
    with analogfx.program(analog, chip.AdditiveNoiseModel(0.0)).at(0):
        torch.testing.assert_close(analog(X), exact)
    assert type(digital[0]) is nn.ConvTranspose2d
    torch.testing.assert_close(digital(X), analogfx.analogize(digital, IDENTITY)(X))


def test_weights_are_clipped_where_they_are():
    config = merged({"clip": {"type": "LayerGaussian", "sigma": 1.0}})
    analog = analogfx.analogize(decoder(), config)
    optimizer = torch.optim.SGD(analog.parameters(), lr=1e-9)
    analogfx.clip_after_step(optimizer, analog)
    bound = analog[0].weight.std().item()
    analog(X).sum().backward()
    optimizer.step()
    assert analog[0].weight.abs().max().item() == pytest.approx(bound, rel=1e-5)


def test_a_decoder_is_exported_to_onnx(tmp_path):
    analog = cases.analog(decoder, cases.CONFIGS["int8"], X)
    analogfx.export_onnx(analog, (X,), tmp_path / "decoder.onnx")
    for x in (X, torch.randn(3, 4, 4, 4)):
        onnx_compare.compare(tmp_path / "decoder.onnx", analog, [x])


def test_compiled_it_is_one_graph():
    analog = analogfx.analogize(decoder(), EVERYTHING).eval()
    compiled = torch.compile(
        analog, backend="analogfx", options={"compiler": "aot_eager"}, fullgraph=True
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), analog(X))


def test_a_bilinear_layer_and_its_gradients_are_torchs():
    digital = nn.Bilinear(3, 4, 2).double()
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    x, y = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    results = []
    for module in (digital, analog):
        out = module(x, y)
        out.square().sum().backward()
        results.append((out, *(p.grad for p in module.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
    (site,) = analogfx.report(analog).sites
    assert (site.kind, site.weight_shape) == ("bilinear", (2 * 3, 4))
