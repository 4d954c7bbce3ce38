import copy
from unittest import mock

import pytest
import torch
from aihwkit_lightning.nn.conversion import convert_to_analog
from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig, WeightNoiseInjectionType
from oracle import assert_equal, feeding
from samples import CONFIGS, EVERYTHING, IDENTITY, TILES, merged, ranged
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import analogfx
from analogfx.kernels import noise, recurrence, row_noise
from analogfx.kernels.recurrence import Plan
from analogfx.kernels.spec import MVMSpec
from analogfx.modules.driven import Whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:forward[.].*_res = .* is a quantizer of"),
    pytest.mark.usefixtures("one_thread"),
]

QUIET = {"modifier": {"noise_type": "None"}, "forward": {"out_noise": 0.0}}
BOTH = {"bidirectional": True, "dtype": torch.float64}
LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 4, 2, **BOTH),
    "LSTM, projected": lambda: nn.LSTM(3, 5, proj_size=2, **BOTH),
    "GRU": lambda: nn.GRU(3, 4, **BOTH),
    "RNN": lambda: nn.RNN(3, 4, bias=False, dtype=torch.float64),
    "RNN, relu": lambda: nn.RNN(3, 4, nonlinearity="relu", **BOTH),
}
RANGED = {name: config for name, config in CONFIGS.items() if "dynamic" not in name}
CASES = [
    *((layer, "everything", True) for layer in LAYERS),
    *((layer, "everything", False) for layer in LAYERS),
    *(("LSTM", config, False) for config in RANGED if config != "everything"),
]


def closed(layer, config, value=0.4):
    """An analog layer in training whose ranges no longer follow the data."""
    analog = analogfx.analogize(layer, config)
    for name, tensor in analog.state_dict().items():
        if "update_idx" in name:
            tensor.fill_(10_000)
        elif "input_range" in name:
            tensor.fill_(value)
    return analog


def inputs(packed):
    torch.manual_seed(1)
    if not packed:
        return 1.5 * torch.randn(6, 2, 3, dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 3)]
    return pack_sequence(sequences, enforce_sorted=False)


def outputs_and_gradients(analog, x):
    data = (x if isinstance(x, torch.Tensor) else x.data).clone().requires_grad_()
    first, states = analog(data if isinstance(x, torch.Tensor) else x._replace(data=data))
    outputs = [first if isinstance(x, torch.Tensor) else first.data, *tree_leaves(states)]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    learned = [p for p in analog.parameters() if p.requires_grad]
    return outputs, torch.autograd.grad(loss, [data, *learned])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}, {case[2]}")
def test_one_call_computes_what_single_calls_do(case, packed):
    layer, name, tiled = case
    config = EVERYTHING if name == "everything" else CONFIGS[name]
    torch.manual_seed(0)
    analog = closed(LAYERS[layer](), merged(config, TILES if tiled else {}, QUIET))
    x = inputs(packed)
    with mock.patch.object(recurrence, "forward", wraps=recurrence.forward) as whole:
        found = outputs_and_gradients(analog, x)
    assert whole.call_count == analog.num_layers * (1 + analog.bidirectional)
    with mock.patch.object(Whole, "__call__", return_value=None):
        expected = outputs_and_gradients(analog, x)
    torch.testing.assert_close(found, expected)


def test_noise_of_every_step_is_that_of_a_noisy_weight():
    """What the rows of a step read is a part of a matrix of noise, which Lightning is given."""
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_value, config.pre_post.input_range.init_from_data = 0.8, 0
    config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    config.modifier.std_dev = 0.1
    torch.manual_seed(0)
    digital = nn.LSTM(3, 4, dtype=torch.float64)
    lightning = convert_to_analog(nn.Sequential(copy.deepcopy(digital)), copy.deepcopy(config))[0]
    analog = analogfx.analogize(digital, config)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    parts = []

    def read(rows, z):
        found, basis = reads(rows, z)
        parts.append(z.T @ basis)
        return found, basis

    def normal(seed, stream, shape, dtype):
        draw = noise.normal(seed, stream, shape, dtype)
        return draw if stream % 3 != 1 else torch.zeros_like(draw)  # nothing beside those parts

    reads = row_noise.read
    with (
        mock.patch.object(row_noise, "saves", return_value=True),
        mock.patch.object(row_noise, "read", read),
        mock.patch.object(recurrence, "noise", mock.Mock(normal=normal)),
    ):
        y = analog(x)[0]
        y.square().sum().backward()
    assert len(parts) == 12
    assert all(not torch.equal(a, b) for n, a in enumerate(parts) for b in parts[:n]
               if a.shape == b.shape and a.any() and b.any())  # fmt: skip
    fed = [part for t in range(6) for part in (parts[t], parts[6 + t])]
    with feeding(fed, torch.float64):
        expected = lightning(x)[0]
    assert_equal(y.detach(), expected.detach())
    expected.square().sum().backward()
    cell = lightning.rnn.layers[0].cell
    for of in ("ih", "hh"):
        for what in ("weight", "bias", "input_range"):
            theirs = getattr(getattr(cell, f"weight_{of}"), what)
            assert_equal(getattr(analog, f"{what}_{of}_l0").grad, theirs.grad)


