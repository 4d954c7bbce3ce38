import copy
import operator

import pytest
import torch
from samples import (
    ALL_LAYERS,
    CONFIGS,
    EVERYTHING,
    IDENTITY,
    TILES,
    after,
    layer_and_input,
    merged,
    product,
    result,
    roles,
    run,
    targets,
    text,
)

import analogfx
from analogfx.kernels import patches
from analogfx.passes import pipeline
from analogfx.passes.lower import lower

pytestmark = pytest.mark.usefixtures("one_thread")

dialect = torch.ops.analogfx
FUSED = {dialect.analog_linear.default, dialect.analog_conv.default}


def lowered(module, config, training=True):
    graph, context = after(pipeline.EXPLICIT + pipeline.FUSED, module, config, training)
    return graph, context


def fused_ops(graph):
    return [n for n in graph.nodes if n.target in FUSED]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_site_becomes_one_op(config, tiles, training):
    for layer in ("linear", "conv2d", "grouped"):
        module, _ = layer_and_input(layer)
        graph, _ = lowered(module, merged(CONFIGS[config], tiles), training)
        assert len(fused_ops(graph)) == 1
        left = roles(graph).keys() - {
            "input", "weight", "bias", "seed", "state", "update_range", "store", "range", "fused",
        }  # fmt: skip
        assert not left, layer


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_a_second_run_changes_nothing(name):
    module, _ = layer_and_input(name)
    graph, context = lowered(module, merged(EVERYTHING, TILES))
    once = text(graph)
    assert lower(graph, context) == 0
    assert text(graph) == once


@pytest.mark.parametrize(
    ("layer", "config", "target", "unfolds"),
    [
        ("linear", EVERYTHING, dialect.analog_linear.default, False),
        ("conv2d", EVERYTHING, dialect.analog_conv.default, False),
        ("grouped", EVERYTHING, dialect.analog_conv.default, False),
        ("conv2d", {"mapping": {"max_output_size": 2}}, dialect.analog_conv.default, False),
        ("conv2d", {"mapping": {"max_input_size": 4}}, dialect.analog_linear.default, True),
        ("conv2d", CONFIGS["dynamic"], dialect.analog_linear.default, True),
    ],
)
def test_patches_are_made_only_where_they_are_cut_or_ranged(layer, config, target, unfolds):
    module, _ = layer_and_input(layer)
    graph, _ = lowered(module, config)
    assert [n.target for n in fused_ops(graph)] == [target]
    assert (patches.unfold_batched in targets(graph)) is unfolds


PAIRS = [(config, layer) for config in CONFIGS for layer in ("linear", "conv2d", "grouped")] + [
    (config, layer)
    for config in ("everything", "everything, dynamic")
    for layer in ALL_LAYERS.keys() - {"linear", "conv2d", "grouped"}
]


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["one tile", "tiles"])
@pytest.mark.parametrize(("config", "layer"), sorted(PAIRS))
def test_explicit_and_fused_graphs_compute_the_same(config, layer, tiles):
    module, x = layer_and_input(layer)
    analog = analogfx.analogize(module, merged(CONFIGS[config], tiles))
    if "learned clip" in config or "everything" in config:
        for name, parameter in analog.named_parameters():
            if name == "learnable_weight_clip":
                parameter.data *= 0.7  # let it clip
    explicit = result(copy.deepcopy(analog), x, explicit=True)
    fused = result(analog, x, explicit=False)
    torch.testing.assert_close(fused, explicit, rtol=1e-11, atol=1e-11)
    assert all(explicit["grads"][name].any() for name in ("weight", "learnable_weight_clip")
               if name in explicit["grads"])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_explicit_and_fused_linear_sites_agree_to_the_bit(dtype):
    module, x = layer_and_input("linear", dtype)
    config = merged(EVERYTHING, TILES)
    explicit = result(analogfx.analogize(module, config), x, explicit=True)["outputs"]
    fused = result(analogfx.analogize(module, config), x, explicit=False)["outputs"]
    assert all(torch.equal(a, b) for a, b in zip(explicit, fused, strict=True))
    assert all(y.dtype == dtype for y in fused)


