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


def noise_of(module, std_dev=0.1, seed=0):
    """The analogized module's weight, and what programming adds to it."""
    exact = module.weight.detach().clone()
    with programmed(module, std_dev, seed):
        return exact, module.weight.detach() - exact


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
    layer = analogfx.analogize(layer, config(tiles))
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


def test_weights_return_to_the_bit(network):
    before = snapshot(network)
    with programmed(network, 0.3):
        assert not torch.equal(network[0].weight, before["0.weight"])
        assert not torch.equal(network[2].weight, before["2.weight"])
    assert_same_bits(network, before)


def test_weights_return_after_an_exception(network):
    before = snapshot(network)
    with pytest.raises(KeyError), programmed(network, 0.3):
        raise KeyError
    assert_same_bits(network, before)


def test_biases_and_digital_weights_stay_exact():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    analog = analogfx.analogize(model, {"0": config(), "1": None})
    before = snapshot(analog)
    with programmed(analog, 0.3):
        changed = {n for n, t in analog.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"0.weight"}


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
    before = snapshot(network)
    with programmed(network, 0.0):
        assert_same_bits(network, before)


def test_tied_weight_is_perturbed_once():
    first, second = nn.Linear(500, 500), nn.Linear(500, 500)
    second.weight = first.weight
    analog = analogfx.analogize(nn.Sequential(first, second), config())
    exact = analog[0].weight.detach().clone()
    with programmed(analog, 0.1, seed=0):
        assert analog[0].weight is analog[1].weight
        noise = analog[0].weight.detach() - exact
    normal = noise / (0.1 * exact.abs().amax(1, keepdim=True))
    assert abs(normal.std() - 1) < 5 / (2 * normal.numel()) ** 0.5
    assert torch.equal(analog[0].weight, exact)


class Chunks(nn.Module):
    """Two products with parts of one parameter, the second by way of a copy."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        first, second = self.weight.chunk(2)
        return x @ first.t(), torch.matmul(x, second.t().reshape(6, 4))


def test_parts_of_a_parameter_are_all_perturbed():
    analog = analogfx.analogize(Chunks(), config())
    assert len(list(sites(analog))) == 2
    exact, noise = noise_of(analog)
    assert noise.ne(0).all()
    assert torch.equal(analog.weight, exact)


def test_training_mode_and_gradients_survive(network):
    network.train()
    with programmed(network, 0.1):
        network(torch.ones(2, 3, 3, 3)).sum().backward()
    assert network.training
    assert network[2].weight.requires_grad and network[2].weight.grad is not None


def test_negative_noise_is_refused(network):
    with pytest.raises(ValueError, match="std_dev = -1"), programmed(network, -1):
        pass
