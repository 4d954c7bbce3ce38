import copy

import pytest
import torch
import torch.nn.functional as F
from samples import captured, product, run, targets
from torch import nn

from analogfx.errors import CaptureError
from analogfx.modules.capture import (
    bind,
    capture,
    default_pattern,
    may_multiply,
    pattern_of,
    takes_constants,
)
from analogfx.passes.stationary import weight_value

X = torch.randn(3, 6, dtype=torch.float64)


def project(x, weight):
    return x @ weight.t()


def mixed(x, weight):
    return project(x, weight) + 1


class Method(nn.Module):
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return torch.einsum("ni,oi->no", x, self.w)


# ------------------------------------------------------------------------- what is worth tracing

MENTIONS = {
    "a name": lambda self, x: F.linear(x, self.w),
    "@": lambda self, x: x @ self.w,
    "a lambda inside": lambda self, x: (lambda y: y.matmul(self.w))(x),
    "a helper": lambda self, x: project(x, self.w),
    "a helper's helper": lambda self, x: mixed(x, self.w),
}


@pytest.mark.parametrize("name", MENTIONS)
def test_a_forward_that_could_hold_a_product_is_traced(name):
    assert may_multiply(product(MENTIONS[name], w=(4, 6)))


def test_a_method_that_the_forward_calls_counts():
    assert may_multiply(Method())


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LayerNorm(3), nn.Sequential(), nn.Dropout()])
def test_what_multiplies_nothing_is_not(module):
    assert not may_multiply(module)


# ------------------------------------------------------------------------------------ the graph


def test_children_stay_calls_and_parameters_are_marked():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(6, 6)
            self.w = nn.Parameter(torch.randn(4, 6))
            self.register_buffer("scale", torch.ones(6))

        def forward(self, x):
            return F.linear(self.child(x) * self.scale, self.w)

    graph = captured(Net())
    assert [n.target for n in graph.find_nodes(op="call_module")] == ["child"]
    weights = [n for n in graph.nodes if weight_value(n) is not None]
    assert [(n.target, tuple(weight_value(n).shape)) for n in weights] == [("w", (4, 6))]


def test_a_childs_parameter_is_read_by_its_path():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(6, 4))

        def forward(self, x):
            return F.linear(x, self.a[0].weight)

    (node,) = (n for n in captured(Reader()).nodes if weight_value(n) is not None)
    assert node.target == "a.0.weight"


def test_a_graph_runs_on_any_module_that_looks_alike():
    first, second = (product(lambda self, x: x @ self.w, seed=i, w=(6, 4)) for i in (1, 2))
    forward = bind(captured(first))
    assert torch.equal(forward(first, X), first(X))
    assert torch.equal(forward(second, X), second(X))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_asked_for(training):
    module = product(lambda self, x: x @ self.w * (2 if self.training else 3), w=(6, 4))
    module.train(not training)
    graph = capture(module, training, ())
    factor = 2 if training else 3
    torch.testing.assert_close(run(graph, module, X), X @ module.w * factor)
    assert module.training is not training


def counts(self, x):
    self.calls.add_(1)
    if self.calls.shape == ():  # the shape of a buffer is known
        x = x + self.calls
    return F.linear(x, self.w)


def test_buffers_are_read_and_written_when_the_graph_runs():
    module = product(counts, w=(4, 6), calls=(), buffers=("calls",))
    before = module.calls.clone()
    graph = captured(module)
    assert torch.equal(module.calls, before)
    twin = copy.deepcopy(module)
    for _ in range(2):
        assert torch.equal(run(graph, module, X), twin(X))
    assert module.calls == before + 2


def test_parametrizations_are_run_without_running_them_in_earnest():
    module = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4).double())
    before = copy.deepcopy(module.state_dict())
    graph = captured(module, training=True)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    (weight,) = graph.find_nodes(op="call_module")
    assert weight_value(weight).shape == (4, 6) and weight_value(weight).is_meta
    assert torch.equal(run(graph, copy.deepcopy(module), X), copy.deepcopy(module)(X))


@pytest.mark.parametrize("steps", [0, 1])
def test_tracing_leaves_nothing_behind(steps):
    module = product(lambda self, x: F.dropout(x @ self.w, 0.5, self.training), w=(6, 4))
    attributes, random = dict(module.__dict__), torch.get_rng_state()
    for _ in range(steps + 1):
        captured(module, training=True)
    assert module.__dict__ == attributes
    assert torch.equal(random, torch.get_rng_state())


# ----------------------------------------------------------------------------- what is refused


def assigns(self, x):
    self.last = x
    return x @ self.w


