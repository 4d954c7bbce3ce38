import pytest
import torch.nn.functional as F
from samples import captured, product, targets

from analogfx.passes.contract import sweep
from analogfx.passes.stationary import (
    propagate_stationary,
    sources,
    weight_value,
    without_cast,
)


def marked(forward, **shapes):
    """The graph of a product and its marked nodes by name."""
    graph = captured(product(forward, **shapes))
    propagate_stationary(graph)
    return graph, {n.name: n for n in graph.nodes if weight_value(n) is not None}


def test_what_is_computed_from_parameters_alone_is_a_weight():
    _, weights = marked(
        lambda self, x: F.linear(x, (self.w.t() * self.scale).t()[:3], self.b),
        w=(4, 5), scale=(4,), b=(3,), buffers=("scale",),
    )  # fmt: skip
    assert {name: tuple(weight_value(n).shape) for name, n in weights.items()} == {
        "w": (4, 5), "t": (5, 4), "mul": (5, 4), "t_1": (4, 5), "getitem": (3, 5), "b": (3,),
    }  # fmt: skip
    assert all(weight_value(n).is_meta for n in weights.values())
    assert weights["getitem"].meta["parameter"] == "w"


def test_what_depends_on_the_input_is_not():
    _, weights = marked(lambda self, x: F.linear(x, self.w * x.sum()), w=(4, 5))
    assert set(weights) == {"w"}


def test_a_buffer_alone_is_stationary_but_no_weight():
    graph, weights = marked(lambda self, x: x @ self.w.t(), w=(4, 5), buffers=("w",))
    assert not weights
    (t,) = (n for n in graph.nodes if n.target == "t")
    assert "stationary" in t.meta


@pytest.mark.parametrize(
    "cast",
    [
        lambda w, x: w.to(x.dtype),
        lambda w, x: w.to(x),
        lambda w, x: w.to(dtype=x.dtype),
        lambda w, x: w.type_as(x),
        lambda w, x: w.to(x.device).to(x.dtype),
        lambda w, x: w.float().to(x.dtype),
    ],
)
def test_a_cast_to_the_inputs_dtype_stays_a_weight(cast):
    graph, weights = marked(lambda self, x: F.linear(x, cast(self.w, x)), w=(4, 5))
    (linear,) = (n for n in graph.nodes if n.target is F.linear)
    weight = linear.args[1]
    assert weight_value(weight).shape == (4, 5)
    assert without_cast(weight) is weights["w"]
    assert sources(weight) == [weights["w"]]


def test_a_write_to_a_weight_is_noted_and_stays_in_the_graph():
    def forward(self, x):
        self.calls.add_(1)
        self.w.t().mul_(2)
        return F.linear(x, self.w)

    graph, weights = marked(forward, w=(4, 5), calls=(), buffers=("calls",))
    assert weights["w"].meta["written"]
    sweep(graph)
    assert targets(graph)["mul_"] == targets(graph)["add_"] == 1


def test_writing_to_an_activation_marks_no_weight():
    _, weights = marked(
        lambda self, x: F.linear(x.clone().mul_(self.scale), self.w), w=(4, 5), scale=(5,)
    )
    assert not any("written" in n.meta for n in weights.values())
