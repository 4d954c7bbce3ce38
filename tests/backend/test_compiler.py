import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from compiled import (
    DYNAMO_CONFIGS,
    QUIET,
    RESUMES,
    assert_same,
    compiled,
    evaluated,
    ranges,
    report_of,
    stack,
    step,
    twins,
)
from samples import ALL_LAYERS, IDENTITY, TILES, layer_and_input, merged, mlp, product
from torch import nn

import analogfx
from analogfx.errors import CaptureError, PlacementError
from analogfx.passes.pipeline import WHOLE_GRAPH

# What Inductor imports on its first use.
INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")


class Net(nn.Module):
    """A convolution, whose output two linear layers read, and a sum at the end."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.one, self.two = nn.Linear(20, 6), nn.Linear(20, 6, bias=False)

    def forward(self, x):
        h = F.relu(self.conv(x)).flatten(1)
        return self.one(h) + F.gelu(self.two(h))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double(), torch.randn(7, 2, 5, dtype=torch.float64)


def assert_equal_runs(model, x, config, compiler, steps=2):
    """Training, eval with gradients, eval without: outputs, gradients, ranges and noise.

    To the bit where sites stay one op each; in eval mode those that change nothing are plain
    products, and without gradients several may be one, which sum in another order.
    """
    exact = compiler != "inductor"
    twin, analog = twins(model, config, compiler=compiler)
    for seed in range(steps):
        assert_same(step(twin, x, seed), step(analog, x, seed), exact and config != IDENTITY)
    assert_same(ranges(twin), ranges(analog), exact)
    twin.eval(), analog.eval()
    exact = exact and "pre_post" in config
    assert_same(step(twin, x, 5, False), step(analog, x, 5, False), exact)
    assert_same(evaluated(twin, x), evaluated(analog, x), exact=False)
    assert_same(ranges(twin), ranges(analog), exact)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("config", DYNAMO_CONFIGS)
def test_a_compiled_digital_model_is_the_analogized_one(config, compiler):
    assert_equal_runs(*net(), DYNAMO_CONFIGS[config], compiler)


@pytest.mark.parametrize("config", ["DAC and ADC", "everything", "everything, dynamic", "fast"])
def test_it_is_on_tiles_too(config):
    assert_equal_runs(*net(), merged(DYNAMO_CONFIGS[config], TILES), "eager")


@INDUCTOR
def test_it_is_behind_inductor_too():
    x = torch.randn(5, 8, dtype=torch.float64)
    assert_equal_runs(mlp().double(), x, DYNAMO_CONFIGS["everything"], "inductor")


@pytest.mark.parametrize("config", [QUIET, DYNAMO_CONFIGS["everything, dynamic"]])
@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_every_kind_of_layer(layer, config):
    module, x = layer_and_input(layer)
    assert_equal_runs(module, x, config, "eager")


def test_an_analogized_model_keeps_its_numbers():
    model, x = net()
    analog = analogfx.analogize(model, merged(DYNAMO_CONFIGS["everything"], TILES))
    analog(x)
    twin = compiled(copy.deepcopy(analog), None, fullgraph=True)
    assert_same(step(twin, x, 3, False), step(analog, x, 3, False))
    assert_same(twin._orig_mod.state_dict(), analog.state_dict())
    assert_same(evaluated(twin, x), evaluated(analog, x), exact=False)


def test_learned_ranges_and_clips_of_an_analogized_model_learn():
    config = merged(QUIET, {"pre_post": {"input_range": {"learn_input_range": True}}},
                    {"clip": {"type": "LearnablePerChannel"}})  # fmt: skip
    model, x = net()
    analog = analogfx.analogize(model, config)
    twin = compiled(copy.deepcopy(analog), None)
    for seed in range(3):
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert all(p.grad is not None for p in twin.parameters())


FOUND_BY_NAME = """
import torch
config = {"modifier": {"quantization_type": "Discretize", "res": 2}}
model = torch.nn.Linear(4, 3, bias=False).requires_grad_(False)
run = torch.compile(model, backend="analogfx",
                    options={"rpu_config": config, "compiler": "eager"})
