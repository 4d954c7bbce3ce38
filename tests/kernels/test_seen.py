import pytest
import torch

from analogfx.kernels import patches, seen, statistics
from analogfx.kernels.patches import Window
from analogfx.kernels.reference import UNTOUCHED

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = Window([3, 2], [2, 1], [1, 0], [1, 2])
ALWAYS = torch.tensor(True)


def state(tiles, count=0):
    low = torch.full((tiles,), -UNTOUCHED, dtype=torch.float64)
    counts = torch.full((tiles,), count)
    return seen.Ranges(torch.full((tiles,), 3.0, dtype=torch.float64), counts, low, -low)


def rule(mode="static", batches=5):
    return seen.Rule(mode, batches, 2.0, 0.9)


def collect(x, current, notes, how=None, sizes=(4, 3), window=None, groups=1, shares=True):
    how = how or rule()
    return seen.collect(x, current, how, groups, list(sizes), window, notes, ALWAYS, "", shares)


def nothing(tiles):
    return seen.nothing(tiles, torch.device("cpu"))


def inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + 5


@pytest.mark.parametrize("mode", ["static", "fast"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["linear", "conv"])
@pytest.mark.parametrize("count", [0, 3])
def test_one_forward_and_a_step_are_an_update(mode, window, count):
    x, sizes = (inputs(6, 7), [4, 3]) if window is None else (inputs(2, 3, 7, 6), [18])
    current = state(len(sizes), count)
    used, notes = collect(x, current, nothing(len(sizes)), rule(mode), sizes, window)
    expected = statistics.update_range(
        x, current.input_range, current.count, current.x_min, current.x_max,
        mode, 1, sizes, window, 5, 2.0, 0.9,
    )  # fmt: skip
    after = seen.updated(current, rule(mode), notes)
    found = (after.input_range, after.count, after.x_min, after.x_max)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert torch.equal(used, after.input_range)


def test_several_forwards_are_one_batch():
    current, notes = state(2, 3), nothing(2)
    parts = [inputs(n, 7, seed=n) for n in (6, 2, 9)]
    for x in parts:
        used, notes = collect(x, current, notes, rule(batches=100))
    std = torch.stack([torch.cat(parts)[:, s].std() for s in (slice(4), slice(4, 7))])
    torch.testing.assert_close(used, (3 * 3.0 + 3 * 2.0 * std) / 6)


def test_what_processes_saw_adds_up():
    """Uneven ones, too: the sum of what each noted is what one notes that sees all."""
    parts = [inputs(n, 7, seed=n) for n in (6, 2, 9)]
    for mode in ("static", "fast"):
        each = [collect(x, state(2), nothing(2), rule(mode))[1] for x in parts]
        _, whole = collect(torch.cat(parts), state(2), nothing(2), rule(mode))
        low = torch.stack([n[:, seen.LOW] for n in each]).amin(0)
        high = torch.stack([n[:, seen.HIGH] for n in each]).amax(0)
        found = seen.of_all(sum(map(seen.summands, each)), low, high)
        shared = [c for c in range(seen.COLUMNS) if c != seen.BEYOND]  # each by its own range
        torch.testing.assert_close(found[:, shared], whole[:, shared])
        assert found[:, seen.FORWARDS].tolist() == [1, 1]


def test_a_process_that_was_fed_less_often_changes_no_count():
    _, once = collect(inputs(6, 7), state(2), nothing(2))
    _, twice = collect(inputs(6, 7), state(2), once)
    none = nothing(2)
    total = sum(map(seen.summands, (once, twice, none)))
    found = seen.of_all(total, none[:, seen.LOW], none[:, seen.HIGH])
    assert found[:, seen.FORWARDS].tolist() == [2, 2]


def test_feeding_stops_and_the_share_goes_on():
    current, notes = state(2, 4), nothing(2)
    x = inputs(6, 7) * torch.tensor([10.0] * 4 + [0.1] * 3)  # beyond 3, and within
    first, notes = collect(x, current, notes)
    used, notes = collect(100 * x, current, notes)
    assert torch.equal(used, first)
    assert notes[:, seen.FORWARDS].tolist() == [1, 1]
    assert notes[:, seen.INPUTS].tolist() == [48, 36]
    beyond = [sum(int((k * x[:, s].abs() >= r).sum()) for k in (1, 100))
              for s, r in zip((slice(4), slice(4, 7)), first, strict=True)]  # fmt: skip
    assert notes[:, seen.BEYOND].tolist() == beyond


def test_the_share_of_a_convolution_is_that_of_its_patches():
    x = inputs(2, 3, 7, 6) - 5
    closed = seen.Ranges(torch.tensor([1.0]), *(getattr(state(1, 9), n) for n in
                         ("count", "x_min", "x_max")))  # fmt: skip
    _, notes = collect(x, closed, nothing(1), sizes=[18], window=WINDOW)
    rows = patches.unfold(x, WINDOW)
    assert notes[0, seen.BEYOND] == (rows.abs() >= 1).sum()
    assert notes[0, seen.INPUTS] == rows.numel()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e34])
@pytest.mark.parametrize("mode", ["static", "fast"])
def test_a_batch_of_nonsense_is_not_noted(mode, value):
    current = state(2)
    x = inputs(6, 7)
    x[0, 0] = value
    used, notes = collect(x, current, nothing(2), rule(mode), shares=False)
    assert notes[:, seen.FORWARDS].tolist() == [0, 1]
    assert used[0] == 3.0
    again, notes = collect(inputs(6, 7), current, notes, rule(mode), shares=False)
    good, _ = collect(inputs(6, 7), current, nothing(2), rule(mode), shares=False)
    assert again[0] == good[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_uses_what_the_first_forward_used_and_notes_nothing(use_reentrant):
    current, box, used = state(2), [nothing(2)], []

    def forward(x):
        r, box[0] = collect(x.detach(), current, box[0])
        used.append(r)
        return x * r.sum()

    x = inputs(6, 7).requires_grad_()
    torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    assert len(used) == 2 and torch.equal(*used)
    assert box[0][:, seen.FORWARDS].tolist() == [1, 1]
    assert box[0][:, seen.INPUTS].tolist() == [24, 18]
