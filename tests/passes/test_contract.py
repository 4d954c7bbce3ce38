import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from samples import captured, product, targets

from analogfx.passes import contract
from analogfx.passes.contract import StateNames, split_sizes, weight_value


@pytest.mark.parametrize(
    ("size", "limit", "sizes"),
    [(23, 10, [8, 8, 7]), (10, 10, [10]), (11, 10, [6, 5]), (5, -1, [5]), (5, 0, [5]), (0, 4, [0]),
     (3, 1, [1, 1, 1]), (602, 301, [301, 301])],
)  # fmt: skip
def test_split_sizes(size, limit, sizes):
    assert split_sizes(size, limit) == sizes


@given(st.integers(1, 5000), st.integers(1, 600))
def test_tiles_are_as_few_and_as_equal_as_can_be(size, limit):
    sizes = split_sizes(size, limit)
    assert sum(sizes) == size and max(sizes) <= limit
    assert len(sizes) == -(-size // limit)
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_state_names_are_lightnings():
    assert StateNames().all() == (
        "input_range", "input_range_update_idx", "x_min", "x_max", "learnable_weight_clip",
    )  # fmt: skip
    assert StateNames("a_").all()[0] == "a_input_range"


def marked(forward, **shapes):
    """The graph of a product and its marked nodes by name."""
    graph = captured(product(forward, **shapes))
    contract.propagate_stationary(graph)
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
    assert contract.without_cast(weight) is weights["w"]
    assert contract.sources(weight) == [weights["w"]]


def test_a_write_to_a_weight_is_noted_and_stays_in_the_graph():
    def forward(self, x):
        self.calls.add_(1)
        self.w.t().mul_(2)
        return F.linear(x, self.w)

    graph, weights = marked(forward, w=(4, 5), calls=(), buffers=("calls",))
    assert weights["w"].meta["written"]
    contract.sweep(graph)
    assert targets(graph)["mul_"] == targets(graph)["add_"] == 1


def test_writing_to_an_activation_marks_no_weight():
    _, weights = marked(
        lambda self, x: F.linear(x.clone().mul_(self.scale), self.w), w=(4, 5), scale=(5,)
    )
    assert not any("written" in n.meta for n in weights.values())


def test_sweep_erases_what_only_reads_weights_and_keeps_the_rest():
    def forward(self, x):
        x.relu_()
        self.w.t()
        return x

    graph, _ = marked(forward, w=(4, 5))
    contract.sweep(graph)
    assert set(targets(graph)) == {"relu_"}
    graph.lint()


def test_a_refusal_names_the_largest_weight():
    graph, _ = marked(lambda self, x: torch.addmm(self.b, self.w, x), w=(4, 5), b=(1,))
    (node,) = (n for n in graph.nodes if n.target is torch.addmm)
    contract.refuse(node, "addmm", "so it is", "somebody")
    decision = node.meta["decision"]
    assert (decision.name, decision.weight_shape, decision.tile_grid) == ("w", (4, 5), (0, 0))
    assert (decision.status, decision.reason, decision.decided_by) == (
        "digital",
        "so it is",
        "somebody",
    )
