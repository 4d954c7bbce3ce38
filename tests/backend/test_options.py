import operator

import pytest
import torch
import torch.nn.functional as F
from compiled import DYNAMO_CONFIGS, QUIET, compiled, evaluated
from samples import CONFIGS, clip, merged, mlp, ranged, targets

import analogfx
from analogfx.backend.options import parse
from analogfx.errors import ConfigError
from analogfx.kernels import prepared
from analogfx.passes.pipeline import WHOLE_GRAPH


def test_defaults():
    options = parse(None)
    assert (options.freeze, options.report, options.compiler) == (True, False, "inductor")
    assert tuple(options.pipeline()) == WHOLE_GRAPH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freez": True}, r"options\['freez'\] = True: expected one of rpu_config, freeze"),
        ({"freeze": "no"}, r"options\['freeze'\] = 'no': expected True or False"),
        ({"report": 1}, r"options\['report'\] = 1: expected True or False"),
        ({"compiler": "xla"}, r"options\['compiler'\] = 'xla': expected one of inductor"),
        ({"passes": "freeze"}, r"options\['passes'\] = 'freeze': expected a list"),
        ({"passes": ["freeze", "melt"]}, r"options\['passes'\] = 'melt': expected a list of"),
        ({"mode": "fast"}, r"options\['mode'\] = 'fast': expected one of default, reduce-overhead"),
        ({"inductor": 3}, r"options\['inductor'\] = 3: expected a mapping"),
        ({"inductor": {"freez": 1}}, r"options\['inductor'\]\['freez'\] = 1: expected a setting"),
        ({"passes": [3]}, r"options\['passes'\] = 3: expected a list of functions and of names"),
    ],
)
def test_what_an_option_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(options)
    run = torch.compile(mlp(), backend="analogfx", options={"rpu_config": QUIET} | options)
    with pytest.raises(Exception, match=message):  # Dynamo wraps it
        run(torch.ones(2, 8))


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        parse({"freez": True, "report": 1, "compiler": "xla"})
    assert len(caught.value.conflicts) == 3


LEARNED = ranged(learn_input_range=True)
WRONG = {
    "learned range": (LEARNED, False, r"learn_input_range.*analogfx\.analogize"),
    "learned clip": (clip("LearnablePerChannel"), False, r"clip\.type.*analogfx\.analogize"),
    "clip in training": (CONFIGS["gaussian clip"] | {"pre_post": {}, "forward": {}}, True,
                         r"clip\.sigma.*optimizer.*analogize"),
    "no config": (None, False, r"options\['rpu_config'\].*the model is digital"),
    "a config that cannot run": ({"forward": {"inp_res": 6}}, False, r"forward\.inp_res"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_configs_that_the_backend_cannot_serve_are_refused(name):
    config, training, message = WRONG[name]
    with pytest.raises(Exception, match=message) as caught:
        compiled(mlp().train(training), config)(torch.ones(2, 8))
    assert isinstance(caught.value.inner_exception, ConfigError)


def test_a_gaussian_clip_is_served_in_eval_mode():
    config = clip("LayerGaussian", sigma=2.0)
    model = mlp().eval()
    twin = compiled(model, config)
    expected = analogfx.analogize(model, config)
    x = torch.randn(3, 8)
    torch.testing.assert_close(evaluated(twin, x), evaluated(expected, x))


def test_a_config_for_a_model_that_is_analog_is_refused():
    analog = analogfx.analogize(mlp(), QUIET)
    with pytest.raises(Exception, match="the model is analog already, with configs of its own"):
        compiled(analog, QUIET)(torch.ones(2, 8))


@pytest.mark.parametrize("config", [{"layers.*": QUIET}, lambda name, module: QUIET])
def test_a_function_takes_one_config(config):
    model = mlp()
    run = compiled(lambda x: model(x), config)
    with pytest.raises(Exception, match="a function has no module names to choose by"):
        run(torch.ones(2, 8))


def test_mode_and_settings_reach_inductor_beside_a_config(monkeypatch):
    import torch._inductor.compile_fx as inductor

    given = []

    def compile_fx(module, inputs, config_patches=None):
        given.append(config_patches)
        return module.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    settings = {"epilogue_fusion": False}
    run = compiled(mlp(), QUIET, "inductor", mode="reduce-overhead", inductor=settings)
    run(torch.ones(2, 8))
    compiled(mlp(), QUIET, "inductor")(torch.ones(2, 8))
    assert given == [{"triton.cudagraphs": True, **settings}, None]


# -------------------------------------------------------------------------------- freeze, passes


def graph_of(model, config=QUIET, **options):
    """What a compiler is given in eval mode without gradients."""
    seen = []

    def look(graph, context):
        seen.append(targets(graph))
        return 0

    passes = [*options.pop("passes", ["freeze", "share_input", "epilogue"]), look]
    evaluated(compiled(model, config, passes=passes, **options), torch.randn(3, 8))
    return seen[-1]


def test_freeze_may_be_left_out():
    assert graph_of(mlp())[prepared.linear] == 2
    assert graph_of(mlp(), freeze=False)[prepared.linear] == 0
    assert graph_of(mlp(), freeze=False)[torch.ops.analogfx.analog_linear.default] == 2


def test_passes_are_those_named():
    assert graph_of(mlp())[torch.relu] == 0
    assert graph_of(mlp(), passes=["freeze"])[torch.relu] == 1
    assert graph_of(mlp(), passes=["epilogue", "freeze"])[torch.relu] == 1  # nothing prepared yet


def test_a_pass_of_ones_own_runs_where_it_stands():
    def doubled(graph, context):
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(output):
            twice = graph.call_function(operator.mul, (output.args[0][0], 2))
        output.args = ((twice,),)
        return 1

    model = mlp()
    x = torch.randn(3, 8)
    plain = evaluated(compiled(model, QUIET), x)
    changed = evaluated(compiled(model, QUIET, passes=["freeze", doubled]), x)
    torch.testing.assert_close(changed, 2 * plain)


def test_passes_see_training_graphs_too():
    seen = []

    def look(graph, context):
        seen.append(targets(graph))
        return 0

    compiled(mlp(), DYNAMO_CONFIGS["identity"], passes=["skip_identity", look])(torch.ones(2, 8))
    compiled(mlp(), merged(QUIET), passes=["skip_identity", look])(torch.ones(2, 8))
    assert [graph[F.linear] for graph in seen] == [2, 0]
