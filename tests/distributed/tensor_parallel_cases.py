"""What two tensor-parallel processes do together, compared with a dense model in each of them."""

import functools
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from distributed_models import (
    close,
    config,
    joint,
    mesh,
    net,
    prepared,
    same_everywhere,
    state,
    train,
    whole,
)
from processes import alone
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import analogfx
from analogfx.errors import PlacementError
from analogfx.kernels import linear

STEPS = 5
CASES = {}


def case(name):
    def add(function):
        CASES[name] = function
        return function

    return add


def cut(model, over=None):
    over = mesh(names=("tp",)) if over is None else over
    for block in model.blocks:
        parallelize_module(block, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def as_dense(rank, folder, made, order, hook):
    batches = list(map(joint, range(STEPS)))
    dense = analogfx.analogize(net(), made)
    if order == "analog first":
        model = cut(analogfx.analogize(net(), made))
    else:
        model = analogfx.analogize(cut(net()), made, inplace=True)
    warnings.filterwarnings("ignore", message=".*trains on 2 processes")  # without the hook
    torch.manual_seed(7)
    expected, gradients = train(dense, optimizer(dense, hook, mesh_or_group=alone()), batches)
    torch.manual_seed(7)
    losses, found = train(model, optimizer(model, hook), batches)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    same_everywhere(model)
    close(found, gradients)
    close(state(model), state(dense))
    x = joint(9)[0]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), dense.eval()(x), rtol=1e-9, atol=1e-12)


def optimizer(model, hook, **options):
    if hook:
        return prepared(model, **options)
    made = torch.optim.SGD(analogfx.parameter_groups(model, 0.01), lr=0.05, momentum=0.5)
    analogfx.clip_after_step(made, model)
    return made


def merged(made, **parts):
    return {**made, **{name: {**made.get(name, {}), **part} for name, part in parts.items()}}


NOISE = {"noise_type": "AddNormal", "std_dev": 0.05}
ROWS = {"noise_type": "AddNormalPerChannel", "std_dev": 0.05}
STATES = {"quantization_type": "Discretize", "res": 14}
STATES_BY_ROW = {"quantization_type": "DiscretizePerChannel", "res": 14}
OUTPUTS = {"out_noise": 0.1, "out_noise_per_channel": True}
KINDS = {
    "8-bit converters": config(),
    "ranges that are closed": config(0),
    "fast ranges": config(fast_mode=True),
    "frozen ranges": config(learn_input_range=False),
    "ranges of each token": config(enable=True, dynamic=True, learn_input_range=False),
    "noise": merged(config(clip="LayerGaussian"), modifier=NOISE, forward={"out_noise": 0.1}),
    "noise of rows": merged(config(), modifier=ROWS, forward=OUTPUTS),
    "noise of tiles, bounds of rows": merged(config(), modifier=NOISE),
    "tiles that are cut": merged(config(clip="LayerGaussian"), mapping={"max_output_size": 12}),
    "weight states": merged(config(clip="LayerGaussian"), modifier=STATES),
    "weight states of rows, learned clips": merged(
        config(clip="LearnablePerChannel"), modifier=STATES_BY_ROW
    ),
    "learned clips, noise of tiles": merged(config(clip="LearnablePerChannel"), modifier=NOISE),
}
for _kind, _made in KINDS.items():
    CASES[_kind] = functools.partial(as_dense, made=_made, order="analog first", hook=True)
for _kind in ("8-bit converters", "noise"):
    for _order, _hook in (("cut first", True), ("analog first", False)):
        CASES[f"{_kind}, {_order}{', not prepared' * (not _hook)}"] = functools.partial(
            as_dense, made=KINDS[_kind], order=_order, hook=_hook
        )


@case("tile edges that are no shard edges are refused, with a size that fits")
def edges(rank, folder):
    made = merged(config(), mapping={"max_input_size": -1})
    with pytest.raises(
        PlacementError, match=r"blocks[.]0[.]down: .*at 16, .*max_input_size=16 fits"
    ):
        cut(analogfx.analogize(net(), made))
    with pytest.raises(PlacementError, match=r"down: .*at 16, .*end at 11, 22, 32.*=8 fits"):
        cut(analogfx.analogize(net(), merged(config(), mapping={"max_input_size": 11})))


def labels(number):
    return joint(number)[1].argmax(dim=1)


