import pytest
import torch

from analogfx.kernels import philox

# Known answers of Random123 (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    assert philox.philox(words(counter), words(key)) == words(result)


def test_counters_are_computed_side_by_side():
    counters = [words(counter) for counter, _, _ in KNOWN]
    keys = [words(key) for _, key, _ in KNOWN]
    stacked = philox.philox(
        tuple(map(torch.stack, zip(*counters, strict=True))),
        tuple(map(torch.stack, zip(*keys, strict=True))),
    )
    for row, (_, _, result) in enumerate(KNOWN):
        assert tuple(word[row] for word in stacked) == words(result)


def test_normal_is_standard_normal():
    n = 1 << 20
    x = philox.normal(torch.tensor(7), 0, n).double()
    # Standard errors of the first four moments of n normal values; four of them.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - mean) < 4 * (variance / n) ** 0.5, power
    tail = (x.abs() > 3).double().mean()
    assert abs(tail - 0.0026998) < 4 * (0.0026998 / n) ** 0.5


def test_neighbours_are_uncorrelated():
    n = 1 << 18
    x = philox.normal(torch.tensor(3), 0, n).double()
    for lag in (1, 2, 3, 4, 8):
        assert abs((x[lag:] * x[:-lag]).mean()) < 4 / n**0.5, lag


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 5, 1023])
def test_a_value_depends_on_its_index_alone(numel):
    seed = torch.tensor(11)
    assert torch.equal(philox.normal(seed, 5, numel), philox.normal(seed, 5, 2048)[:numel])


def test_streams_and_seeds_are_different_draws():
    draws = [
        philox.normal(torch.tensor(seed), stream, 64)
        for seed, stream in ((1, 0), (1, 1), (2, 0), (1 + (1 << 32), 0))
    ]
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert (first != second).all()


def test_values_are_finite_float32():
    x = philox.normal(torch.tensor(-1), 3, 1 << 16)
    assert x.dtype == torch.float32 and x.isfinite().all()
