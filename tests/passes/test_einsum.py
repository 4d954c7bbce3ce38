"""Einsum equations drawn at random; `test_normalize` has the table of spellings and refusals."""

import string

import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import IDENTITY, after, product, run, targets

from analogfx.passes.normalize import normalize


@st.composite
def contractions(draw):
    """An equation that one MVM computes, and the shapes of its operands."""
    letters = draw(st.permutations(string.ascii_letters[:10]))
    counts = [draw(st.integers(*bounds)) for bounds in ((0, 2), (1, 3), (0, 2))]
    kept, contracted, outputs = (letters[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(3))
    size = {c: draw(st.integers(1, 4)) for c in letters}
    x, w, y = (
        "".join(draw(st.permutations(terms)))
        for terms in (kept + contracted, contracted + outputs, kept + outputs)
    )
    more = draw(st.sampled_from(["", "..."]))
    leading = tuple(draw(st.lists(st.integers(1, 3), max_size=2))) if more else ()
    weight_first = draw(st.booleans())
    terms = f"{w},{more}{x}" if weight_first else f"{more}{x},{w}"
    shapes = leading + tuple(size[c] for c in x), tuple(size[c] for c in w)
    return f"{terms}->{more}{y}", weight_first, *shapes


@given(contractions())
def test_every_contraction_with_a_weight_is_one_linear_product(drawn):
    equation, weight_first, x_shape, w_shape = drawn

    def forward(self, x):
        operands = (self.w, x) if weight_first else (x, self.w)
        return torch.einsum(equation, *operands)

    module = product(forward, w=w_shape)
    graph, _ = after((normalize,), module, IDENTITY)
    called = targets(graph)
    assert called[torch.nn.functional.linear] == 1 and torch.einsum not in called
    x = torch.randn(x_shape, dtype=torch.float64)
    expected = module(x)
    y = run(graph, module, x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
