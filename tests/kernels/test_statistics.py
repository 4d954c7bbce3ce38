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
