"""Products with a stack of matrices: every spelling of them, and equations drawn at random."""

import string

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from samples import IDENTITY, after, product, run, targets, text

import analogfx
from analogfx.passes.contract import EXPERTS
from analogfx.passes.normalize import normalize

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(x, count):
    """A matrix for every row, as the row's first number says."""
    return (x[..., 0] * 7).long().abs() % count


def offsets():
    return torch.tensor([1, 1, 5], dtype=torch.int32)


W, X = {"w": (2, 6, 4)}, (2, 3, 6)
T = {"w": (3, 4, 6)}

SPELLINGS = {
    # name: (forward, shapes of the parameters, shape of the input)
    "@": (lambda s, x: x @ s.w, W, X),
    "@ of one batch": (lambda s, x: x @ s.w, W, (1, 3, 6)),
    "@ of 2-D": (lambda s, x: x @ s.w, W, (3, 6)),
    "@ of 1-D": (lambda s, x: x @ s.w, W, (6,)),
    "@ of 4-D": (lambda s, x: x @ s.w, W, (5, 2, 3, 6)),
    "@ mT": (lambda s, x: x @ s.w.mT, {"w": (2, 4, 6)}, X),
    "weight @ x": (lambda s, x: s.w @ x, {"w": (2, 4, 3)}, X),
    "weight @ 2-D": (lambda s, x: s.w @ x, {"w": (2, 4, 3)}, (3, 6)),
    "weight @ 1-D": (lambda s, x: s.w @ x, T, (6,)),
    "bmm": (lambda s, x: torch.bmm(x, s.w), W, X),
    ".bmm": (lambda s, x: x.bmm(s.w), W, X),
    "bmm, keywords": (lambda s, x: torch.bmm(input=x, mat2=s.w), W, X),
    "bmm, no rows": (lambda s, x: torch.bmm(x, s.w), W, (2, 0, 6)),
    "weight.bmm": (lambda s, x: s.w.bmm(x), {"w": (2, 4, 3)}, X),
    "baddbmm": (
        lambda s, x: torch.baddbmm(s.b, x, s.w), {"w": (2, 6, 4), "b": (1, 1, 4)}, X),
    "einsum": (lambda s, x: torch.einsum("bni,bio->bno", x, s.w), W, X),
    "einsum, heads last": (
        lambda s, x: torch.einsum("nbi,bio->nbo", x, s.w), W, (3, 2, 6)),
    "einsum, ...": (lambda s, x: torch.einsum("...bi,bio->...bo", x, s.w), W, (5, 3, 2, 6)),
    "bmm of picked": (
        lambda s, x: torch.bmm(s.w[ids(x, 3)], x.unsqueeze(-1)).squeeze(-1), T, (5, 6)),
    "bmm of picked, on the right": (
        lambda s, x: torch.bmm(x.unsqueeze(1), s.w[ids(x, 2)]).squeeze(1), W, (5, 6)),
    "bmm of picked and transposed": (
        lambda s, x: torch.bmm(x.unsqueeze(1), s.w[ids(x, 3)].mT), T, (5, 6)),
    "@ of picked, two for a row": (
        lambda s, x: x.unsqueeze(1).unsqueeze(1)
        @ s.w[torch.stack([ids(x, 2), 1 - ids(x, 2)], 1)], W, (5, 6)),
    "einsum of picked": (
        lambda s, x: torch.einsum("ni,noi->no", x, s.w[ids(x, 3)]), T, (5, 6)),
    "einsum of picked, two for a row": (
        lambda s, x: torch.einsum(
            "nkoi,ni->nko", s.w[torch.stack([ids(x, 3), ids(x, 2)], 1)], x), T, (5, 6)),
    "einsum of picked, rows of rows": (
        lambda s, x: torch.einsum("nri,nio->nor", x, s.w[ids(x[:, 0], 2)]), W, (5, 2, 6)),
    "index_select": (
        lambda s, x: torch.bmm(s.w.index_select(0, ids(x, 3)), x.unsqueeze(-1)), T, (5, 6)),
}  # fmt: skip


