import pytest
import torch
from torch import nn

import analogfx
from analogfx.evaluation import programmed
from analogfx.modules.sites import sites


def config(max_input_size=-1):
    return analogfx.TorchInferenceRPUConfig(
        mapping=analogfx.MappingParameter(max_input_size=max_input_size)
    )


def noise_of(layer, std_dev=0.1, seed=0):
    """An analogized layer's weight (O, I), and what programming adds to it, read off products."""
    exact = layer.weight.detach().flatten(1)
    size, groups = exact.shape[1], getattr(layer, "groups", 1)
    eye = torch.eye(size, dtype=exact.dtype)
    if groups > 1 or layer.weight.dim() > 2:  # each patch of the image is one unit vector
        channels, *kernel = layer.weight.shape[1:]
        x = eye.view(size, channels, *kernel).repeat(1, groups, *[1] * len(kernel))
    else:
        x = eye
    with torch.no_grad(), programmed(layer, std_dev, seed):
        out = layer(x).flatten(1) - layer.bias
    return exact, out.T - exact


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Flatten(), nn.Linear(8, 4))
    return analogfx.analogize(model, config()).eval()


@pytest.mark.parametrize(
    ("layer", "tiles"),
    [
        (nn.Linear(1000, 64), -1),
        (nn.Linear(1000, 64), 400),
        (nn.Conv2d(96, 64, 3, groups=2), 200),
        (nn.Conv1d(100, 64, 10, dtype=torch.float64), 400),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_noise_is_gaussian_and_scales_with_the_row_of_the_tile(layer, tiles):
    with torch.no_grad():
        # Rows and tiles of very different size, so that another maximum would show.
        layer.weight *= torch.logspace(0, 2, 64).view(-1, *[1] * (layer.weight.dim() - 1))
        layer.weight.flatten(1)[:, 300:] *= 10
    layer = analogfx.analogize(layer, config(tiles)).eval()
    ((_, _, site),) = sites(layer)

    exact, noise = noise_of(layer, 0.1)

    assert len(site.in_sizes) == (1 if tiles < 0 else -(-exact[0].numel() // tiles))
    pieces = zip(*(m.flatten(1).split(site.in_sizes, 1) for m in (exact, noise)), strict=True)
    for weight, added in pieces:
        normal = added / (0.1 * weight.abs().amax(1, keepdim=True))
        # Five standard errors of a moment's estimate.
        count = normal.numel()
        assert abs(normal.mean()) < 5 / count**0.5
        assert abs(normal.std() - 1) < 5 / (2 * count) ** 0.5
        assert abs(normal.pow(4).mean() - 3) < 5 * (96 / count) ** 0.5


def test_no_weight_is_written(network):
    before, x = snapshot(network), torch.ones(2, 3, 3, 3)
    clean = network(x)
    with programmed(network, 0.3):
        assert_same_bits(network, before)
        assert not torch.equal(network(x), clean)
    assert torch.equal(network(x), clean)


def test_an_exception_leaves_nothing_behind(network):
    x = torch.ones(2, 3, 3, 3)
    clean = network(x)
    with pytest.raises(KeyError), programmed(network, 0.3):
        raise KeyError
    assert torch.equal(network(x), clean)


def test_biases_and_digital_weights_stay_exact():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    analog = analogfx.analogize(model, {"0": config(), "1": None}).eval()
    x = torch.randn(3, 4)
    with programmed(analog, 0.3):
        assert torch.equal(analog[0](torch.zeros(3, 4)), analog[0].bias.expand(3, 4))
        assert torch.equal(analog[1](x), model[1](x))
        assert not torch.equal(analog[0](x), model[0](x))


def test_seed_reproduces_and_none_is_fresh(network):
    def outputs(seed):
        with programmed(network, 0.1, seed):
            return network(torch.ones(2, 3, 3, 3))

    assert torch.equal(outputs(1), outputs(1))
    assert not torch.equal(outputs(1), outputs(2))
    assert not torch.equal(outputs(None), outputs(None))


def test_global_generator_is_left_alone(network):
    before = torch.get_rng_state()
    for seed in (None, 3):
        with programmed(network, 0.1, seed):
            pass
    assert torch.equal(torch.get_rng_state(), before)


def test_zero_noise_changes_nothing(network):
    x = torch.randn(2, 3, 3, 3)
    clean = network(x)
    with programmed(network, 0.0):
        torch.testing.assert_close(network(x), clean)


def test_a_tied_weight_is_on_two_tiles():
    first, second = nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False)
    second.weight = first.weight
    analog = analogfx.analogize(nn.Sequential(first, second), config()).eval()
    eye = torch.eye(50)
    with torch.no_grad(), programmed(analog, 0.1, seed=0):
        noise = [analog[i](eye).T - first.weight for i in (0, 1)]
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in noise]))[0, 1]) < 5 / 50


def test_what_else_reads_a_weight_reads_the_exact_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    analog = analogfx.analogize(Tied(), config()).eval()
    ids = torch.arange(6)
    with programmed(analog, 0.3):
        assert torch.equal(analog.embedding(ids), analog.head.weight)
        assert not torch.equal(analog(ids), analog.head.weight @ analog.head.weight.T)


class Chunks(nn.Module):
    """Two products with parts of one parameter, the second by way of a copy."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        first, second = self.weight.chunk(2)
        return x @ first.t(), torch.matmul(x, second.t().reshape(6, 4))


def test_parts_of_a_parameter_are_all_perturbed():
    analog = analogfx.analogize(Chunks(), config()).eval()
    assert len(list(sites(analog))) == 2
    with torch.no_grad(), programmed(analog, 0.1, seed=0):
        products = analog(torch.eye(6))
    noise = torch.cat([p.T for p in products]) - analog.weight
    assert noise.ne(0).all()
    assert noise.abs().max() < 0.1 * 6 * analog.weight.abs().max()


def test_a_computed_weight_is_perturbed():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(3 * torch.randn(4, 5))

        def forward(self, x):
            return x @ self.weight.clamp(-1, 1).T

    analog = analogfx.analogize(Clamped(), config()).eval()
    with torch.no_grad(), programmed(analog, 0.1, seed=0):
        noise = analog(torch.eye(5)).T - analog.weight.clamp(-1, 1)
    assert noise.ne(0).all() and noise.abs().max() < 0.6


def test_training_is_refused(network):
    network.train()
    x = torch.ones(2, 3, 3, 3)
    with pytest.raises(RuntimeError, match="a programmed chip does not train"):  # noqa: SIM117
        with programmed(network, 0.1):
            network(x)
    network(x).sum().backward()
    assert network[2].weight.grad is not None


def test_negative_noise_is_refused(network):
    with pytest.raises(ValueError, match="std_dev = -1"), programmed(network, -1):
        pass
