import re
from pathlib import Path

import pytest
from samples import (
    CONFIGS,
    EVERYTHING,
    IDENTITY,
    TILES,
    after,
    captured,
    layer_and_input,
    merged,
    product,
)

from analogfx.config import resolve
from analogfx.passes import pipeline
from analogfx.passes.contract import Context

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = pipeline.EXPLICIT + pipeline.FUSED


def test_the_order_is_the_documented_one():
    assert [step.__name__ for step in ALL] == [
        "expand",
        "respell",
        "normalize",
        "delegate",
        "select",
        "insert",
        "map_tiles",
        "lower",
    ]


def test_after_is_called_with_every_pass_and_its_count():
    module = product(lambda self, x: x @ self.w, w=(12, 7))
    seen = []
    pipeline.run(
        ALL,
        captured(module),
        Context(resolve(merged(EVERYTHING, TILES)), training=True),
        lambda name, graph, count: seen.append((name, count)),
    )
    changed = {step.__name__: 1 for step in ALL} | dict.fromkeys(
        ("expand", "respell", "delegate"), 0
    )
    assert seen == list(changed.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "grouped"])
@pytest.mark.parametrize("config", CONFIGS)
def test_running_every_pass_again_changes_nothing(config, layer, training):
    module, _ = layer_and_input(layer)
    graph, context = after(ALL, module, merged(CONFIGS[config], TILES), training)
    counts = []
    pipeline.run(ALL, graph, context, lambda name, graph, count: counts.append(count))
    assert counts == [0] * len(ALL)
    assert len(context.sites) == 1


def test_a_pass_that_breaks_the_graph_is_caught():
    def breaks(graph, context):
        (output,) = graph.find_nodes(op="output")
        first = next(iter(graph.nodes))
        first.append(output)  # before what it returns
        return 1

    module, _ = layer_and_input("linear")
    with pytest.raises(RuntimeError):
        after((*pipeline.EXPLICIT, breaks), module, IDENTITY)


def test_decisions_are_in_the_graphs_order():
    def forward(self, x):
        y = x @ self.first
        return y @ self.second + y @ self.third

    module = product(forward, first=(1, 2, 3, 4), second=(4, 5), third=(4, 5))
    graph, _ = after(ALL, module, IDENTITY)
    found = [(d.name, d.status) for d in pipeline.decisions(graph)]
    assert found == [("first", "digital"), ("second", "analog"), ("third", "analog")]


def test_the_page_lists_the_passes_of_a_whole_graph_in_their_order():
    page = Path(__file__).parents[2].joinpath("docs", "compile.md").read_text()
    table = page.split("| pass | what it does | when |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert listed == [step.__name__ for step in pipeline.WHOLE_GRAPH]


def test_no_pass_is_left_out_of_the_contract_that_passes_do_not_import_one_another():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    contract = text.split('name = "A pass imports no other pass"')[1].split("]")[0]
    listed = re.findall(r'"analogfx\.passes\.(\w+)"', contract)
    steps = [*ALL, *pipeline.WHOLE_GRAPH]
    assert {step.__name__ for step in steps} <= {*listed} and listed == sorted(listed)
