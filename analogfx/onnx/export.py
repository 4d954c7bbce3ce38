"""From an analog model to a file: capture, write the sites, check, run, and only then keep."""

from __future__ import annotations

import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer
from torch import Tensor, nn

import analogfx
from analogfx.errors import OnnxError
from analogfx.kernels.patches import Window
from analogfx.module import sites as analog_sites
from analogfx.onnx import verify as verification
from analogfx.onnx.capture import Captured, SiteCall, capture, dynamic_axes, free_axes, quiet
from analogfx.onnx.operators import AnalogConv, AnalogLinear, Seeds
from analogfx.onnx.sites import SCHEMA, Programmed, program, record
from analogfx.onnx.writer import DOMAIN, VERSION, Writer

LEVELS: dict[str, frozenset[str]] = {
    "fused": frozenset({"AnalogLinear", "AnalogConv"}),
    "explicit": frozenset({"DAC", "ADC", "DynamicRange"}),
    "standard": frozenset(),
    "qdq": frozenset(),
}
"""The ops of domain ai.analogfx that each level keeps; the rest is written out."""

METADATA = "ai.analogfx"
"""Key of the record of sites in a model's metadata."""

_IR_VERSION = 10
"""The first with overloads of functions."""

_INLINE_LIMIT = 1 << 29
"""Bytes of weights that still go into the model file itself; protobuf ends at 2 GiB."""

_EXTERNAL = 1 << 10
"""Smallest tensor that goes into the external file."""

_IN_FLIGHT = 1 << 26
"""Bytes of weights held while they are written."""


def export(
    analog: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any],
    level: str,
    opset: int,
    dynamic_shapes: Any,
    noise: bool,
    seed: int,
    verify: bool,
) -> None:
    """See :func:`analogfx.export_onnx`."""
    _check_request(analog, Path(path), level, opset)
    modes = {module: module.training for module in analog.modules()}
    analog.eval()
    try:
        captured = _capture(analog, args, kwargs, dynamic_shapes, opset)
        records = _lower(captured, level, opset, seed if noise else None)
        _annotate(captured.model, analog, level, records)

        def accept(file: Path) -> None:
            _check(file)
            if verify and not noise:
                verification.check(file, analog, args, kwargs)

        _write(captured.model, Path(path), accept)
    finally:
        for module, training in modes.items():
            module.training = training


def _check_request(analog: nn.Module, target: Path, level: str, opset: int) -> None:
    if not os.path.isdir(target.parent):
        raise OnnxError(f"{target.parent} is no folder; the folder of the file must exist")
    if os.path.exists(target) and not os.path.isfile(target):  # a device would be replaced, too
        raise OnnxError(f"{target} is there and no plain file; name a file")
    if level not in LEVELS:
        raise OnnxError(f"level = {level!r}: expected one of {', '.join(LEVELS)}")
    newest = onnx.defs.onnx_opset_version()
    if not 18 <= opset <= newest:
        raise OnnxError(f"opset = {opset!r}: expected 18 to {newest}")
    if not isinstance(analog, nn.Module) or next(analog_sites(analog), None) is None:
        raise OnnxError(
            f"{type(analog).__name__} has no analog site: pass what analogize() returned"
        )
    for name, tensor in (*analog.named_parameters(), *analog.named_buffers()):
        if tensor.is_meta:
            raise OnnxError(f"{name} is on the meta device, it has no values to export")


def _capture(
    analog: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    opset: int,
) -> Captured:
    """Capture with free axes if asked for, with fixed ones where the model allows no others."""
    if dynamic_shapes is not True:
        return capture(analog, args, kwargs, dynamic_shapes or None, opset)
    wide_args, wide_kwargs = verification.at_least_two((args, dict(kwargs)))
    arguments = verification.bound(analog, wide_args, wide_kwargs)
    reason = "the model's code takes a size as a number, or the size is 1"
    try:
        captured = capture(analog, wide_args, wide_kwargs, dynamic_axes(arguments), opset)
    except OnnxError as error:
        captured, reason = capture(analog, args, kwargs, None, opset), str(error)
    fixed = _fixed_axes(captured.model.graph, verification.tensors_of(arguments))
    if fixed:
        warnings.warn(
            f"the file of {type(analog).__name__} takes one size alone of {', '.join(fixed)}: "
            f"{reason}; dynamic_shapes=False (--static) fixes all sizes without this warning",
            stacklevel=4,
        )
    return captured


