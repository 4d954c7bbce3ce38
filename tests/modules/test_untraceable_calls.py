import pytest
import torch
from samples import COARSE, IDENTITY
from torch import nn

import analogfx
from analogfx.errors import CaptureError


class Masked(nn.Module):
    """Multiplies by a weight of its own and calls a child; an optional argument indexes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.child = nn.Linear(4, 4)

    def forward(self, x, rows=None):
        y = self.child(x) @ self.w
        if rows is not None:
            y = torch.stack([y[i] for i in rows])
        return y


X = torch.randn(5, 4)
ROWS = torch.tensor([2, 0])


def test_a_call_that_cannot_be_traced_runs_the_own_forward_with_analog_children():
    digital = Masked()
    analog = analogfx.analogize(digital, COARSE)
    with pytest.warns(UserWarning, match=r"Masked: forward cannot be traced: it unpacks .* by w,"):
        y = analog(X, ROWS)
    child = analogfx.analogize(digital.child, COARSE)
    assert torch.equal(y, (child(X) @ digital.w)[ROWS])
    assert torch.equal(analog(X, ROWS), y)  # without another warning
    assert not torch.equal(analog(X)[ROWS], y)  # the usual call stays analog
    rows = [(s.name, s.status) for s in analogfx.report(analog).sites]
    assert rows == [("w", "analog"), ("w", "digital"), ("child", "analog")]
    seen = analogfx.audit(analog, X, ROWS)
    assert seen.ok and {p.status for p in seen.products} == {"analog", "digital"}


def test_it_computes_the_same_and_a_copy_knows_it():
    digital = Masked()
    analog = analogfx.analogize(digital, IDENTITY)
    with pytest.warns(UserWarning, match="own forward"):
        torch.testing.assert_close(analog(X, ROWS), digital(X, ROWS))
    twin = analogfx.to_digital(analogfx.analogize(digital, IDENTITY))
    torch.testing.assert_close(twin(X, ROWS), digital(X, ROWS))


def test_other_products_are_an_error_that_names_the_module():
    class Either(Masked):
        def forward(self, x, twice=False):
            return x @ self.w @ self.w if twice else x @ self.w

    analog = analogfx.analogize(nn.ModuleDict({"either": Either()}), IDENTITY)
    with pytest.raises(CaptureError, match=r"^either: the forward multiplies by"):
        analog["either"](X, twice=True)