held = run(torch.eye(4)).T
top = model.weight.abs().max()
assert all(min(abs(v - c) for c in (-top, 0, top)) < 1e-6 for v in held.flatten()), held
print(len(held.unique()))
"""


def test_the_backend_is_found_by_name_without_an_import():
    done = subprocess.run(
        [sys.executable, "-c", FOUND_BY_NAME], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 1 < int(done.stdout) <= 3


def test_model_compile_finds_it_too():
    model, x = net()
    analog = analogfx.analogize(model, QUIET)
    model.compile(backend="analogfx", options={"rpu_config": QUIET, "compiler": "eager"})
    assert_same(step(model, x, 1), step(analog, x, 1))
    assert report_of(model).keys() == report_of(analog).keys()


@INDUCTOR
def test_an_analogized_model_behind_inductor_in_a_mode_of_torchs():
    model, x = net()
    analog = analogfx.analogize(model, merged(QUIET, TILES)).eval()
    run = torch.compile(analog, backend="analogfx", mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        assert_same(run(x), analog(x), exact=False)


# ------------------------------------------------------------------------ what a call may be like


def graphs_of(model, config=QUIET, **options):
    """A compiled model and the list of graphs compiled for it so far."""
    graphs = []

    def note(graph, context):
        graphs.append(graph)
        return 0

    return compiled(model, config, passes=[note], **options), graphs


def test_each_mode_is_compiled_once():
    run, graphs = graphs_of(mlp())
    x = torch.randn(3, 8)
    for training in (True, False, True, False):
        run.train(training)
        run(x)
    assert len(graphs) == 2
    with torch.no_grad():
        run(x)
    run(x)
    assert len(graphs) == 3


def test_modules_may_be_in_modes_of_their_own():
    model = mlp()
    twin, analog = twins(model, DYNAMO_CONFIGS["everything"])
    x = torch.randn(5, 8)
    for first, second in [(True, False), (False, True), (True, True)]:
        for m in (model, analog):
            m.first.train(first), m.second.train(second)
        assert_same(step(twin, x, 1), step(analog, x, 1))
    assert_same(ranges(twin), ranges(analog))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("then", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_ways_to_leave_gradients_out_may_change(guard, then):
    twin, analog = twins(mlp().eval(), QUIET)
    analog.eval()
    x = torch.randn(5, 8)
    for way in (guard, then, guard):
        with way():
            assert_same(twin(x), analog(x))


def test_gradients_switched_on_inside_are_gradients():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            with torch.enable_grad():
                return self.layer(x)

    twin, analog = twins(Inside().eval(), QUIET)
    analog.eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        results = twin(x), analog(x)
    assert_same(*results)
    for y in results:
        y.sum().backward()
    assert_same(twin.layer.weight.grad, analog.layer.weight.grad)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_autocast_around_the_call(compiler):
    twin, analog = twins(mlp(), DYNAMO_CONFIGS["everything"], compiler=compiler)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = step(twin, x, 0), step(analog, x, 0)
        assert found[0].dtype == torch.bfloat16
        assert_same(found, expected)
        assert_same(evaluated(twin, x), evaluated(analog, x))
    assert_same(evaluated(twin, x), evaluated(analog, x))


def test_autocast_inside_the_model():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.a(x) + self.c(x)
            return self.b(y.float()) + self.c(x)

    twin, analog = twins(Inner(), QUIET)
    x = torch.randn(3, 4)
    assert_same(step(twin, x, 0), step(analog, x, 0))
    assert_same(evaluated(twin, x), evaluated(analog, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_and_a_change_of_them(dtype):
    model = mlp()
    twin, analog = twins(model, DYNAMO_CONFIGS["everything"])
    x = torch.randn(5, 8)
    assert_same(step(twin, x, 0), step(analog, x, 0))
    evaluated(twin, x)
    for m in (model, analog):
        m.to(dtype).train()
    assert_same(step(twin, x.to(dtype), 1), step(analog, x.to(dtype), 1))
    assert_same(evaluated(twin, x.to(dtype)), evaluated(analog, x.to(dtype)))
    assert_same(ranges(twin), ranges(analog))


def test_batches_of_any_size_share_the_state():
    twin, analog = twins(mlp(), DYNAMO_CONFIGS["everything"])
    for seed, batch in enumerate((3, 5, 9, 1, 5)):
        x = torch.randn(batch, 8)
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert_same(ranges(twin), ranges(analog))
    for batch in (2, 4):
        x = torch.randn(batch, 8)
        assert_same(evaluated(twin, x), evaluated(analog, x))


def test_an_empty_batch():
    twin, analog = twins(mlp(), QUIET)
    x = torch.randn(0, 8)
    assert_same(step(twin, x, 0), step(analog, x, 0))
    assert_same(ranges(twin), ranges(analog))
    assert evaluated(twin, x).shape == (0, 4)


# ---------------------------------------------------------------------- graphs that modules share


def test_blocks_that_share_a_graph_have_their_own_ranges():
    twin, analog = twins(stack(), DYNAMO_CONFIGS["everything"])
    for seed in range(3):
        x = torch.randn(5, 8)
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert len(ranges(twin)) == 24
    assert_same(ranges(twin), ranges(analog))


def test_blocks_that_share_a_graph_have_their_own_frozen_values():
    model = stack()
    twin, analog = twins(model, QUIET)
    x = torch.randn(5, 8)
    step(twin, x, 0), step(analog, x, 0)
    for _ in range(2):
        assert_same(evaluated(twin, x), evaluated(analog, x))
    for m in (model, analog):
        with torch.no_grad():
            m.blocks[1].key.weight.mul_(-1)
    assert_same(evaluated(twin, x), evaluated(analog, x))


def test_a_block_whose_ranges_differ_gets_a_graph_of_its_own_once():
    model = stack()
    analog = analogfx.analogize(model, QUIET)
    analog(torch.randn(5, 8))
    with torch.no_grad():
        analog.blocks[1].query.input_range.mul_(0.4)
    analogfx.backend_state(model).load_state_dict(analog.state_dict())
    x = 3 * torch.randn(5, 8)
    twin = compiled(model, QUIET)
    counts = []
    for _ in range(12):
        assert_same(evaluated(twin, x), evaluated(analog, x))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[2] == counts[-1]


@RESUMES
@pytest.mark.parametrize("digital", ["blocks.1", "re:blocks.[02].*"])
def test_patterns_tell_blocks_apart_that_share_a_graph(digital):
    rules = {digital: None, "*": DYNAMO_CONFIGS["everything"]}
    twin, analog = twins(stack(), rules)
    x = torch.randn(5, 8)
    for seed in range(2):
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert_same(ranges(twin), ranges(analog))
    assert report_of(twin) == report_of(analog)


def test_a_layer_that_is_called_twice_has_one_state():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    twin, analog = twins(Twice(), DYNAMO_CONFIGS["everything"])
    x = torch.randn(5, 6)
    assert_same(step(twin, x, 0), step(analog, x, 0))
    assert ranges(twin)["layer.input_range_update_idx"] == 2
    assert_same(ranges(twin), ranges(analog))


class Tied(nn.Module):
    """An embedding and two linear layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 8)
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.up.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.up(self.table.weight[:5] + x)) * 3)


