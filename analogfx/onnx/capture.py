"""An analog model as an ONNX graph whose sites are placeholders, each tied to its module.

torch's exporter translates the model's digital part. A site becomes one node of the provisional
op ``Site``, which :mod:`analogfx.onnx.export` replaces; nothing of it is left in a file.
"""

from __future__ import annotations

import ast
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from analogfx.errors import OnnxError
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.module import AnalogModule
from analogfx.onnx.writer import DOMAIN, VERSION
from analogfx.program import AnalogSite


@dataclass(frozen=True)
class SiteCall:
    """One call of a site in a captured graph."""

    node: ir.Node
    """The provisional node: inputs x, weight, bias, input_range."""
    path: str
    """Path of the module."""
    module: AnalogModule
    site: AnalogSite
    spec: MVMSpec
    window: Window | None
    """Geometry of a convolution that makes no patches, else None."""


@dataclass(frozen=True)
class Captured:
    """A model's graph and the calls of its sites, in order."""

    model: ir.Model
    calls: tuple[SiteCall, ...]


def capture(
    analog: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    opset: int,
) -> Captured:
    """Translate a model in eval mode.

    Args:
        dynamic_shapes: what ``torch.export.export`` takes; None for static shapes.

    Raises:
        OnnxError: the model has no single graph, or holds an op that ONNX lacks; names it.
    """
    program = _export(analog, args, kwargs, dynamic_shapes)
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.analogfx.analog_linear.default: _translate,
        torch.ops.analogfx.analog_conv.default: _translate,
    }
    with quiet():
        try:
            translated = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=table,
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter wraps whatever its translations raise
            raise OnnxError(_untranslated(program, error)) from error
    assert translated is not None
    for place in translated.model.graph.inputs:
        _unname_fixed_axes(place)
    nodes = [n for n in translated.model.graph if (n.domain, n.op_type) == (DOMAIN, "Site")]
    return Captured(translated.model, tuple(_calls(analog, nodes)))


def _unname_fixed_axes(place: ir.Value) -> None:
    """The exporter names an axis that it found to be fixed by its size: "4" instead of 4."""
    if place.shape is None:
        return
    for axis, size in enumerate(place.shape):
        name = "" if isinstance(size, int) else size.value or ""
        if name.isdecimal():
            place.shape[axis] = int(name)


def free_axes(t: Tensor) -> range:
    """The axes of an input that ought to be free: its batch, and its sequence if it has one.

    The first axis is the batch. The second is a sequence in token ids and masks (whole numbers)
    and in (batch, sequence, feature); images have none.
    """
    sequence = t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())
    return range(min(t.dim(), 1 + sequence))


def dynamic_axes(arguments: Any) -> Any:
    """The free axes of all tensors, as ``torch.export.export`` takes them."""

    def axes(value: Any) -> Any:
        free = free_axes(value) if isinstance(value, Tensor) else ()
        return dict.fromkeys(free, Dim.AUTO) or None

    return tree_map(axes, arguments)


def _export(
    analog: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    # Aliases: torch marks the free axes on its example tensors, and leaves the marks if it fails.
    args, kwargs = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, kwargs))
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                analog, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:  # any code may fail in any way while it is traced
        _run(analog, args, kwargs)
        raise OnnxError(
            f"{type(analog).__name__} has no single graph: {_line(error)}. Leave out what is no "
            "tensor or depends on values (for transformers: use_cache=False)"
        ) from error


def _run(analog: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs that the model itself does not take."""
    try:
        with torch.no_grad():
            analog(*args, **kwargs)
    except Exception as error:
        raise OnnxError(
            f"{type(analog).__name__} does not run on these inputs: {_line(error)}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' advice to their own developers is not for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translate(
    x: Any, weight: Any, bias: Any, input_range: Any, clip: Any, seed: Any, *texts: str
) -> Any:
    """A provisional node; the clips are read off the module later, and a seed there is none."""
    site = Op(Opset(DOMAIN, VERSION), "Site", _provisional())
    return site(x, weight, bias, input_range, window="".join(texts[:-1]), spec=texts[-1])


def _provisional() -> onnx.defs.OpSchema:
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    parameter = onnx.defs.OpSchema.FormalParameter
    attribute = onnx.defs.OpSchema.Attribute
    return onnx.defs.OpSchema(
        "Site",
        DOMAIN,
        VERSION,
        inputs=[
            parameter("x", "T"),
            parameter("weight", "T"),
            parameter("bias", "T", param_option=optional),
            parameter("input_range", "R", param_option=optional),
        ],
        # The fused ops' own outputs: the last two are for the backward, and empty in eval.
        outputs=[parameter("y", "T"), parameter("clipped", "K"), parameter("modified", "K")],
        type_constraints=[
            ("T", floats, ""),
            ("R", floats, ""),
            ("K", [*floats, "tensor(uint8)"], ""),
        ],
        attributes=[attribute(name, onnx.defs.OpSchema.AttrType.STRING) for name in _TEXTS],
    )


_TEXTS = ("window", "spec")


def _calls(analog: nn.Module, nodes: Sequence[ir.Node]) -> Iterator[SiteCall]:
    seen: Counter[str] = Counter()
    for node in nodes:
        path = _module_path(node)
        module = analog.get_submodule(path)
        assert isinstance(module, AnalogModule)
        # A module's graph is straight-line code: its sites come in order, call after call.
        site = module._analog.sites[seen[path] % len(module._analog.sites)]
        seen[path] += 1
        window, spec = (node.attributes[name].as_string() for name in _TEXTS)
        geometry = decode(Window, window) if window else None
        yield SiteCall(node, path, module, site, decode(MVMSpec, spec), geometry)


def _module_path(node: ir.Node) -> str:
    """Path of the module that a node was traced in; the last scope is the node's own."""
    scopes = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _untranslated(program: ExportedProgram, error: Exception) -> str:
    """Which op has no translation, and in which module it is first called."""
    causes = "".join(traceback.format_exception(error))
    found = re.search(r"Error when translating node .*?target=torch\.ops\.([\w.]+)", causes)
    if found is None:
        return f"the model cannot be exported ({_line(error)})"
    nodes = program.run_decompositions().graph.nodes
    node = next((n for n in nodes if str(n.target) == found[1]), None)
    stack = list(node.meta.get("nn_module_stack", {}).values()) if node is not None else []
    path = stack[-1][0] if stack else ""
    return f"{path or 'the model'}: {found[1]} cannot be exported ({_line(error)})"


def _line(error: Exception) -> str:
    """The cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
