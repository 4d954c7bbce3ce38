"""The programs that run a file here: ONNX Runtime, or else ONNX's reference evaluator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.tensor_adapters import TorchTensor
from onnxruntime.capi import onnxruntime_pybind11_state as failures
from torch import Tensor

from analogfx.errors import OnnxError

Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""Runs a file on tensors in the order of its inputs."""


def load(file: Path) -> Run:
    """A file ready to run in ONNX Runtime, or in the reference evaluator.

    The latter where ONNX Runtime's CPU kernels lack a type (bfloat16, mostly), and for inputs and
    outputs of bfloat16, which NumPy, its way in and out, does not know.

    Raises:
        OnnxError: it does not load.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; nothing need be printed, too
    # Packed copies of the weights would double the memory of a run that happens once.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except failures.NotImplemented:
        return reference(file)
    except Exception as error:  # its exceptions share no base class
        raise OnnxError(f"ONNX Runtime does not load the exported model: {error}") from error
    if any("bfloat16" in place.type for place in (*session.get_inputs(), *session.get_outputs())):
        return reference(file)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        names = [place.name for place in session.get_inputs()]
        feed = {n: host(t).numpy() for n, t in zip(names, inputs, strict=True)}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feed)]
        except Exception as error:
            raise OnnxError(f"ONNX Runtime does not run the exported model: {error}") from error

    return run


def reference(file: Path) -> Run:
    """A file in ONNX's reference evaluator, which knows every type and no overloads.

    Raises:
        OnnxError: the evaluator lacks an op of the file.
    """
    try:
        model = onnx.inliner.inline_local_functions(onnx.load(file))
        evaluator = ReferenceEvaluator(model)
    except Exception as error:  # its exceptions share no base class
        raise _unknown(error) from error

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        names = [place.name for place in model.graph.input]
        feed = {n: TorchTensor(host(t)).numpy() for n, t in zip(names, inputs, strict=True)}
        try:
            with np.errstate(all="ignore"):
                outputs = evaluator.run(None, feed)
        except Exception as error:
            raise _unknown(error) from error
        return [_from_numpy(np.asarray(array)) for array in outputs]

    return run


def _unknown(error: Exception) -> OnnxError:
    return OnnxError(
        "neither ONNX Runtime nor ONNX's reference evaluator runs the exported model: "
        f"{type(error).__name__}: {error}. Another opset or level may do, or verify=False"
    )


def host(t: Tensor) -> Tensor:
    """A tensor in the host's memory, as arrays are laid out."""
    return t.detach().cpu().contiguous()


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor; torch does not read numpy's bfloat16."""
    if array.dtype == ir.DataType.BFLOAT16.numpy():
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)
