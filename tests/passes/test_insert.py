import pytest
import torch
from samples import (
    ALL_LAYERS,
    CONFIGS,
    EVERYTHING,
    IDENTITY,
    after,
    layer_and_input,
    merged,
    roles,
    run,
    text,
)

import analogfx
from analogfx.passes.insert import insert
from analogfx.passes.normalize import normalize
from analogfx.passes.select import select

pytestmark = pytest.mark.usefixtures("one_thread")

PASSES = (normalize, select, insert)


def inserted(module, config, training):
    """The explicit graph of a digital module, and the analog module that it runs on."""
    graph, context = after(PASSES, module, config, training)
    return graph, context, analogfx.analogize(module, config)


def census(config, training, layer="linear"):
    module, _ = layer_and_input(layer)
    graph, _, _ = inserted(module, config, training)
    return roles(graph)


# Detached inputs and constants of other nodes: their number is nothing to fix in a test.
INCIDENTAL = ("tile", "state")


@pytest.mark.parametrize("training", [True, False])
def test_an_identity_config_needs_no_more_than_the_product(training):
    needed = {role: n for role, n in census(IDENTITY, training).items() if role not in INCIDENTAL}
    assert needed == {"input": 2, "weight": 1, "row_max": 1, "mvm": 1, "bias": 2, "output": 1}


# What a config adds to the identity's nodes: in training, and in eval.
RANGE_TRAIN = {"range": 1, "tile_range": 1, "update_range": 1, "store": 4, "dac": 1}
RANGE_EVAL = {"range": 1, "tile_range": 1, "dac": 1}
ADDED = {
    "static range": (RANGE_TRAIN, RANGE_EVAL),
    "DAC": (RANGE_TRAIN, RANGE_EVAL),
    "fast": ({**RANGE_TRAIN, "adc": 1, "tile_max": 1}, {**RANGE_EVAL, "adc": 1, "tile_max": 1}),
    "dynamic": (
        {"tile_range": 1, "dac": 1, "adc": 1, "tile_max": 1},
        {"tile_range": 1, "dac": 1, "adc": 1, "tile_max": 1},
    ),
    "dynamic, no DAC": (
        {"tile_range": 1, "adc": 1, "tile_max": 1}, {"tile_range": 1, "adc": 1, "tile_max": 1}),
    "weight noise": ({"seed": 1, "weight_normal": 1, "weight_noise": 1, "tile_max": 1}, {}),
    "weight noise by row": ({"seed": 1, "weight_normal": 1, "weight_noise": 1}, {}),
    "output noise": (
        {**RANGE_TRAIN, "seed": 1, "output_normal": 1, "output_noise": 1, "tile_max": 1},
        RANGE_EVAL),
    "discrete": ({"quantize": 1, "tile_max": 1}, {"quantize": 1, "tile_max": 1}),
    "discrete rows": ({"quantize": 1}, {"quantize": 1}),
    "gaussian clip by row": ({**RANGE_TRAIN, "adc": 1}, {**RANGE_EVAL, "adc": 1}),
    "learned clip": (
        {**RANGE_TRAIN, "adc": 1, "clip": 1, "tile_clip": 1},
        {**RANGE_EVAL, "adc": 1, "clip": 1, "tile_clip": 1},
    ),
    "everything": (
        {**RANGE_TRAIN, "adc": 1, "clip": 1, "tile_clip": 1, "seed": 1, "weight_normal": 1,
         "weight_noise": 1, "output_normal": 1, "output_noise": 1, "tile_max": 2},
        {**RANGE_EVAL, "adc": 1, "clip": 1, "tile_clip": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ADDED)
def test_a_config_adds_its_nodes_and_no_others(name, training):
    added = census(CONFIGS[name], training)
    added.subtract(census(IDENTITY, training))
    found = {role: n for role, n in added.items() if n and role not in INCIDENTAL}
    assert found == ADDED[name][0 if training else 1]


def test_patches_and_groups_are_made_around_the_tile():
    plain, grouped = census(IDENTITY, False, "conv2d"), census(IDENTITY, False, "grouped")
    assert plain - census(IDENTITY, False) == {"input": 1, "weight": 1, "output": 1}
    assert grouped - plain == {"input": 1, "weight": 1, "output": 1}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_an_identity_config_computes_what_the_layer_computes(layer, training):
    module, x = layer_and_input(layer)
    graph, _, analog = inserted(module, IDENTITY, training)
    torch.testing.assert_close(run(graph, analog, x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_a_second_run_changes_nothing(training):
    module, _ = layer_and_input("grouped")
    graph, context, _ = inserted(module, EVERYTHING, training)
    once = text(graph)
    assert insert(graph, context) == 0
    assert text(graph) == once


def test_the_explicit_graph_reads_in_the_order_of_the_signal():
    module, _ = layer_and_input("linear")
    graph, _, _ = inserted(module, EVERYTHING, training=True)
    order = [n.meta["made"][1] for n in graph.nodes if "made" in n.meta]
    wanted = [
        "update_range", "range", "dac", "clip", "weight_noise", "mvm", "output_noise", "adc",
        "output",
    ]  # fmt: skip
    assert [order.index(role) for role in wanted] == sorted(order.index(role) for role in wanted)


def test_the_decision_stays_with_the_products_output():
    module, _ = layer_and_input("linear")
    graph, context, _ = inserted(module, EVERYTHING, training=True)
    (node,) = (n for n in graph.nodes if "decision" in n.meta)
    assert node.meta["decision"] is context.sites[0].decision
    assert node.meta["made"] == (0, "output")


def test_training_stores_statistics_and_eval_does_not():
    module, x = layer_and_input("linear")
    for training, count in ((True, 1), (False, 0)):
        graph, _, analog = inserted(module, CONFIGS["DAC and ADC"], training)
        run(graph, analog, x)
        assert analog.input_range_update_idx == count


def test_weights_and_inputs_are_not_written_to():
    module, x = layer_and_input("linear")
    graph, _, analog = inserted(module, EVERYTHING, training=True)
    before = [t.clone() for t in (x, analog.weight, analog.bias, analog.learnable_weight_clip)]
    run(graph, analog, x)
    after_ = (x, analog.weight, analog.bias, analog.learnable_weight_clip)
    assert all(torch.equal(a, b) for a, b in zip(before, after_, strict=True))


def test_ranges_can_be_off_and_weights_analog():
    config = merged(CONFIGS["weight noise"], CONFIGS["discrete"])
    module, x = layer_and_input("conv1d")
    graph, _, analog = inserted(module, config, training=True)
    assert not {"range", "dac", "update_range"} & roles(graph).keys()
    assert (run(graph, analog, x) - module(x)).abs().max() > 0.01
