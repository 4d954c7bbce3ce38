"""Weights as 8-bit codes for inference, prepared once and kept until they change.

Where weights take at most 255 values and inputs, too, their product is exact in the int8 tensor
cores: |q_x| and |q_w| are at most 127, and int32 holds the sum of 133,000 of their products.
``plan.eight_bit`` says where that is so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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


_prepared: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight to (what it depends on, its codes). A write through ``.data`` goes unseen: torch does not
count it; `forget` is for that."""


def forget() -> None:
    """Prepare all weights anew when they are next used."""
    _prepared.clear()


def prepare(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> Codes:
    """The codes of a weight (O, I), from the cache if neither it nor its clip has changed."""
    if weight.is_inference() or (clip is not None and clip.is_inference()):
        return _quantised(weight, clip, spec)  # torch does not count their changes
    clip_key = None if clip is None else (id(clip), clip._version, clip.data_ptr())
    of_spec = (tuple(spec.in_sizes), tuple(spec.out_sizes), spec.weight_states)
    key = (weight._version, weight.data_ptr(), clip_key, of_spec, spec.weight_per_channel)
    found = _prepared.get(weight)
    if found is None or found[0] != key:
        found = (key, _quantised(weight, clip, spec))
        _prepared[weight] = found
    return found[1]


def _quantised(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> Codes:
    peaks = maxima(weight, clip, spec)
    assert peaks is not None
    bound = scaled_by(peaks, clip is not None or spec.weight_per_channel, spec)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    modify_launch(weight, bound, None, None, codes, spec).run()
    step = 2 * (bound / spec.weight_states)
    return Codes(codes, torch.where(step == 0, 1.0, step), peaks)