def counts_calls(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return x @ self.w


def without_grad(self, x):
    with torch.no_grad():
        x = x * 2
    return x @ self.w


def with_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ self.w


@torch.no_grad()
def decorated(self, x):
    return x @ self.w


def takes_more(self, x, *rest, scale=2.0, **more):
    return x @ self.w * scale


def test_variable_arguments_that_are_not_read_are_taken_and_left():
    module = product(takes_more, w=(6, 4))
    forward = bind(captured(module))
    expected = X @ module.w * 2
    assert torch.equal(forward(module, X), expected)
    assert torch.equal(forward(module, X, 3, None, name=X), expected)
    assert pattern_of(module, (X, 3), {"scale": 1.0, "name": True}) == (("scale", 1.0),)


REFUSED = {
    "control flow on values": (lambda self, x: x @ self.w if x.sum() > 0 else x,
                               r"branches on the values of a tensor, .* at test_capture.py:\d"),
    "a loop over values": (lambda self, x: [row @ self.w for row in x], "loops over a tensor"),
    "variable arguments": (lambda self, *xs: xs[0] @ self.w, r"\*args"),
    "variable keywords": (lambda self, x, **more: x @ self.w * len(more), r"\*\*kwargs"),
    "assignment": (assigns, "assigns to self.last"),
    "a counter": (counts_calls, "assigns to self.calls"),
    "a constant": (lambda self, x: x @ self.w + torch.arange(4), "makes a tensor"),
    "random numbers": (lambda self, x: x @ self.w * float(torch.rand(())), "random numbers"),
    "no_grad": (without_grad, "gradients or autocast"),
    "no_grad around": (decorated, "gradients or autocast"),
    "autocast": (with_autocast, "gradients or autocast"),
    "an error of its own": (lambda self, x: x @ self.nothing, "AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_would_compute_otherwise_is_refused_and_the_module_is_as_it_was(name):
    forward, message = REFUSED[name]
    module = product(forward, w=(6, 4))
    attributes, random = dict(module.__dict__), torch.get_rng_state()
    with pytest.raises(CaptureError, match=message):
        captured(module)
    assert module.__dict__ == attributes
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_no_grad_in_a_forward_is_seen_from_under_no_grad():
    with torch.no_grad(), pytest.raises(CaptureError, match="gradients or autocast"):
        captured(product(without_grad, w=(6, 4)))


def test_a_forward_of_the_instance_is_refused():
    module = product(lambda self, x: x @ self.w, w=(6, 4))
    module.forward = lambda x: x
    with pytest.raises(CaptureError, match="on the instance"):
        captured(module)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_forward_that_is_no_function_is_refused():
    scripted = torch.jit.script(nn.Linear(2, 2))
    assert may_multiply(scripted)
    with pytest.raises(CaptureError, match="not a Python function"):
        captured(scripted)


# --------------------------------------------------------------------- arguments that are constants


def specialised(self, x, mask=None, scale=1.0, *, twice=False):
    y = x @ self.w * scale
    if mask is not None:
        y = y * mask
    return y + y if twice else y


def test_the_default_pattern_is_a_call_with_the_required_arguments():
    module = product(specialised, w=(6, 4))
    assert default_pattern(module) == (("mask", None), ("scale", 1.0), ("twice", False))
    assert takes_constants(module)
    assert not takes_constants(product(lambda self, x: x @ self.w, w=(6, 4)))


MASK = torch.ones(3, 4, dtype=torch.float64) / 2


@pytest.mark.parametrize(
    ("args", "kwargs", "pattern"),
    [
        ((X,), {}, {"mask": None, "scale": 1.0, "twice": False}),
        ((X, None, 2.0), {}, {"mask": None, "scale": 2.0, "twice": False}),
        ((X, MASK), {}, {"scale": 1.0, "twice": False}),
        ((), {"x": X, "twice": True}, {"mask": None, "scale": 1.0, "twice": True}),
        ((X,), {"mask": MASK, "scale": 3, "twice": True}, {"scale": 3, "twice": True}),
        ((X, MASK, 0.5), {"twice": True}, {"scale": 0.5, "twice": True}),
    ],
)
def test_a_graph_is_specialised_to_the_constants_of_a_call(args, kwargs, pattern):
    module = product(specialised, w=(6, 4))
    assert dict(pattern_of(module, args, kwargs)) == pattern
    graph = capture(module, False, pattern_of(module, args, kwargs))
    assert [n.target for n in graph.find_nodes(op="placeholder")] == ["x", "mask", "scale", "twice"]
    assert torch.equal(bind(graph)(module, *args, **kwargs), module(*args, **kwargs))
    assert not any("assert" in str(target) for target in targets(graph))


def test_a_graph_shows_in_a_traceback():
    module = product(lambda self, x: x @ self.w, w=(6, 4))
    forward = bind(captured(module))
    with pytest.raises(RuntimeError) as caught:
        forward(module, torch.randn(3, 7, dtype=torch.float64))
    assert "x @ w" in str(caught.getrepr())
