import pytest
import torch

from analogfx.kernels import row_noise

N, OUTPUTS, INPUTS = 3, 4, 6


def operands(rank):
    """x (N, I) and g (N, O) of a rank."""
    torch.manual_seed(0)
    made = []
    for features in (INPUTS, OUTPUTS):
        factors = torch.randn(N, rank), torch.randn(rank, features)
        made.append((factors[0] @ factors[1]).double())
    return made


def jacobian(function, count):
    """The matrix of a linear function of so many numbers."""
    return torch.stack([function(unit) for unit in torch.eye(count, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_what_is_read_has_the_covariances_that_drawn_noise_gives(rank):
    """Exactly: both are linear in what is drawn, so their matrices say all of a Gaussian."""
    x, g = operands(rank)

    def by_rows(drawn):
        z, fresh = drawn[: N * OUTPUTS].view(N, OUTPUTS), drawn[N * OUTPUTS :].view(N, INPUTS)
        read, basis = row_noise.read(x, z)
        return torch.cat([read.flatten(), row_noise.read_back(g, basis, z, fresh).flatten()])

    def by_matrix(drawn):
        noise = drawn.view(OUTPUTS, INPUTS)
        return torch.cat([(x @ noise.T).flatten(), (g @ noise).flatten()])

    found = jacobian(by_rows, N * (OUTPUTS + INPUTS))
    expected = jacobian(by_matrix, OUTPUTS * INPUTS)
    torch.testing.assert_close(found @ found.T, expected @ expected.T)


def test_equal_rows_read_the_same():
    x = torch.randn(1, INPUTS).expand(N, INPUTS)
    read, _ = row_noise.read(x, torch.randn(N, OUTPUTS))
    torch.testing.assert_close(read, read[:1].expand(N, -1))


def test_many_rows_save_nothing():
    assert row_noise.saves(32, 1024, 256)
    assert not row_noise.saves(128, 1024, 256)
    assert not row_noise.saves(6, 1024, 5)