def test_a_step_draws_as_much_as_its_rows_read():
    config = {"modifier": {"noise_type": "AddNormal", "std_dev": 0.1}}
    analog = analogfx.analogize(nn.LSTM(32, 32), config)
    drawn = []

    def normal(seed, stream, shape, dtype):
        drawn.append(tuple(shape))
        return noise.normal(seed, stream, shape, dtype)

    with mock.patch.object(recurrence, "noise", mock.Mock(normal=normal)):
        analog(torch.randn(5, 2, 32, requires_grad=True))[0].sum().backward()
    assert drawn == 2 * [(10, 128)] + 2 * [(10, 32)]


def test_noise_is_the_same_for_a_seed_and_another_in_every_call():
    analog = analogfx.analogize(nn.GRU(32, 32), EVERYTHING)
    analog.input_range_update_idx_ih_l0.fill_(10_000)
    analog.input_range_update_idx_hh_l0.fill_(10_000)
    x, found = torch.randn(4, 2, 32), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        analog.zero_grad()
        y = analog(x)[0]
        y.sum().backward()
        found.append((y.detach(), analog.weight_hh_l0.grad.clone()))
    assert all(map(torch.equal, found[0], found[1]))
    assert not any(map(torch.equal, found[0], found[2]))


def test_inference_without_gradients_is_one_call_and_the_same():
    torch.manual_seed(0)
    analog = closed(nn.LSTM(3, 4, 2), merged(EVERYTHING, TILES)).eval()
    x = torch.randn(6, 2, 3)
    with (
        torch.no_grad(),
        mock.patch.object(recurrence, "forward", wraps=recurrence.forward) as whole,
    ):
        found = analog(x)
    assert [call.args[-1].keep for call in whole.call_args_list] == [False, False]
    with mock.patch.object(Whole, "__call__", return_value=None):
        torch.testing.assert_close(found, analog(x))


def test_a_checkpoint_draws_the_same_again():
    analog = analogfx.analogize(nn.LSTM(32, 32), {"modifier": {
        "noise_type": "AddNormal", "std_dev": 0.1}})  # fmt: skip
    x = torch.randn(4, 2, 32, requires_grad=True)
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        if again:
            y = torch.utils.checkpoint.checkpoint(lambda x: analog(x)[0], x, use_reentrant=False)
        else:
            y = analog(x)[0]
        grads.append(torch.autograd.grad(y.square().sum(), [x, analog.weight_hh_l0]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


OPEN = ranged(init_from_data=3)


def test_open_statistics_take_single_calls():
    analog = analogfx.analogize(nn.LSTM(3, 4), OPEN)
    with mock.patch.object(recurrence, "forward", wraps=recurrence.forward) as whole:
        analog(torch.randn(2, 2, 3))
        assert not whole.called
        analog(torch.randn(4, 2, 3))
        analog(torch.randn(4, 2, 3))
    assert whole.call_count == 1


CPU = torch.device("cpu")
REFUSED = {
    "a GPU": (MVMSpec([8], [32]), torch.float32, torch.device("cuda"), "on cuda"),
    "half precision": (MVMSpec([8], [32]), torch.bfloat16, CPU, "not torch.bfloat16"),
    "dynamic": (MVMSpec([8], [32], range_mode="dynamic"), torch.float32, CPU, "on the input"),
    "many rows": (MVMSpec([8], [32], noise_std=0.1), torch.float32, CPU, "so many rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_call_cannot_compute_is_refused_with_a_reason(name):
    spec, dtype, device, reason = REFUSED[name]
    assert reason in recurrence.refusal(8, [(spec, dtype, device)])
    assert recurrence.refusal(8, [(MVMSpec([8], [32]), torch.float32, CPU)]) == ""


def test_steps_come_in_groups_that_fit_a_cache():
    plan = Plan("lstm", True, [3, 3, 2])
    assert plan.steps() == [slice(6, 8), slice(3, 6), slice(0, 3)]
    assert plan.groups(1 << 30) == [[slice(6, 8)], [slice(3, 6)], [slice(0, 3)]]
    assert plan.groups(1) == [plan.steps()]


def test_half_precision_trains_by_single_calls():
    analog = analogfx.analogize(nn.GRU(3, 4).bfloat16(), IDENTITY)
    analog(torch.randn(3, 2, 3, dtype=torch.bfloat16))[0].sum().backward()
    assert analog.weight_hh_l0.grad.dtype == torch.bfloat16
