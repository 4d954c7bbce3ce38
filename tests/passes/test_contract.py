import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import captured, product, targets

from analogfx.passes import contract
from analogfx.passes.contract import split_sizes
from analogfx.passes.stationary import propagate_stationary, weight_value
from analogfx.state import StateNames, state_names


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
    propagate_stationary(graph)
    return graph, {n.name: n for n in graph.nodes if weight_value(n) is not None}


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


def test_names_of_several_sites_never_meet():
    names = state_names(["w", "w", "w_2"])
    assert len({n.input_range for n in names}) == 3