@pytest.mark.parametrize(
    "config", [DYNAMO_CONFIGS["everything"], {"head": None, "*": QUIET}, {"up": None, "*": QUIET}]
)
def test_modules_with_one_weight_have_a_config_and_a_state_each(config):
    twin, analog = twins(Tied(), config)
    x = torch.randn(5, 8)
    for seed in range(2):
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert_same(ranges(twin), ranges(analog))
    assert_same(evaluated(twin, x), evaluated(analog, x))


class Head(nn.Module):
    """Products of the model's own code with its children's weights."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.down, self.up = (nn.Parameter(torch.randn(*shape)) for shape in ((2, 8), (8, 2)))

    def forward(self, x):
        h = torch.tanh(self.layer(self.table.weight[:5] + x))
        h = h + F.linear(h, self.up @ self.down + self.layer.weight)
        return F.linear(h, self.table.weight)


@pytest.mark.parametrize(
    "config",
    [DYNAMO_CONFIGS["everything"], {"table": None, "*": QUIET}, {"layer": QUIET}, {"table": QUIET}],
)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["root", "below"])
def test_the_module_whose_code_multiplies_is_the_one_that_is_asked(wrap, config):
    if wrap is nn.Sequential and isinstance(config, dict) and len(config) <= 2:
        config = {f"0.{k}" if k in ("table", "layer") else k: c for k, c in config.items()}
    twin, analog = twins(wrap(Head()), config)
    x = torch.randn(5, 8)
    for seed in range(2):
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert_same(ranges(twin), ranges(analog))
    sites = [sorted(map(str, analogfx.report(m).sites)) for m in (twin, analog)]
    assert sites[0] == sites[1]


@RESUMES
def test_behind_a_graph_break_the_model_multiplies_still():
    class Broken(Head):
        def forward(self, x):
            h = self.layer(x)
            torch._dynamo.graph_break()
            return F.linear(torch.tanh(h), self.table.weight)

    twin, analog = twins(Broken(), QUIET)
    x = torch.randn(5, 8)
    assert_same(twin(x), analog(x))
    assert_same(ranges(twin), ranges(analog))


# ------------------------------------------------------------------------------- kinds of products


def shapes(**parameters):
    return parameters


@pytest.mark.parametrize(
    ("forward", "parameters"),
    [
        (lambda self, x: x @ self.w, shapes(w=(6, 4))),
        (lambda self, x: torch.addmm(self.b, x, self.w.t()), shapes(w=(4, 6), b=(4,))),
        (lambda self, x: torch.einsum("ni,oi->no", x, self.w), shapes(w=(4, 6))),
        (lambda self, x: F.linear(x, self.w[1]) + x @ self.w[0].t(), shapes(w=(2, 4, 6))),
        (lambda self, x: sum(F.linear(x, self.w[i]) for i in range(3)), shapes(w=(3, 4, 6))),
        (lambda self, x: F.conv1d(x[:, None], self.w, padding=1), shapes(w=(4, 1, 3))),
    ],
)  # fmt: skip
def test_functional_products_become_analog(forward, parameters):
    model = product(forward, dtype=torch.float32, **parameters)
    twin, analog = twins(model, DYNAMO_CONFIGS["everything"])
    x = torch.randn(5, 6)
    for seed in range(2):
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert_same(ranges(twin), ranges(analog))
    assert_same(evaluated(twin, x), evaluated(analog, x))
    assert analogfx.report(twin).coverage == 1


def test_what_no_tile_computes_is_refused_with_a_reason():
    model = product(lambda self, x: x @ self.w, dtype=torch.float32, w=(1, 2, 3, 4))
    twin = compiled(model, QUIET)
    twin(torch.randn(2, 5, 3))
    assert report_of(twin) == {"w": ("digital", "the weight has 4 dimensions, a tile has 2")}


def test_a_weight_of_a_parametrization():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
    twin, analog = twins(model, DYNAMO_CONFIGS["everything"])
    x = torch.randn(5, 6)
    for seed in range(2):
        assert_same(step(twin, x, seed), step(analog, x, seed))
    assert_same(ranges(twin), ranges(analog))
    assert_same(evaluated(twin, x), evaluated(analog, x))


def test_a_function_that_closes_over_a_module():
    model = mlp()
    analog = analogfx.analogize(model, QUIET)
    run = compiled(lambda x: model(x) * 2, QUIET)
    x = torch.randn(5, 8)
    assert_same(run(x), analog(x) * 2)
    assert_same(ranges(model), ranges(analog))


W = nn.Parameter(torch.randn(4, 8))


@pytest.mark.parametrize("how", ["global", "closure", "argument"])
def test_a_parameter_that_no_module_holds_is_refused(how):
    w = nn.Parameter(torch.randn(4, 8))
    functions = {
        "global": (lambda x: F.linear(x, W), ()),
        "closure": (lambda x: F.linear(x, w), ()),
        "argument": (F.linear, (w,)),
    }
    function, more = functions[how]
    run = compiled(lambda x, *more: function(x, *more), QUIET)
    with pytest.raises(Exception, match="cannot tell which module holds this parameter") as caught:
        run(torch.randn(3, 8), *more)
    assert isinstance(caught.value.inner_exception, CaptureError)


def test_a_function_of_a_digital_model_needs_a_config():
    model = mlp()
    analog = analogfx.analogize(model, QUIET)
    x = torch.randn(3, 8)
    with pytest.raises(Exception, match="a config: the model is digital"):
        compiled(lambda x: model(x), None)(x)
    assert_same(compiled(lambda x: 2 * analog(x), None)(x), 2 * analog(x), exact=False)


# ------------------------------------------------------------------------- what Dynamo leaves out


class Routed(nn.Module):
    """An expert that the data chooses: Dynamo gives up on the loop and runs it as it is."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            torch._dynamo.graph_break()
            rows = chosen == number
            out[rows] = torch.compiler.disable(self.experts[number])(x[rows])
        return out


