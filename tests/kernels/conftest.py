import pytest
import torch

from analogfx import kernels

POISON = {torch.uint8: 255, torch.int8: 77, torch.int64: -(1 << 60)}


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that was not written is not 0."""

    def poisoning(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else POISON.get(t.dtype, 77))

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def triton():
    """Triton's kernels, or an error."""
    before = kernels.use("triton")
    yield
    kernels.use(before)