# ------------------------------------------------------------------- chains that others changed


def node_of(graph, role):
    return next(n for n in graph.nodes if n.meta.get("made", ("", ""))[1] == role)


def explicit_chain(config=EVERYTHING, training=True):
    module, x = layer_and_input("linear")
    graph, context = after(pipeline.EXPLICIT, module, config, training)
    return graph, context, analogfx.analogize(module, config), x


@pytest.mark.parametrize("role", ["dac", "clip", "weight_noise", "mvm", "output_noise", "adc"])
def test_an_unknown_node_inside_a_chain_leaves_it_explicit_and_running(role):
    graph, context, analog, x = explicit_chain()
    expected = run(graph, analog, x)
    node = node_of(graph, role)
    with graph.inserting_after(node):
        unknown = graph.call_function(operator.mul, (node, 1.0))
    node.replace_all_uses_with(unknown, delete_user_cb=lambda user: user is not unknown)
    before = text(graph)
    assert lower(graph, context) == 0
    assert text(graph) == before
    fresh = analogfx.analogize(layer_and_input("linear")[0], EVERYTHING)
    assert torch.equal(run(graph, fresh, x), expected)


def test_a_reader_of_an_inner_value_leaves_the_chain_explicit():
    graph, context, _, _ = explicit_chain()
    node = node_of(graph, "dac")
    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0], node),)
    assert lower(graph, context) == 0


def test_a_chain_that_lacks_a_tiles_part_stays_explicit():
    graph, context, _, _ = explicit_chain(merged(EVERYTHING, {"mapping": {"max_input_size": 6}}))
    node = node_of(graph, "adc")
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)
    assert lower(graph, context) == 0
    assert not fused_ops(graph)


def test_only_the_changed_one_of_two_sites_stays_explicit():
    module = product(lambda self, x: x @ self.a @ self.b, a=(4, 5), b=(5, 3))
    graph, context = after(pipeline.EXPLICIT, module, CONFIGS["weight noise"], training=True)
    node = node_of(graph, "mvm")
    with graph.inserting_after(node):
        unknown = graph.call_function(operator.neg, (node,))
    node.replace_all_uses_with(unknown, delete_user_cb=lambda user: user is not unknown)
    assert lower(graph, context) == 1
    assert len(fused_ops(graph)) == 1 and dialect.mvm.default in targets(graph)
    analog = analogfx.analogize(module, CONFIGS["weight noise"])
    assert run(graph, analog, torch.randn(2, 4, dtype=torch.float64)).shape == (2, 3)


def test_scalars_are_read_off_the_graph():
    graph, context, analog, x = explicit_chain(CONFIGS["DAC"], training=False)
    node_of(graph, "dac").update_arg(2, 2.0)  # another pass has made the DAC coarser
    coarse = run(graph, analog, x)
    assert lower(graph, context) == 1
    torch.testing.assert_close(run(graph, analog, x), coarse, rtol=1e-12, atol=1e-12)
    fine, _ = lowered(layer_and_input("linear")[0], CONFIGS["DAC"], training=False)
    assert (run(fine, analog, x) - coarse).abs().max() > 0.01


def test_the_decision_moves_to_the_fused_output():
    module, _ = layer_and_input("linear")
    graph, context = lowered(module, IDENTITY)
    (node,) = (n for n in graph.nodes if "decision" in n.meta)
    assert node.meta["decision"] is context.sites[0].decision
    assert node.target is operator.getitem and node.args[0].target in FUSED


def test_seeds_are_drawn_from_the_input_once_for_each_site():
    module = product(lambda self, x: x @ self.a @ self.b, a=(4, 5), b=(5, 3))
    graph, _ = lowered(module, CONFIGS["weight noise"])
    seeds = [n for n in graph.nodes if n.target is dialect.draw_seed.default]
    assert len(seeds) == 2
