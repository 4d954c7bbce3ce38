"""Parts of a matrix: the noise of a place in the whole."""

import itertools

import pytest
import torch

from analogfx.kernels import noise, philox

SHAPES = [(7, 13), (9, 16), (5, 4), (3, 700), (1, 1)]


def spans(size):
    return [slice(0, size), slice(size // 2, size), slice(0, size // 2), slice(size // 3, size)]


@pytest.mark.parametrize("chunk", [16, 40, 1 << 18])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_is_cut_out_of_the_whole_draw(monkeypatch, shape, chunk):
    monkeypatch.setattr(noise, "CHUNK", chunk)
    seed = torch.tensor(12345678901)
    for dtype in (torch.float32, torch.float64):
        whole = noise.normal(seed, 3, shape, dtype)
        for rows, columns in itertools.product(spans(shape[0]), spans(shape[1])):
            part = noise.block(seed, 3, shape, rows, columns, dtype)
            assert torch.equal(part, whole[rows, columns])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_of_philox(shape):
    seed = torch.tensor(12345678901)
    whole = philox.normal(seed, 3, shape[0] * shape[1]).view(shape)
    for rows, columns in itertools.product(spans(shape[0]), spans(shape[1])):
        part = philox.block(seed, 3, shape[1], rows, columns)
        assert torch.equal(part, whole[rows, columns])