def test_what_no_graph_has_contained_is_in_the_report_as_digital():
    twin = compiled(Routed(), QUIET)
    twin(torch.randn(6, 4))
    found = report_of(twin)
    assert found["gate"][0] == "analog"
    assert {found[f"experts.{i}"][0] for i in range(2)} == {"digital"}
    assert "in none of the graphs so far" in found["experts.0"][1]
    assert analogfx.report(twin).coverage < 0.3


def test_a_model_that_has_not_run_has_no_report():
    with pytest.raises(PlacementError, match="carries no placement"):
        analogfx.report(compiled(mlp(), QUIET))


def test_a_product_inside_an_op_stays_digital_with_a_warning():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = torch.cond(x.sum() > 0, lambda x: self.inside(x), lambda x: x.clone(), (x,))
            return self.outside(y)

    model = Branch().eval()
    twin = compiled(model, merged(QUIET, {"forward": {"inp_res": 2}}))
    x = torch.rand(3, 4)
    message = r"inside.weight stays digital: .* inside cond.*\. analogize\(\) makes it analog"
    with torch.no_grad(), pytest.warns(UserWarning, match=message):
        y = twin(x)
    assert report_of(twin)["inside"][0] == "digital"
    assert report_of(twin)["outside"] == ("analog", "")
    assert not torch.equal(y, model.outside(model.inside(x)))


