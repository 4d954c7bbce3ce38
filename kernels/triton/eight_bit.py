"""Weights as 8-bit codes for inference, prepared once and kept until they change.

Where weights take at most 255 values and inputs, too, their product is exact in the int8 tensor
cores: |q_x| and |q_w| are at most 127, and int32 holds the sum of 133,000 of their products.
``plan.in_integers`` says where that is so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.kernels import changes
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


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter to what was prepared of it: by the part that is the weight, and the site's spec."""


def prepare(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> Codes:
    """The codes of a weight (O, I), kept until it or its clip changes; see ``kernels.changes``."""
    kept = _prepared.setdefault(changes.owner(weight), {})
    part = weight.shape, weight.stride(), weight.storage_offset(), weight.dtype
    of_spec = tuple(spec.in_sizes), tuple(spec.out_sizes), spec.weight_states
    key = part, of_spec, spec.weight_per_channel
    state = changes.stamp(weight), None if clip is None else (id(clip), changes.stamp(clip))
    found = kept.get(key)
    if found is None or found[0] != state:
        found = kept[key] = state, _quantised(weight, clip, spec)
    return found[1]


def _quantised(weight: Tensor, clip: Tensor | None, spec: MVMSpec) -> Codes:
    peaks = maxima(weight, clip, spec)
    assert peaks is not None
    bound = scaled_by(peaks, clip is not None or spec.weight_per_channel, spec)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    modify_launch(weight, bound, None, None, codes, spec).run()
    step = 2 * (bound / spec.weight_states)
    return Codes(codes, torch.where(step == 0, 1.0, step), peaks)
