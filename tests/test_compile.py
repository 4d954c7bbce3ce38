"""An analogized model under ``torch.compile``, ``torch.export``, ``make_fx`` and AOTInductor.

Everything is in float64 where numbers are compared: Inductor fuses the digital parts in between
and may round them otherwise by a last bit, which in float32 now and then reaches the other side
of a DAC's threshold.
"""

import contextlib
import copy

import pytest
import torch
from samples import CONFIGS, EVERYTHING, TILES, merged, mlp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import analogfx
from analogfx import versions
from analogfx.modules.program import explicit_level

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")

SAME = {"rtol": 1e-11, "atol": 1e-11}
"""Ten steps of float64: noise, a range or a count that is not the same is off by 1e-3 or more."""


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


MODELS = {"linear": (mlp, (3, 8)), "conv": (cnn, (2, 2, 4, 4))}
BACKENDS = ("eager", "aot_eager", "inductor")


def twins(make, config):
    """The same analog model twice."""
    digital = make().double()
    return analogfx.analogize(digital, config), analogfx.analogize(digital, config)


def inputs(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def train(run, model, shape, steps=10):
    """Losses and gradients of some steps, the state after them, and what is drawn next."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = []
    for number in range(steps):
        torch.manual_seed(number)
        optimizer.zero_grad()
        loss = run(inputs(shape, number)).square().mean()
        loss.backward()
        seen.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        )
        optimizer.step()
    return seen, dict(model.state_dict()), torch.rand(())


FULL = [(m, c, b, t) for m in MODELS for c in CONFIGS for b in BACKENDS for t in (False, True)]
CI = {  # every config, both models, every backend; all of FULL by pytest --full-matrix
    ("linear", "everything", "inductor", True),
    ("conv", "everything, dynamic", "inductor", False),
    ("conv", "fast", "inductor", False),
    *(("linear", config, "aot_eager", False) for config in CONFIGS),
    *(("conv", config, "aot_eager", True) for config in ("everything", "learned clip", "dynamic")),
    ("linear", "everything", "eager", False),
}


def pytest_generate_tests(metafunc):
    names = ("kind", "config", "backend", "tiles")
    if names[-1] in metafunc.fixturenames:
        full = metafunc.config.getoption("--full-matrix")
        metafunc.parametrize(names, FULL if full else sorted(CI))


def test_ten_compiled_steps_are_ten_eager_ones(kind, config, backend, tiles):
    make, shape = MODELS[kind]
    eager, model = twins(make, merged(CONFIGS[config], TILES if tiles else {}))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected, actual = train(eager, eager, shape), train(compiled, model, shape)
    torch.testing.assert_close(actual, expected, **SAME)
    eager.eval(), model.eval()
    with torch.no_grad():
        x = inputs(shape, 99)
        torch.testing.assert_close(compiled(x), eager(x), **SAME)


@pytest.mark.parametrize("kind", MODELS)
def test_one_graph_for_each_mode_and_none_more(kind):
    make, shape = MODELS[kind]
    model, _ = twins(make, merged(EVERYTHING, TILES))
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=False)
    train(compiled, model, shape, steps=20)  # through the end of the ranges' initialisation
    assert count.frame_count == 1
    model.eval()
    for number in range(3):
        compiled(inputs(shape, number))
    assert count.frame_count == 2
    model.train()
    compiled(inputs(shape, 0))
    assert count.frame_count == 2


def test_a_batch_may_be_of_any_size():
    eager, model = twins(mlp, EVERYTHING)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for size in (3, 4, 7, 2):
        torch.manual_seed(size)
        expected = eager(inputs((size, 8), size))
        torch.manual_seed(size)
        torch.testing.assert_close(compiled(inputs((size, 8), size)), expected, **SAME)
    assert count.frame_count == 1


# ------------------------------------------------------------------------------------- noise


class Alike(nn.Module):
    """Calls that only their noise tells apart: of one layer, and of two on one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return torch.stack([self.a(x), self.a(x), self.b(x)])


class Branches(nn.Module):
    """Parallel calls: nothing but the program says which of them draws first."""

    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.checkpointed = checkpointed

    def block(self, x):
        return torch.tanh(self.b(torch.relu(self.a(x))) + self.b(x))

    def forward(self, x):
        for _ in range(2):
            if self.checkpointed:
                x = checkpoint(self.block, x, use_reentrant=False)
            else:
                x = self.block(x)
        return x


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("config", ["weight noise", "everything"])
def test_draws_that_look_alike_stay_apart(config, backend, gradients):
    eager, model = twins(Alike, CONFIGS[config])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    outputs = []
    for run in (eager, compiled):
        torch.manual_seed(1)
        with torch.set_grad_enabled(gradients):
            outputs.append(run(inputs((3, 6), 0)).detach())
        outputs.append(torch.rand(()))
    torch.testing.assert_close(outputs[2:], outputs[:2], **SAME)
    first, second, third = outputs[2]
    for one, other in ((first, second), (first, third), (second, third)):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("config", ["output noise", "everything"])
def test_parallel_branches_draw_in_the_programs_order(config):
    eager, model = twins(Branches, CONFIGS[config])
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    expected, actual = train(eager, eager, (3, 6), 4), train(compiled, model, (3, 6), 4)
    torch.testing.assert_close(actual, expected, **SAME)


CHECKPOINTED = [
    *((backend, config) for backend in ("aot_eager", "inductor")
      for config in ("weight noise", "everything")),
    ("aot_eager", "fast"),
]  # fmt: skip


@pytest.mark.xfail(
    versions.there(versions.CHECKPOINTS), reason=versions.CHECKPOINTS.reason, strict=True
)
@pytest.mark.parametrize(("backend", "config"), CHECKPOINTED)
def test_a_compiled_checkpoint_is_the_plain_model(backend, config):
    # Of one without a checkpoint: an eager one computes again with ranges that later calls set.
    plain, _ = twins(Branches, CONFIGS[config])
    _, model = twins(lambda: Branches(True), CONFIGS[config])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected, actual = train(plain, plain, (3, 6), 3), train(compiled, model, (3, 6), 3)
    torch.testing.assert_close(actual, expected, **SAME)


def test_a_range_that_two_calls_set_is_right_under_inductor():
    # A custom op that wrote to the parameter was a thousandth of what eager computes.
    config = merged(CONFIGS["DAC and ADC"], {"pre_post": {"input_range": {"init_from_data": 9}}})
    eager, model = twins(Branches, config)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    for run in (eager, compiled):
        run(inputs((3, 6), 0))
    assert model.b.input_range_update_idx.item() == 4
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()), **SAME)


