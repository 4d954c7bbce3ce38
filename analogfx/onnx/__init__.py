"""Deployment: analog models as ONNX files, and the sites of such a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from analogfx.errors import OnnxError

if TYPE_CHECKING:
    from analogfx.onnx.read import OnnxSites

_NEEDED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def export_onnx(
    analog: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    level: str = "fused",
    opset: int = 18,
    dynamic_shapes: Any = True,
    noise: bool = False,
    seed: int = 0,
    verify: bool = True,
    golden: int = 0,
    cache: bool = False,
) -> None:
    """Write an analog model as an ONNX file that stock ONNX Runtime runs.

    Every analog site is one op of domain ``ai.analogfx`` (docs/onnx/), which a chip's toolchain
    can pick up, and carries its meaning in standard ops as an ONNX function, for all others. The
    model is exported as it evaluates, whatever its mode; it does not change.

    Args:
        analog: what :func:`analogfx.analogize` returned.
        args, kwargs: an example call, tensors of any batch size.
        path: of the file, or of a link to it. Weights of more than 64 MiB go into a file beside it,
            ``<name>.<8 digits>.data``, which the model names: move both.
        level: how much structure shows. ``"fused"``: one op a site. ``"explicit"``: DAC, ADC and
            dynamic range are ops, tiles and products are standard. ``"standard"``: standard ops
            alone. ``"qdq"``: as standard, and products of 8-bit inputs with quantized weights
            are integer products.
        opset: version of the standard ops, 18 to 25. From 21 on, weights of at most 15 levels take
            4 bits instead of 8.
        dynamic_shapes: True leaves the batch axis free, and the sequence axis of tokens and of
            (batch, sequence, feature), where the model allows it; False fixes all shapes;
            anything else is what ``torch.export.export`` takes.
        noise: add the config's training noise of weights and outputs, drawn anew in every run,
            for Monte-Carlo in a runtime; opset 18 to 21.
        seed: of that noise.
        verify: run the file on the given inputs and on other sizes of its free axes, and compare it
            with the model, site by site and as a whole. A file with noise is run, and compared
            with zeros in the place of its random numbers.
        golden: number of calls whose inputs, outputs and codes of every site are written beside the
            file, into ``<name>.golden.safetensors`` (docs/onnx/golden.md), for a toolchain to
            check itself. They are made from the example call, the first of them.
        cache: for causal language models of transformers: the file takes the keys and values of the
            tokens so far, ``past_key_values.0.key`` and so on, and returns ``present.0.key`` and so
            on, so that each step of a loop computes its new tokens alone. The example has
            ``input_ids``; batch, sequence and past are free.

    Warns:
        UserWarning: an axis that ought to be free is fixed, there is no noise to add, or at level
            ``"qdq"`` no site multiplies integers; with the reason.

    Raises:
        OnnxError: onnx, onnxscript or onnxruntime is missing; the model cannot be exported; or
            the file disagrees with the model. What was at ``path`` stays as it was.
    """
    _require()
    from analogfx.modules.sites import unwrapped
    from analogfx.onnx.export import export

    if not isinstance(args, (tuple, list)):
        raise OnnxError(f"args is a {type(args).__name__}: expected a tuple of inputs")
    export(
        unwrapped(analog),
        tuple(args),
        path,
        kwargs=kwargs or {},
        level=level,
        opset=opset,
        dynamic_shapes=dynamic_shapes,
        noise=noise,
        seed=seed,
        verify=verify,
        golden=golden,
        cache=cache,
    )


def load_onnx_sites(path: str | os.PathLike[str]) -> OnnxSites:
    """Read the analog sites of a file that :func:`export_onnx` wrote.

    No code of the file runs and nothing outside the file's folder is read.

    Raises:
        OnnxError: the file is malformed, foreign, or reaches out of its folder; or onnx is
            missing.
    """
    _require()
    from analogfx.onnx.read import read

    return read(path)


def _require() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OnnxError(f"ONNX export needs {', '.join(missing)}: pip install 'analogfx[onnx]'")
