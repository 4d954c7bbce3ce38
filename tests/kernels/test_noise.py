import subprocess
import sys

import pytest
import torch

from analogfx.kernels import noise, philox

SEED = torch.tensor(1234567890123456789)
SEVERAL_CHUNKS = 3 * noise.CHUNK + 17


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(numel=1000, seed=SEED, stream=0, dtype=torch.float32):
    return noise.normal(seed, stream, (numel,), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4)])
def test_shape_and_dtype(shape, dtype):
    out = noise.normal(SEED, 0, shape, dtype)
    assert out.shape == shape and out.dtype == dtype


def test_the_same_key_gives_the_same_draw():
    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert torch.equal(first, draw(seed=SEED.clone()))


@pytest.mark.parametrize(
    "other", [{"seed": SEED + 1}, {"seed": SEED + (1 << 40)}, {"stream": 1}, {"stream": 2}]
)
def test_another_key_gives_another_draw(other):
    assert (draw() != draw(**other)).all()


def test_torchs_generator_is_neither_read_nor_advanced():
    state = torch.get_rng_state()
    draw(SEVERAL_CHUNKS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_it(threads, dtype):
    threads(1)
    alone = draw(SEVERAL_CHUNKS, dtype=dtype)
    for count in (2, 4):
        threads(count)
        assert torch.equal(alone, draw(SEVERAL_CHUNKS, dtype=dtype))


def test_inference_mode_does_not_change_it(threads):
    expected = draw(SEVERAL_CHUNKS)
    for count in (1, 2):
        threads(count)
        with torch.inference_mode():
            assert torch.equal(expected, draw(SEVERAL_CHUNKS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_standard_normal(dtype):
    n = 1 << 20
    x = draw(n, dtype=dtype).double()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - mean) < 4 * (variance / n) ** 0.5, power


def test_float64_draws_have_float64s_bits():
    x = draw(dtype=torch.float64)
    assert (x != x.float().double()).float().mean() > 0.99


def test_chunks_do_not_repeat():
    chunks = draw(4 * noise.CHUNK).view(4, -1)
    for i in range(4):
        for j in range(i):
            assert abs((chunks[i] * chunks[j]).mean()) < 5 / noise.CHUNK**0.5
            assert (chunks[i] == chunks[j]).float().mean() < 1e-3


FORKED = """
import os
import torch
from analogfx.kernels import noise

torch.set_num_threads(2)
draw = lambda: noise.normal(torch.tensor(5), 0, (3 * noise.CHUNK,), torch.float32)
expected = draw()  # the pool's threads live now
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(expected, draw()) else 1)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="forks only on Linux")
def test_it_works_in_a_forked_child():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=60)


def test_draw_seed_follows_torchs_seed():
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    first = [noise.draw_seed(cpu) for _ in range(4)]
    torch.manual_seed(3)
    assert [noise.draw_seed(cpu) for _ in range(4)] == first
    assert len({int(seed) for seed in first}) == 4
    assert first[0].dtype == torch.int64 and first[0].shape == ()


def test_other_devices_draw_philox():
    meta = noise.normal(torch.empty((), dtype=torch.int64, device="meta"), 2, (3, 5), torch.float64)
    assert meta.shape == (3, 5) and meta.dtype == torch.float64 and meta.is_meta
    assert philox.normal(SEED, 2, 15).shape == (15,)