# ----------------------------------------------------------------------- autocast, other graphs


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_autocast(backend):
    eager = analogfx.analogize(mlp(), CONFIGS["weight noise"])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    outputs = []
    for run in (eager, compiled):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(inputs((3, 8), 0).float()))
    assert outputs[1].dtype == torch.bfloat16
    assert torch.equal(*outputs)  # between the layers there is a relu alone, which does not round


def levels():
    return pytest.mark.parametrize(
        "level", [contextlib.nullcontext, explicit_level], ids=["fused", "explicit"]
    )


@levels()
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(level, training):
    eager, model = (m.train(training) for m in twins(mlp, merged(EVERYTHING, TILES)))
    with level():
        program = torch.export.export(
            model, (inputs((3, 8), 0),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("analogfx.draw_seed.default") == 2 * training
    exported = program.module()
    for size in (3, 5):
        torch.manual_seed(size)
        expected = eager(inputs((size, 8), size))
        torch.manual_seed(size)
        torch.testing.assert_close(exported(inputs((size, 8), size)), expected, **SAME)
    state = dict(exported.state_dict())
    torch.testing.assert_close(state, {k: eager.state_dict()[k] for k in state}, **SAME)


@levels()
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_make_fx(level, training):
    eager, model = (m.train(training) for m in twins(mlp, CONFIGS["everything, dynamic"]))
    x = inputs((3, 8), 0)
    with level():
        traced = make_fx(model)(x)
    torch.manual_seed(1)
    expected = eager(x)
    torch.manual_seed(1)
    torch.testing.assert_close(traced(x), expected, **SAME)


FUNCTORCH_IS_SLOW = pytest.mark.filterwarnings("ignore:There is a performance drop")


@levels()
@FUNCTORCH_IS_SLOW
def test_vmap(level):
    _, model = (m.eval() for m in twins(mlp, EVERYTHING))
    x = inputs((4, 3, 8), 0)
    with level():
        mapped = torch.func.vmap(model)(x)
    torch.testing.assert_close(mapped, model(x), **SAME)


def loss_of(model):
    """A function of parameters and an input, as torch.func wants it."""

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    return loss, {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, x):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = model(x).square().mean()
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))