def made(name):
    forward, shapes, x_shape = SPELLINGS[name]
    return product(forward, **shapes), torch.randn(x_shape, dtype=torch.float64)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_made_canonical_and_computes_the_same(name):
    module, x = made(name)
    graph, context = after((normalize,), module, IDENTITY)
    called = targets(graph)
    assert called[EXPERTS] == 1
    assert not {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, "bmm"} & set(called)
    assert not any("decision" in n.meta for n in graph.nodes)
    expected, y = module(x), run(graph, module, x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    once = text(graph)
    assert normalize(graph, context) == 0
    assert text(graph) == once


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_analog_product_and_its_gradients_are_those_of_the_spelling(name):
    digital, x = made(name)
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    (site,) = analogfx.report(analog).sites
    assert site.status == "analog" and len(site.weight_shape) == 3
    results = []
    for module in (digital, analog):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad, *(p.grad for p in module.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("function", [F.grouped_mm, torch._grouped_mm])
def test_grouped_mm(function):
    def forward(self, x, offs):
        return function(x, self.w.transpose(1, 2), offs=offs)

    module = product(forward, w=(3, 8, 16), dtype=torch.float32)
    x = torch.randn(5, 16)
    analog = analogfx.analogize(module, IDENTITY, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(analog(x, offsets()), module(x, offsets()))
    assert analogfx.report(analog).sites[0].kind == "grouped_mm"


REFUSED = {
    # name: (forward, shapes of the parameters, part of the reason)
    "grouped_mm without offsets": (
        lambda s, x: F.grouped_mm(x, s.w), W, "rows of an activation"),
    "baddbmm with factors": (
        lambda s, x: torch.baddbmm(x[..., :4], x, s.w, beta=2), W, "factors"),
    "picked, kept twice": (
        lambda s, x: torch.einsum("nabi,nio->nabo", x, s.w[ids(x[:, 0, 0], 2)]), W, "picked"),
    "picked, summed over rows": (
        lambda s, x: torch.einsum("ni,nio->o", x, s.w[ids(x, 2)]), W, "picked"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_form_is_refused_with_a_reason(name):
    forward, shapes, reason = REFUSED[name]
    graph, context = after((normalize,), product(forward, **shapes), IDENTITY)
    (decision,) = (n.meta["decision"] for n in graph.nodes if "decision" in n.meta)
    assert (decision.status, decision.name) == ("digital", "w")
    assert decision.weight_shape == shapes["w"] and reason in decision.reason
    assert normalize(graph, context) == 0


@st.composite
def contractions(draw):
    """An equation of an activation and a stack of matrices, and the shapes of its operands."""
    letters = draw(st.permutations(string.ascii_letters[:10]))
    counts = [draw(st.integers(*bounds)) for bounds in ((1, 2), (0, 2), (1, 2), (0, 2))]
    batch, kept, contracted, outputs = (
        letters[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(4)
    )
    size = {c: draw(st.integers(1, 3)) for c in letters}
    x, w, y = (
        "".join(draw(st.permutations(terms)))
        for terms in (
            batch + kept + contracted,
            batch + contracted + outputs,
            batch + kept + outputs,
        )
    )
    return f"{x},{w}->{y}", tuple(size[c] for c in x), tuple(size[c] for c in w)


@given(contractions())
def test_every_contraction_with_axes_of_matrices_is_one_product(drawn):
    equation, x_shape, w_shape = drawn
    module = product(lambda s, x: torch.einsum(equation, x, s.w), w=w_shape)
    graph, _ = after((normalize,), module, IDENTITY)
    called = targets(graph)
    assert called[EXPERTS] == 1 and torch.einsum not in called
    x = torch.randn(x_shape, dtype=torch.float64)
    expected, y = module(x), run(graph, module, x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
