"""An analog model as an ONNX graph whose sites are placeholders, each tied to its module.

torch's exporter translates the model's digital part. A site becomes one node of the provisional
op ``Site`` (:mod:`analogfx.onnx.calls`), which :mod:`analogfx.onnx.export` replaces; nothing of it
is left in a file.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils._pytree import tree_map, tree_unflatten

from analogfx.errors import OnnxError
from analogfx.onnx.calls import SITE, SiteCall, is_site, numbered, site_calls, translate


@dataclass(frozen=True)
class Captured:
    """A model's graph, simplified, and the calls of its sites, in order."""

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
    _check_outputs(analog, program)
    table: dict[Callable[..., Any], Callable[..., Any]] = {SITE: translate}
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
    model = translated.model
    for place in model.graph.inputs:
        _unname_fixed_axes(place)
    _simplify(model)
    _name_outputs(model.graph, program)
    _forget_the_trace(model)
    return Captured(model, tuple(site_calls(analog, model.graph)))


def _check_outputs(analog: nn.Module, program: ExportedProgram) -> None:
    for number, spec in enumerate(program.graph_signature.output_specs):
        if isinstance(spec.arg, ConstantArgument) and spec.arg.value is not None:
            raise OnnxError(
                f"{type(analog).__name__}: output {number} is {spec.arg.value!r}, which is no "
                "tensor: return tensors alone"
            )


def _name_outputs(graph: ir.Graph, program: ExportedProgram) -> None:
    """Call outputs what the model calls them, such as "logits", whatever computes them.

    A None that the model returns has no output in a file.
    """
    taken = {v.name for v in graph.inputs} | set(graph.initializers)
    taken |= {v.name for node in graph.all_nodes() for v in node.outputs}
    returned = program.graph_signature.output_specs[-program.call_spec.out_spec.num_leaves :]
    count = itertools.count()
    places = [None if isinstance(s.arg, ConstantArgument) else next(count) for s in returned]
    numbered = tree_unflatten(places, program.call_spec.out_spec)
    for number, path in _leaves(numbered):
        name, value = "_".join(path) or "output", graph.outputs[number]
        if name not in taken and not value.is_graph_input() and not value.is_initializer():
            value.name = name
            taken.add(name)


def _leaves(value: Any, *path: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The numbers of outputs in what a model returns, each with its path there."""
    if isinstance(value, int):
        yield value, path
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, *path, str(key))
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _leaves(part, *(path or ("output",)), str(number))


def _simplify(model: ir.Model) -> None:
    """Fold constants, a site's own whatever their size: a file names them as its initializers."""
    nodes = filter(is_site, model.graph)
    constants = _ancestors([value for node in nodes for value in node.inputs[2:]])
    with quiet():
        optimizer.optimize_ir(
            model, inline=False, should_fold=lambda node: True if node in constants else None
        )


def _ancestors(values: Sequence[ir.Value | None]) -> set[ir.Node]:
    """The nodes that values are computed by."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values if value is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def _forget_the_trace(model: ir.Model) -> None:
    """Drop what the exporter notes for its developers, such as stack traces with local paths."""
    functions = [function.graph for function in model.functions.values()]
    for graph in (model.graph, *functions):
        values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        nodes = list(graph.all_nodes())
        values += [value for node in nodes for value in node.outputs]
        noted: list[Any] = [model, graph, *nodes, *values]
        for thing in noted:
            thing.metadata_props.clear()


def _unname_fixed_axes(place: ir.Value) -> None:
    """The exporter names an axis that it found to be fixed by its size: "4" instead of 4."""
    if place.shape is None:
        return
    for axis, size in enumerate(place.shape):
        name = "" if isinstance(size, int) else size.value or ""
        if name.isdecimal():
            place.shape[axis] = int(name)


def _export(
    analog: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    # Aliases: torch marks the free axes on its example tensors, and leaves the marks if it fails.
    args, kwargs = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, kwargs))
    try:
        # torch prints what it has of a graph, a page at a time.
        with torch.no_grad(), quiet(), redirect_stderr(io.StringIO()), numbered(analog):
            return torch.export.export(
                analog, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:  # any code may fail in any way while it is traced
        raise OnnxError(
            f"{_place(analog, error)} has no single graph: {line(error)}. Leave out what is no "
            "tensor or depends on values (for transformers: use_cache=False)"
        ) from error


def _place(analog: nn.Module, error: Exception) -> str:
    """The innermost module whose code was running when an error was raised, by its path."""
    paths = {module: path for path, module in analog.named_modules()}
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [m for m in running if isinstance(m, nn.Module) and m in paths]
    module = modules[-1] if modules else analog
    path, kind = paths[module], type(module).__name__
    return f"{path} ({kind})" if path else kind


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' advice to their own developers is not for our users."""
    names = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _untranslated(program: ExportedProgram, error: Exception) -> str:
    """Which op has no translation, and in which module it is first called."""
    causes = "".join(traceback.format_exception(error))
    found = re.search(r"Error when translating node .*?target=torch\.ops\.([\w.]+)", causes)
    if found is None:
        return f"the model cannot be exported ({line(error)})"
    nodes = program.run_decompositions().graph.nodes
    node = next((n for n in nodes if str(n.target) == found[1]), None)
    stack = list(node.meta.get("nn_module_stack", {}).values()) if node is not None else []
    path = stack[-1][0] if stack else ""
    return f"{path or 'the model'}: {found[1]} cannot be exported ({line(error)})"


def line(error: Exception) -> str:
    """The cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
