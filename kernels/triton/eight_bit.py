"""Weights as 8-bit codes for inference, prepared once and kept until they change.

Where weights take at most 255 values and inputs, too, their product is exact in the int8 tensor
cores: |q_x| and |q_w| are at most 127, and int32 holds the sum of 133,000 of their products.
``plan.in_integers`` says where that is so.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.kernels import changes
from analogfx.kernels import reference as ref
from analogfx.kernels.changes import Stamp
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton.weights import maxima, modify_launch, scaled_by


class Codes(NamedTuple):
    """Weights in integers, and what these stand for."""

    codes: Tensor
    """int8 (O, I)."""
    step: Tensor
    """float32 (k, O): what a code of 1 stands for."""
    peaks: Tensor
    """float32 (k, O): what :func:`weights.maxima` gives."""


class _Kept(NamedTuple):
    """Codes, and the weight and clip that they were made of as those were then."""

    weight: Stamp
    clip: tuple[weakref.ref[Tensor], Stamp] | None
    """What the clip is a part of, and its stamp."""
    codes: Codes

    def fits(self, weight: Tensor, clip: Tensor | None) -> bool:
        if not changes.unchanged(weight, self.weight):
            return False
        if clip is None or self.clip is None:
            return clip is None and self.clip is None
        before, then = self.clip
        return before() is changes.owner(clip) and changes.unchanged(clip, then)


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter to what was prepared of it: by the part that is the weight, and the site's spec."""


def prepare(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> Codes:
    """The codes of a weight (O, I), kept until it or its clip changes; see ``kernels.changes``.

    A CUDA graph makes its own at every replay: those that are made while one is captured are in its
    memory, and hold nothing before a replay; and those that are kept may be freed before it ends.
    """
    stream = _stream(weight)
    if stream is None:
        return _quantised(weight, clip, spec)
    kept = _prepared.setdefault(changes.owner(weight), {})
    part = weight.shape, weight.stride(), weight.storage_offset(), weight.dtype
    of_spec = tuple(spec.in_sizes), tuple(spec.out_sizes), spec.weight_states
    key = part, of_spec, spec.weight_per_channel, stream
    found = kept.get(key)
    if found is None or not found.fits(weight, clip):
        clip_then = None
        if clip is not None:
            clip_then = weakref.ref(changes.owner(clip)), changes.stamp(clip)
        codes = _quantised(weight, clip, spec)
        found = kept[key] = _Kept(changes.stamp(weight), clip_then, codes)
    return found.codes


def _stream(weight: Tensor) -> int | None:
    """The stream that makes codes, and need not wait for them; None while a graph is captured."""
    if not weight.is_cuda:
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(weight.device).cuda_stream


def _quantised(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> Codes:
    peaks = maxima(weight, clip, spec)
    assert peaks is not None
    bound = scaled_by(peaks, clip is not None or spec.weight_per_channel, spec)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    modify_launch(weight, bound, None, None, codes, spec, codes=True).run()
    return Codes(codes, ref.weight_step(bound, spec.weight_states), peaks)