@levels()
@pytest.mark.parametrize(
    ("config", "training"),
    [("everything", False), ("learned clip", False), ("everything, dynamic", True)],
)
def test_func_grad(config, training, level):
    make = cnn if config == "everything" else mlp
    model = twins(make, CONFIGS[config])[0].train(training)
    loss, parameters = loss_of(model)
    x = inputs(MODELS["conv" if make is cnn else "linear"][1], 0)
    with level():
        torch.manual_seed(0)
        found = torch.func.grad(loss)(parameters, x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, gradients(model, x), **SAME)


@levels()
@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.jacfwd, torch.func.hessian])
def test_forward_mode_is_refused_and_not_zero(transform, level):
    model = twins(mlp, CONFIGS["everything"])[0].eval()
    x = inputs((3, 8), 0)

    def call():
        if transform is torch.func.jvp:
            return transform(model, (x,), (x,))
        return transform(lambda x: model(x).square().sum())(x)

    message = "no forward-mode derivative .* use grad, vjp or jacrev"
    with level(), pytest.raises(NotImplementedError, match=message):
        call()


def test_a_second_derivative_is_refused_and_not_zero():
    model = twins(mlp, CONFIGS["everything"])[0].eval()

    def gradient(x):
        return torch.func.grad(lambda x: model(x).square().sum())(x).sum()

    with pytest.raises(RuntimeError, match="have no second derivative"):
        torch.func.grad(gradient)(inputs((3, 8), 0))


def test_a_second_derivative_of_explicit_ops_is_that_of_autograd():
    model = twins(mlp, CONFIGS["everything"])[0].eval()
    x = inputs((3, 8), 0)

    def gradient(x):
        return torch.func.grad(lambda x: model(x).pow(3).sum())(x).sum()

    with explicit_level():
        found = torch.func.grad(gradient)(x)
        x.requires_grad_()
        (first,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.sum(), x)
    assert expected.any()
    torch.testing.assert_close(found, expected, **SAME)


@levels()
@FUNCTORCH_IS_SLOW
def test_gradients_by_sample(level):
    model = twins(mlp, merged(EVERYTHING, TILES))[0].eval()
    loss, parameters = loss_of(model)
    x = inputs((4, 3, 8), 0)
    with level():
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number, sample in enumerate(x):
        expected = gradients(model, sample)
        torch.testing.assert_close({n: g[number] for n, g in found.items()}, expected, **SAME)


@levels()
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev])
def test_ranges_that_follow_the_data_are_refused_under_torch_func(transform, level):
    model, _ = twins(mlp, EVERYTHING)
    with level(), pytest.raises(RuntimeError, match=r"first: in training .* call eval\(\), or use"):
        transform(model)(inputs((4, 3, 8), 0))


@FUNCTORCH_IS_SLOW
def test_noise_under_vmap_is_as_its_randomness_says():
    model, _ = twins(mlp, CONFIGS["weight noise"])
    x = inputs((3, 8), 0).expand(4, 3, 8)
    same = torch.vmap(model, randomness="same")(x)
    different = torch.vmap(model, randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert (different[0] - different[1]).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match='ask for "different" or "same", or call eval'):
        torch.vmap(model)(x)


# Of torch's own, while it copies an exported program.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_an_eval_model_is_packaged_by_aotinductor(tmp_path):
    model = analogfx.analogize(mlp(), merged(EVERYTHING, TILES)).eval()
    x = inputs((3, 8), 0).float()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        packaged = torch._inductor.aoti_load_package(path)
        for size in (3, 5):
            x = inputs((size, 8), size).float()
            assert torch.equal(packaged(x), model(x))
