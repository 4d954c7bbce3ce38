import pytest
import torch

from analogfx.kernels.gates import CELLS
from analogfx.passes.recurrent import GATES

N, H = 3, 5


@pytest.fixture
def step(request):
    """A step of a kind: its operands, with gradients, and the state after it as the graphs say."""
    torch.manual_seed(0)
    kind = request.param
    cell = CELLS[kind]
    x, h = (torch.randn(N, cell.gates * H, dtype=torch.float64) for _ in range(2))
    state = [torch.randn(N, H, dtype=torch.float64) for _ in range(1 + (kind == "lstm"))]
    operands = [t.requires_grad_() for t in (x, h, *state)]
    return kind, cell, operands, GATES[kind](x, h, tuple(state))


def run(cell, x, h, *state):
    kept, out = x.new_empty(N, cell.kept * H), x.new_empty(N, H)
    held = state[-1].detach().clone()
    cell.step(x.detach(), h.detach().clone(), held, kept, out)
    return kept, out, held


@pytest.mark.parametrize("step", CELLS, indirect=True)
def test_a_step_in_place_is_the_step_of_graphs(step):
    kind, cell, operands, expected = step
    _, out, held = run(cell, *operands)
    torch.testing.assert_close(out, expected[0].detach())
    torch.testing.assert_close(held, (expected[1] if kind == "lstm" else operands[-1]).detach())


@pytest.mark.parametrize("step", CELLS, indirect=True)
def test_slopes_give_the_gradients_of_the_step_of_graphs(step):
    kind, cell, operands, after = step
    grads = [torch.randn_like(t) for t in after]
    expected = torch.autograd.grad(after, operands, grads, allow_unused=True)
    kept, out, held = run(cell, *operands)
    slopes = cell.slopes(kept, operands[-1].detach(), held if kind == "lstm" else out)
    of_h = torch.empty(N, cell.gates, H, dtype=torch.float64)
    of_x = torch.empty_like(of_h) if cell.apart else of_h
    d_cell = grads[1].clone() if kind == "lstm" else None
    past = slopes.at(slice(0, N)).back(grads[0], d_cell, of_h, of_x)
    torch.testing.assert_close(of_x.flatten(1), expected[0])
    torch.testing.assert_close(of_h.flatten(1), expected[1])
    if kind == "lstm":
        torch.testing.assert_close(d_cell, expected[3])
    assert (past is None) == (expected[2] is None)
    if past is not None:
        torch.testing.assert_close(past, expected[2])