def _fixed_axes(graph: ir.Graph, arguments: list[Tensor]) -> list[str]:
    """Axes that ought to be free and are not, each with its size."""
    batch = next((tensor.shape[:1] for tensor in arguments), None)
    return [
        f"{place.name} axis {axis} ({place.shape[axis]})"
        for place, tensor in zip(graph.inputs, arguments, strict=True)
        for axis in free_axes(tensor)
        if place.shape is not None and isinstance(place.shape[axis], int)
        and not (axis == 0 and tensor.shape[:1] != batch)  # no batch after all
        and not (axis == 1 and tensor.dim() == 3)  # perhaps channels
    ]  # fmt: skip


# --------------------------------------------------------------------------------- lowering


def _lower(captured: Captured, level: str, opset: int, seed: int | None) -> list[dict[str, Any]]:
    """Replace every provisional node by its site at a level, in place.

    Returns:
        What the file's metadata says about the sites.
    """
    model = captured.model
    with quiet():
        optimizer.optimize_ir(model, inline=False)  # before: it must not fold what a site names
    functions: dict[Any, ir.Function] = {}
    sites: dict[str, _Written] = {}
    names = _site_names(captured.calls)
    seeds: Sequence[Seeds | None] = [None] * len(names)
    if seed is not None:
        seeds = _seeds(seed, len(names))
    for call, name in zip(captured.calls, names, strict=True):
        if name not in sites:
            site = program(name, call, opset, noise=seed is not None)
            sites[name] = _Written(site, _constants(model.graph, site), seeds[len(sites)])
        _replace(model.graph, call, sites[name], Writer(opset, LEVELS[level], functions), level)
    common.RemoveUnusedNodesPass()(model)
    for function in functions.values():
        model.functions[function.identifier()] = function
    model.ir_version = max(model.ir_version, _IR_VERSION)
    model.opset_imports.pop(DOMAIN, None)
    if functions:
        model.opset_imports[DOMAIN] = VERSION
    return [
        record(w.site, {k: str(v.name) for k, v in w.constants.items()}, w.nodes)
        for w in sites.values()
    ]


@dataclass
class _Written:
    """A site in the file: its constants, and the names of the nodes that compute it."""

    site: Programmed
    constants: dict[str, ir.Value]
    seeds: Seeds | None
    nodes: list[str] = field(default_factory=list)

    def label(self) -> str:
        """Name of the next node; a module that is called again gets a number."""
        again = f"@{len(self.nodes) + 1}" if self.nodes else ""
        self.nodes.append(self.site.name + again)
        return self.nodes[-1]


def _site_names(calls: tuple[SiteCall, ...]) -> list[str]:
    """Module path of every call, with the parameter where the module has several sites."""
    names = []
    for call in calls:
        sites = call.module._analog.sites
        label = ""
        if len(sites) > 1 or call.site.name != "weight":
            twins = [s for s in sites if s.name == call.site.name]
            number = next(i for i, s in enumerate(twins) if s is call.site)
            label = call.site.name + (f".{number}" if len(twins) > 1 else "")
        names.append(".".join(filter(None, (call.path, label))) or call.site.name)
    return names


def _seeds(seed: int, count: int) -> list[Seeds]:
    """Seeds of so many sites, all different.

    Drawn, not counted: ONNX Runtime's generator gives nearly the same first numbers from seeds that
    lie side by side, and the very same from 0 and 1. A float32 attribute holds them exactly.
    """
    drawn = random.Random(str(seed)).sample(range(1, 1 << 24), 2 * count)
    return [Seeds(float(w), float(y)) for w, y in zip(drawn[::2], drawn[1::2], strict=True)]


