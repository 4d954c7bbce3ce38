import pytest
import torch
import torch.nn.functional as F
from compiled import QUIET
from samples import product, text
from torch import nn
from whole_graph import Case, set_ranges

from analogfx.passes.epilogue import epilogue
from analogfx.passes.freeze import freeze
from analogfx.passes.skip_conversion import skip_conversion
from analogfx.passes.skip_dropout import skip_dropout

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def case_of(forward):
    case = Case(product(forward, dtype=torch.float32, w=(8, 8), v=(8, 8)), QUIET)
    set_ranges(case.analog)
    return case


OFF = {
    "by position": lambda y: F.dropout(y, 0.1, False),
    "by name": lambda y: F.dropout(y, p=0.1, training=False),
    "in place": lambda y: F.dropout(y, 0.1, False, True),
    "of channels": lambda y: F.dropout1d(y, 0.1, False),
    "alpha": lambda y: F.alpha_dropout(y, 0.1, training=False),
}


@pytest.mark.parametrize("name", OFF)
def test_what_is_off_goes_and_lets_the_passes_through(name):
    def forward(self, x):
        y = OFF[name](F.relu(F.linear(x, self.w)))
        return x + OFF[name](F.linear(y, self.v))

    case = case_of(forward)
    expected = case(X)
    assert case.apply(skip_dropout) == [2]
    assert torch.equal(case(X), expected)
    once = text(case.graph)
    assert case.apply(skip_dropout) == [0]
    assert text(case.graph) == once
    assert case.apply(freeze, epilogue, skip_conversion) == [2, 2, 1]
    assert torch.equal(case(X), expected)


@pytest.mark.parametrize("p", [0.5, 0.0])
def test_what_is_on_stays(p):
    case = case_of(lambda self, x: F.dropout(F.linear(x, self.w), p))
    expected = case(X)
    assert case.apply(skip_dropout) == [0]
    assert case.reasons("skip_dropout") == ["its module is in training mode"] or p == 0.5
    assert torch.equal(case(X), expected)


def test_a_model_in_eval_mode():
    import analogfx

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        (graph,) = analogfx.explain(model, QUIET, X).graphs
    counts = {step.name: step.count for step in graph.steps}
    assert (counts["skip_dropout"], counts["epilogue"], counts["skip_conversion"]) == (1, 1, 1)