@case("sequence-parallel norms and a loss on shards of the classes")
def sequence_and_loss_parallel(rank, folder):
    over, made = mesh(names=("tp",)), config()
    dense, model = (analogfx.analogize(net(), made) for _ in range(2))
    for block in model.blocks:
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
        }
        parallelize_module(block, over, plan)
        split = {"input_layouts": (Replicate(),), "desired_input_layouts": (Shard(0),)}
        joined = {"output_layouts": (Shard(0),), "desired_output_layouts": (Replicate(),)}
        parallelize_module(block, over, PrepareModuleInput(**split, use_local_output=True))
        parallelize_module(block, over, PrepareModuleOutput(**joined, use_local_output=True))
    parallelize_module(model, over, {"head": ColwiseParallel(use_local_output=False)})
    optimizers = [prepared(dense, mesh_or_group=alone()), prepared(model)]
    for number in range(STEPS):
        x = joint(number)[0]
        expected = F.cross_entropy(dense(x), labels(number))
        expected.backward()
        with loss_parallel():
            found = F.cross_entropy(model(x), labels(number))
            found.backward()
        torch.testing.assert_close(whole(found), expected, rtol=1e-9, atol=0)
        for each in optimizers:
            each.step()
            each.zero_grad()
    same_everywhere(model)
    close(state(model), state(dense))


@case("a model on meta is cut, allocated and loaded, learned clips from its weights")
def from_meta(rank, folder):
    made = config(0, clip="LearnablePerChannel")
    with torch.device("meta"):
        model = net()
    model = cut(analogfx.analogize(model, made, inplace=True))
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, net().state_dict(), options=options)
    close(state(model), state(analogfx.analogize(net(), made)))


@case("save gathers parts, and quantize_weights and report work on them")
def verbs(rank, folder):
    made = merged(config(0), modifier=STATES_BY_ROW)
    dense, model = analogfx.analogize(net(), made), cut(analogfx.analogize(net(), made))
    assert all(site.status == "analog" for site in analogfx.report(model).sites)
    analogfx.save(model, folder / "saved")
    close(state(analogfx.load(net(seed=1), folder / "saved")), state(dense))
    for each in (dense, model):
        analogfx.quantize_weights(each)
    close(state(model), state(dense))


@case("what cannot be cut is refused by name")
def refused(rank, folder):
    made = config(0)
    over = mesh(names=("tp",))
    model = cut(analogfx.analogize(net(), made))
    chip = analogfx.program(model.eval(), analogfx.chip.PCMLikeNoiseModel(), seed=0)
    whole_alone = pytest.raises(
        PlacementError, match=r"blocks[.]0[.]up: a chip's weights are whole"
    )
    with whole_alone, chip.at(60.0):
        model(joint(0)[0])
    conv = analogfx.analogize(torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1)), made)

    def by_outputs(name, module, device_mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            cut_parameter = distribute_tensor(parameter, device_mesh, [Shard(0)])
            module.register_parameter(key, torch.nn.Parameter(cut_parameter))

    with pytest.raises(PlacementError, match=r"^0: AnalogConv1d is cut .*only nn.Linear can be"):
        distribute_module(conv[0], over, by_outputs)
    linear = cut(analogfx.analogize(net(), made)).blocks[0].up
    linear._forward_pre_hooks.clear()
    with pytest.raises(
        PlacementError, match=r"blocks[.]0[.]up: its weight is a DTensor, its input"
    ):
        linear(torch.zeros(2, 16, dtype=torch.float64))


@case("an analog model sends as often as a digital one, and once a step for its clips")
def sends(rank, folder):
    counts, within, summed = [], [], linear.summed  # the mode does not see into ops

    def counted(*args):
        within.append(args)
        return summed(*args)

    for model in (net(), analogfx.analogize(net(), config(0))):
        cut(model)
        step = torch.optim.SGD(model.parameters(), lr=0.05)
        if counts:
            analogfx.prepare_training(step, model)
        x, y = joint(0)
        with CommDebugMode() as mode, mock.patch.object(linear, "summed", counted):
            F.mse_loss(model(x.requires_grad_()), y).backward()  # or the mode's hooks warn
            step.step()
        counts.append(mode.get_total_counts() + len(within))
    digital, analog = counts
    # A block has two linear layers: a sum behind the one, and one before the other in the backward.
    assert digital == 4, counts
    assert analog == digital + 1, counts