def _constants(graph: ir.Graph, site: Programmed) -> dict[str, ir.Value]:
    """The initializers of one site, by input of the op."""
    _, weight, bias, input_range = (*site.call.node.inputs, None, None, None)[:4]
    assert weight is not None
    values = {"weight": weight}
    if site.weight is not None:
        values["weight"] = _initializer(graph, f"{site.name}.analog_weight", site.weight)
    if site.scale is not None:
        values["weight_scale"] = _tensor(graph, f"{site.name}.weight_scale", site.scale)
    if bias is not None:
        values["bias"] = bias
    if input_range is not None:
        values["input_range"] = input_range
    if site.maxima is not None:
        values["weight_max"] = _tensor(graph, f"{site.name}.weight_max", site.maxima)
    return values


def _tensor(graph: ir.Graph, name: str, value: Tensor) -> ir.Value:
    return _initializer(graph, name, TorchTensor(value.contiguous(), name=name))


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _replace(
    graph: ir.Graph, call: SiteCall, written: _Written, writer: Writer, level: str
) -> None:
    x, old = call.node.inputs[0], call.node.outputs[0]
    assert x is not None and x.dtype is not None
    operator = _operator(call, written, x.dtype, level)
    writer.scope = written.label()
    rest = (written.constants.get(name) for name in operator.inputs[1:])
    y = writer.call(operator, x, *rest, name=writer.scope)
    y.type, y.shape, y.name = old.type, old.shape, old.name
    made = list(writer.tape.nodes)
    for node in made:
        node.metadata_props[METADATA] = written.site.name
    ir.convenience.replace_nodes_and_values(graph, call.node, [call.node], made, [old], [y])


def _operator(
    call: SiteCall, written: _Written, data: ir.DataType, level: str
) -> AnalogLinear | AnalogConv:
    site, seeds = written.site, written.seeds
    operator: AnalogLinear | AnalogConv
    if call.window is None:
        operator = AnalogLinear(site.spec, data, site.codes, seeds=seeds)
    else:
        window = Window(*map(tuple, call.window))  # type: ignore[arg-type]
        operator = AnalogConv(site.spec, data, site.codes, seeds=seeds, window=window)
    integer = level == "qdq" and operator.fits_integers()
    return replace(operator, integer=integer)


# --------------------------------------------------------------------------------- metadata


def _annotate(
    model: ir.Model, analog: nn.Module, level: str, records: list[dict[str, Any]]
) -> None:
    """Write down what a toolchain needs beside the graph: configs, tile maps, versions."""
    configs: list[dict[str, Any]] = []
    modules: dict[str, int] = {}
    for path, module, _ in analog_sites(analog):
        config = module._analog.config.to_dict()
        if config not in configs:
            configs.append(config)
        modules[path] = configs.index(config)
    contents = {
        "schema": SCHEMA,
        "analogfx": analogfx.__version__,
        "level": level,
        "configs": configs,
        "modules": modules,
        "sites": records,
    }
    model.metadata_props[METADATA] = json.dumps(contents)
    model.producer_name, model.producer_version = "analogfx", analogfx.__version__


# ---------------------------------------------------------------------------------- writing


def _write(model: ir.Model, target: Path, accept: Callable[[Path], None]) -> None:
    """Write beside the target, and move there what was accepted."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    data = f"{target.name}.data" if size > _INLINE_LIMIT else None
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting-") as scratch:
            file = Path(scratch, target.name)
            ir.save(
                model,
                file,
                external_data=data,
                size_threshold_bytes=_EXTERNAL,
                max_workers=1,
                max_in_flight_bytes=_IN_FLIGHT,
            )
            accept(file)
            if data is not None:
                os.replace(Path(scratch, data), target.with_name(data))
            os.replace(file, target)
    except OSError as error:
        raise OnnxError(f"{target} cannot be written: {error.strerror or error}") from error


def _check(file: Path) -> None:
    """Hold a file against ONNX's own rules, shape inference included."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # its checker and its shape inference raise their own
        raise OnnxError(f"onnx.checker refuses the exported model: {error}") from error