def test_the_last_graph_that_dynamo_compiles_is_a_warning():
    twin = compiled(mlp(), QUIET, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        for batch in (2, 3):
            twin(torch.randn(batch, 8))
        with pytest.warns(UserWarning, match="graph 3 of 3 .*recompile_limit.*run digitally"):
            twin(torch.randn(4, 8))


def test_two_compilations_of_one_model_share_its_state():
    model = mlp()
    analog = analogfx.analogize(model, QUIET)
    one, two = compiled(model, QUIET), compiled(model, QUIET, freeze=False)
    for run in (one, two, one):
        x = torch.randn(5, 8)
        assert_same(run(x), analog(x))
    assert_same(ranges(one), ranges(analog))
    assert_same(ranges(two), ranges(analog))


def test_the_report_is_that_of_analogize():
    for config in (merged(QUIET, TILES), {"first": None, "*": QUIET}, {"first": QUIET}, IDENTITY):
        twin, analog = twins(mlp(), config)
        twin(torch.randn(2, 8))
        assert analogfx.report(twin) == analogfx.report(analog)


@pytest.mark.parametrize("how", ["digital", "analog", "function"])
def test_the_report_with_the_counts_of_the_passes_is_printed_on_demand(capsys, how):
    model = mlp().eval()
    if how == "analog":
        model = analogfx.analogize(model, QUIET)
    function = (lambda x: model(x)) if how == "function" else model
    run = compiled(function, None if how == "analog" else QUIET, report=True)
    with torch.no_grad():
        run(torch.randn(2, 8))
    printed = capsys.readouterr().out
    assert "2 of 2 products analog" in printed or how == "function"
    changed = {"freeze": 2, "epilogue": 1, "skip_conversion": 1}
    counts = ", ".join(f"{p.__name__} {changed.get(p.__name__, 0)}" for p in WHOLE_GRAPH)
    assert f"changed by whole-graph passes: {counts}" in printed
    if how != "function":
        assert analogfx.report(run).passes["freeze"] == 2
        assert analogfx.report(run).to_dict()["passes"]["epilogue"] == 1


class Latents(nn.Module):
    """A layer that is called with a learned query, and one with a weight computed by a product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.latents = nn.Parameter(torch.randn(3, 4))
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        scores = self.query(self.latents) @ self.key(x).t()
        return torch.nn.functional.linear(scores.t() @ self.latents, self.b @ self.a)


def test_a_learned_query_is_an_activation_and_a_product_of_weights_is_a_weight():
    digital, x = Latents().eval(), torch.randn(5, 4)
    options = {"rpu_config": {"forward": {}}, "compiler": "eager"}
    compiled = torch.compile(digital, backend="analogfx", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), digital(x))
    theirs = analogfx.report(analogfx.analogize(digital, {"forward": {}}))
    ours = analogfx.report(digital)
    places = [{(s.parameter, s.status, s.weight_shape) for s in r.sites} for r in (ours, theirs)]
    assert places[0] == places[1] and ours.coverage == 1.0
    assert {name for name, *_ in places[0]} == {"query.weight", "key.weight", "latents", "b"}
