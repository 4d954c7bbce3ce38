"""What two tensor-parallel processes do together, compared with a dense model in each of them."""

import functools
import warnings

import pytest
import torch
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
)
from processes import alone
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import analogfx
from analogfx.errors import PlacementError

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
