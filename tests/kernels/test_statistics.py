import pytest
import torch
from torch.utils.checkpoint import checkpoint

from analogfx.kernels import patches, statistics
from analogfx.kernels.patches import Window

UNTOUCHED = 1e-5


def state(tiles, dtype=torch.float32):
    low, high = (
        torch.full((tiles,), -UNTOUCHED, dtype=dtype),
        torch.full((tiles,), UNTOUCHED, dtype=dtype),
    )
    return torch.full((tiles,), 3.0, dtype=dtype), torch.zeros(tiles, dtype=torch.int64), low, high


def update(x, current, mode="static", groups=1, in_sizes=None, window=None, **settings):
    batches, alpha, momentum = (
        settings.get(name, default)
        for name, default in (("init_from_data", 5), ("alpha", 2.0), ("momentum", 0.9))
    )
    in_sizes = in_sizes or [x.shape[-1] // groups]
    return statistics.update_range(
        x, *current, mode, groups, in_sizes, window, batches, alpha, momentum
    )


def test_static_is_a_running_mean_for_each_tile():
    torch.manual_seed(0)
    current, stds = state(2, torch.float64), []
    for step in range(4):
        x = torch.randn(6, 7, dtype=torch.float64) * (step + 1)
        stds.append(torch.stack([x[:, :4].std(), x[:, 4:].std()]))
        current = update(x, current, in_sizes=[4, 3])
        torch.testing.assert_close(current[0], 2.0 * torch.stack(stds).mean(0))
        assert current[1].tolist() == [step + 1] * 2


def test_fast_starts_at_the_first_extremes_and_follows_with_momentum():
    first, second = torch.tensor([[-1.0, 4.0]]), torch.tensor([[-3.0, 2.0]])
    current = update(first, state(1), mode="fast")
    torch.testing.assert_close(
        current[2:], (torch.tensor([-1.0 - UNTOUCHED]), torch.tensor([4.0 + UNTOUCHED]))
    )
    torch.testing.assert_close(current[0], torch.tensor([4.0 + UNTOUCHED]))
    current = update(second, current, mode="fast")
    torch.testing.assert_close(current[2], torch.tensor([-0.9 - 0.3]), rtol=1e-4, atol=0)
    torch.testing.assert_close(current[3], torch.tensor([3.6 + 0.2]), rtol=1e-4, atol=0)
    assert current[1] == 2


def test_fast_with_momentum_minus_1_keeps_the_extremes_ever_seen():
    current = state(1)
    for values in ([-1.0, 4.0], [-3.0, 2.0], [0.0, 1.0]):
        current = update(torch.tensor([values]), current, mode="fast", momentum=-1)
    torch.testing.assert_close(current[2], torch.tensor([-3.0]))
    torch.testing.assert_close(current[3], torch.tensor([4.0 + UNTOUCHED]))


@pytest.mark.parametrize("mode", ["static", "fast"])
def test_it_stops_after_init_from_data_batches(mode):
    torch.manual_seed(0)
    current = state(1)
    for _ in range(3):
        current = update(torch.randn(8, 4), current, mode=mode, init_from_data=3)
    later = update(100 * torch.randn(8, 4), current, mode=mode, init_from_data=3)
    assert all(torch.equal(a, b) for a, b in zip(current, later, strict=True))


def test_tiles_stop_on_their_own():
    x = torch.cat([torch.zeros(4, 3), torch.randn(4, 3)], dim=1)  # the first tile sees no spread
    current = update(x, state(2), in_sizes=[3, 3])
    assert current[1].tolist() == [0, 1] and current[0][0] == 3.0
    closed = update(
        torch.randn(4, 6), (current[0], torch.tensor([0, 5]), *current[2:]), in_sizes=[3, 3]
    )
    assert closed[1].tolist() == [1, 5]
    assert closed[0][0] != current[0][0] and closed[0][1] == current[0][1]


@pytest.mark.parametrize(
    "x", [torch.randn(0, 4), torch.zeros(3, 4), torch.ones(3, 4), torch.randn(1, 1)],
    ids=["no rows", "zeros", "constant", "one element"],
)  # fmt: skip
def test_inputs_without_a_spread_do_not_count_as_static(x):
    current = update(x, state(1))
    assert current[0] == 3.0 and current[1] == 0


@pytest.mark.parametrize("mode", ["static", "fast"])
@pytest.mark.parametrize("closed", [False, True])
def test_nothing_is_written_in_place_and_nothing_is_shared(mode, closed):
    current = state(1)
    if closed:
        current[1].fill_(5)
    before = [t.clone() for t in current]
    new = update(torch.randn(4, 3), current, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(current, before, strict=True))
    addresses = {t.data_ptr() for t in (*current, *new)}
    assert len(addresses) == 8


@pytest.mark.parametrize("mode", ["static", "fast"])
def test_groups_are_tiled_alike(mode):
    torch.manual_seed(0)
    x = torch.randn(5, 2 * 7, dtype=torch.float64)
    by_group = x.view(5, 2, 7)
    current = update(x, state(2, torch.float64), mode=mode, groups=2, in_sizes=[4, 3])
    parts = by_group[..., :4], by_group[..., 4:]
    for tile, part in enumerate(parts):
        alone = update(part.reshape(1, -1), state(1, torch.float64), mode=mode)
        torch.testing.assert_close(current[0][tile], alone[0][0])


@pytest.mark.parametrize("mode", ["static", "fast"])
def test_a_window_sees_patches_without_making_them(mode):
    torch.manual_seed(0)
    window = Window([3, 2], [2, 1], [1, 0], [1, 2])
    x = 1 + torch.randn(2, 3, 6, 7, dtype=torch.float64)
    rows = patches.unfold(x, window)
    current = state(1, torch.float64)
    for new, old in zip(
        update(x, current, mode=mode, window=window),
        update(rows, current, mode=mode),
        strict=True,
    ):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_give_float32_ranges(dtype):
    x = (100 * torch.randn(64, 32)).to(dtype)
    current = update(x, state(1))
    assert current[0].dtype == torch.float32 and current[1].dtype == torch.int64
    torch.testing.assert_close(current[0], 2 * x.float().std().view(1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_in_the_backward_is_known(use_reentrant):
    seen = []

    def forward(x):
        seen.append(statistics.in_backward())
        return x * x

    x = torch.randn(3, requires_grad=True)
    checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True]
    assert not statistics.in_backward()


WINDOW = Window([3, 3], [1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("momentum", [0.9, -1])
@pytest.mark.parametrize("mode", ["static", "fast"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["linear", "conv"])
@pytest.mark.parametrize("when", [0, 1])
def test_a_batch_that_is_not_finite_changes_nothing(when, window, mode, momentum, value):
    torch.manual_seed(0)
    shape = (4, 8) if window is None else (2, 3, 5, 5)
    current = update(torch.randn(shape), state(1), mode, window=window) if when else state(1)
    bad = torch.randn(shape)
    bad.view(-1)[3] = value
    settings = {"window": window, "momentum": momentum}
    for _ in range(9):  # it does not close the initialisation, either
        after = update(bad, current, mode, **settings)
        assert all(torch.equal(a, b) for a, b in zip(after, current, strict=True))
    good = update(torch.randn(shape), after, mode, **settings)
    assert good[1] == when + 1 and good[0].isfinite() and good[0] != current[0]


def test_only_the_tile_that_saw_it_leaves_a_batch_out():
    x = torch.randn(4, 6)
    x[0, 1] = float("nan")
    current = update(x, state(2), "fast", in_sizes=[3, 3])
    assert current[1].tolist() == [0, 1]
    torch.testing.assert_close(current[0], torch.tensor([3.0, x[:, 3:].abs().max()]))


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e30])
def test_the_spread_of_patches_neither_overflows_nor_vanishes(size):
    torch.manual_seed(0)
    x = size * torch.randn(2, 3, 5, 5)
    rows = patches.unfold(x.double(), WINDOW)
    std = patches.std(x, WINDOW).double()
    torch.testing.assert_close(std, rows.std(), rtol=1e-5, atol=0)


def test_a_batch_whose_spread_is_beyond_float32_does_not_count():
    x = torch.tensor([[[3e38, -3e38], [3e38, -3e38]]]).expand(2, 1, 2, 2)
    current = update(x, state(1), window=WINDOW, alpha=10.0)
    assert current[1] == 0 and current[0] == 3.0


@pytest.mark.parametrize("window", [None, WINDOW], ids=["linear", "conv"])
@pytest.mark.parametrize("mode", ["static", "fast"])
@pytest.mark.parametrize("when", [0, 1])
def test_an_absurd_batch_changes_nothing(when, mode, window):
    """What a stage of a pipeline reads of uninitialised memory, say."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    current = state(1)
    for _ in range(when):
        current = update(x, current, mode, window=window)
    after = update(2e34 * x, current, mode, window=window)
    for found, expected in zip(after, current, strict=True):
        assert torch.equal(found, expected)
    large = update(1e15 * x, current, mode, window=window)  # large, but its squares are numbers
    assert large[1] == when + 1 and large[0] > 1e14
