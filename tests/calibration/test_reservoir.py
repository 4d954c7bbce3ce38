import torch
from hypothesis import given
from hypothesis import strategies as st

from analogfx.calibration.reservoir import Reservoir


def filled(size, batches, seed=0):
    reservoir = Reservoir(size, torch.Generator().manual_seed(seed))
    for batch in batches:
        reservoir.add(batch)
    return reservoir.rows()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.integers(1, 10))
def test_it_is_bounded_and_holds_rows_that_were_added_once(lengths, size):
    rows = torch.arange(float(sum(lengths))).unsqueeze(1).repeat(1, 3)
    kept = filled(size, rows.split(lengths))
    assert kept.shape == (min(size, len(rows)), 3)
    numbers = kept[:, 0]
    assert len(numbers.unique()) == len(numbers)
    assert torch.equal(kept, rows[numbers.long()])


def test_every_row_is_as_likely_whatever_its_batch():
    """Batches of very different size, late ones too: a row stays with size / count."""
    lengths, size, runs = [1, 40, 3, 6, 150], 20, 3000
    rows = torch.arange(float(sum(lengths))).unsqueeze(1)
    kept = torch.zeros(len(rows))
    for seed in range(runs):
        kept[filled(size, rows.split(lengths), seed).flatten().long()] += 1
    share = size / len(rows)
    error = (share * (1 - share) / runs) ** 0.5
    assert ((kept / runs - share).abs() < 5 * error).all()
    # And in sum over the last batch, where a bias would show much sooner.
    late = kept[-150:].sum() / runs
    assert abs(late - size * 150 / 200) < 5 * (size * 0.75 * 0.25 / runs) ** 0.5


def test_it_does_not_hold_on_to_what_it_was_shown():
    batch = torch.randn(1000, 50, dtype=torch.bfloat16)
    kept = filled(10, [batch])
    assert kept.untyped_storage().nbytes() == 10 * 50 * 2
    same = filled(1000, [batch])
    batch.zero_()
    assert same.any()
