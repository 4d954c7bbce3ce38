"""``analogize(..., passes=...)``: what docs/passes.md does not show."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analogfx
from analogfx.errors import CaptureError, CheckpointError, PassError
from analogfx.passes.chain import insert_after, of_role

CONFIG = {"mapping": {"max_input_size": 4}}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def doubled(graph, context):
    """Double what every tile gives."""
    nodes = of_role(graph, "mvm")
    for node in nodes:
        insert_after(node, torch.mul, 2.0)
    return len(nodes)


def linear():
    torch.manual_seed(1)
    return nn.Linear(8, 5)


def expected(model):
    return F.linear(X, 2 * model.weight, model.bias)


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_acts_in_both_modes_and_on_gradients(training):
    model = linear()
    analog = analogfx.analogize(model, CONFIG, passes=[doubled]).train(training)
    torch.testing.assert_close(analog(X), expected(model))
    analog(X).sum().backward()
    torch.testing.assert_close(analog.weight.grad, 2 * X.sum(0).expand(5, 8))


def test_copies_and_later_constants_go_through_the_pass():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return F.linear(x, self.weight, self.bias) * scale

    torch.manual_seed(1)
    model = Scaled(8, 5)
    analog = analogfx.analogize(model, CONFIG, passes=(doubled,))
    torch.testing.assert_close(analog(X, scale=3.0), 3 * expected(model))
    torch.testing.assert_close(copy.deepcopy(analog)(X, scale=5.0), 5 * expected(model))


def test_a_pickled_model_has_the_pass():
    model = linear()
    again = pickle.loads(pickle.dumps(analogfx.analogize(model, CONFIG, passes=(doubled,))))
    torch.testing.assert_close(again(X), expected(model))


def test_a_changed_bias_is_followed_with_the_pass():
    analog = analogfx.analogize(linear(), CONFIG, passes=(doubled,))
    analog.bias = None
    torch.testing.assert_close(analog(X), F.linear(X, 2 * analog.weight))


def test_a_layer_without_a_site_is_left_alone():
    seen = []

    def note(graph, context):
        seen.append(context)
        return 0

    analogfx.analogize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"0": None}, passes=(note,))
    assert seen == []


def fails(graph, context):
    raise ValueError("no such column")


def breaks(graph, context):
    graph.find_nodes(op="output")[0].prepend(graph.find_nodes(op="placeholder")[0])
    return 1


@pytest.mark.parametrize("step", [fails, breaks])
def test_a_pass_that_fails_is_named_and_touches_nothing(step):
    model = linear()
    with pytest.raises(PassError, match=f"pass {step.__name__} failed on the graph of Linear"):
        analogfx.analogize(model, CONFIG, inplace=True, passes=(step,))
    assert type(model) is nn.Linear


def test_a_checkpoint_asks_for_the_passes(tmp_path):
    model = linear()
    analogfx.save(analogfx.analogize(model, CONFIG, passes=(doubled,)), tmp_path)
    again = analogfx.load(linear(), tmp_path, passes=(doubled,))
    torch.testing.assert_close(again(X), expected(model))
    with pytest.raises(CheckpointError, match=r"made with the passes \['doubled'\]; found \[\]"):
        analogfx.load(linear(), tmp_path)


def test_a_site_that_a_pass_opened_is_not_programmed():
    analog = analogfx.analogize(linear(), CONFIG, passes=(doubled,)).eval()
    with pytest.raises(CaptureError, match="its chain of ops is not one that lower knows"):
        analogfx.program(analog, noise_model=analogfx.chip.PCMLikeNoiseModel())


def test_two_tiles_have_two_products():
    counts = []

    def count(graph, context):
        counts.append(len(of_role(graph, "mvm")))
        return 0

    analogfx.analogize(linear(), CONFIG, passes=(count,))
    assert counts == [2, 2]
