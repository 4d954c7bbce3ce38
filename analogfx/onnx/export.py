"""From an analog model to a file: capture, write the sites, check, run, and only then keep."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

import analogfx
from analogfx.errors import OnnxError
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.modules.sites import sites
from analogfx.onnx import arguments, storage
from analogfx.onnx import golden as golden_vectors
from analogfx.onnx import noise as draws
from analogfx.onnx import verify as verification
from analogfx.onnx.cache import name_inputs, with_cache
from analogfx.onnx.calls import SiteCall, holding
from analogfx.onnx.capture import Captured, line
from analogfx.onnx.levels import LEVELS
from analogfx.onnx.operators import AnalogConv, AnalogLinear, Seeds
from analogfx.onnx.runtimes import load
from analogfx.onnx.sites import SCHEMA, Programmed, program, record
from analogfx.onnx.sizes import capture_sized
from analogfx.onnx.verify import Probe
from analogfx.onnx.writer import DOMAIN, VERSION, Writer

METADATA = "ai.analogfx"
"""Key of the record of sites in a model's metadata."""

_IR_VERSION = 10
"""The first with overloads of functions."""

_OLDEST_OPSET, _NEWEST_OPSET = 18, 25
"""What torch's exporter, with onnxscript's converter of versions, writes."""


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
    golden: int,
    cache: bool,
) -> None:
    """See :func:`analogfx.export_onnx`."""
    _check_request(analog, kwargs, level, opset, seed, golden)
    if golden and noise:
        raise OnnxError("golden vectors are of a file without noise: leave out noise or golden")
    _check_chip(analog, noise, golden)
    target = storage.place(path)
    if noise:
        draws.check_opset(opset)
    modes = {module: module.training for module in analog.modules()}
    analog.eval()
    try:
        if cache:
            analog, kwargs, dynamic_shapes = with_cache(analog, args, kwargs)
            args = ()
        kwargs = arguments.in_order(analog, args, kwargs)
        _check_call(analog, args, kwargs)
        captured = capture_sized(analog, args, kwargs, dynamic_shapes, opset)
        if cache:
            name_inputs(captured.model.graph)
        known = {name for name, _ in analog.named_parameters(remove_duplicate=False)}
        written = _lower(captured, level, opset, seed if noise else None, known)
        _annotate(captured.model, analog, level, written)
        if noise and not any(w.draws() for w in written):
            warnings.warn(
                f"noise=True, but the config of {type(analog).__name__} has no noise: the file is "
                "deterministic",
                stacklevel=3,
            )

        _warn_of_floats(analog, level, written)

        def accept(file: Path) -> None:
            _check(file)
            if not verify:
                return
            if noise:
                load(file)(arguments.tensors_of(arguments.bound(analog, args, kwargs)))
                file = draws.without_draws(file)
            probes = [probe for w in written for probe in w.probes]
            verification.check(file, analog, args, kwargs, probes, lengths=not cache)

        beside: golden_vectors.Vectors = {}
        if golden:
            labels = {w.number: (w.site, [probe.label for probe in w.probes]) for w in written}
            graph = captured.model.graph
            names = [str(v.name) for v in graph.inputs], [str(v.name) for v in graph.outputs]
            beside = golden_vectors.vectors(analog, args, kwargs, golden, labels, names)
        storage.write(captured.model, target, accept)
        if beside:
            golden_vectors.write(beside, target)
    finally:
        for module, training in modes.items():
            module.training = training


def _warn_of_floats(analog: nn.Module, level: str, written: Sequence[_Written]) -> None:
    """Tell if a level that promises integers yields none, with the first site's reason."""
    if level == "qdq" and written and all(site.why_floats for site in written):
        first = written[0]
        warnings.warn(
            f'level="qdq", but no site of {type(analog).__name__} multiplies integers: '
            f"{first.site.name}: {first.why_floats}",
            stacklevel=4,
        )


def _check_request(
    analog: nn.Module, kwargs: Mapping[str, Any], level: str, opset: int, seed: int, golden: int
) -> None:
    if not isinstance(kwargs, Mapping):
        raise OnnxError(f"kwargs is a {type(kwargs).__name__}: expected a dict of inputs")
    if not isinstance(level, str) or level not in LEVELS:
        raise OnnxError(f"level = {level!r}: expected one of {', '.join(LEVELS)}")
    for name, value in (("opset", opset), ("seed", seed), ("golden", golden)):
        if type(value) is not int:
            raise OnnxError(f"{name} = {value!r}: expected an int")
    if golden < 0:
        raise OnnxError(f"golden = {golden}: expected a number of calls, 0 for none")
    if not _OLDEST_OPSET <= opset <= _NEWEST_OPSET:
        raise OnnxError(f"opset = {opset}: expected {_OLDEST_OPSET} to {_NEWEST_OPSET}")
    if not isinstance(analog, nn.Module) or next(sites(analog), None) is None:
        raise OnnxError(
            f"{type(analog).__name__} has no analog site: pass what analogize() returned"
        )
    for name, tensor in (*analog.named_parameters(), *analog.named_buffers()):
        if tensor.is_meta:
            raise OnnxError(f"{name} is on the meta device, it has no values to export")


def _check_chip(analog: nn.Module, noise: bool, golden: int) -> None:
    """Refuse what a file with the weights of a chip cannot have: noise that products draw."""
    on_chip = [h for _, module, site in sites(analog) if (h := holding(module, site)) is not None]
    if any(h.calls is not None for h in on_chip):
        raise OnnxError(
            f"{type(analog).__name__} is on a chip whose products draw noise, which a file cannot: "
            'call export_onnx() inside of device.at() with read_noise="readout" and without '
            "output_noise"
        )
    if on_chip and noise:
        raise OnnxError(
            "noise=True inside of device.at(): the weights of the file have a chip's noise. Leave "
            "the chip, or leave out noise"
        )
    if on_chip and golden:
        raise OnnxError(
            "golden vectors inside of device.at(): a chip holds no codes to note. Leave the chip, "
            "or leave out golden"
        )


def _check_call(analog: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs that the model itself does not take, before torch tells it in its own way."""
    try:
        with torch.no_grad():
            analog(*args, **kwargs)
    except Exception as error:
        raise OnnxError(
            f"{type(analog).__name__} does not run on these inputs: {line(error)}"
        ) from error


# --------------------------------------------------------------------------------- lowering


def _lower(
    captured: Captured, level: str, opset: int, seed: int | None, parameters: Collection[str]
) -> list[_Written]:
    """Replace every provisional node by its site at a level, in place.

    Args:
        parameters: names of the model's.
    """
    model = captured.model
    functions: dict[Any, ir.Function] = {}
    sites: dict[str, _Written] = {}
    names = _site_names(captured.calls)
    seeds: Sequence[Seeds | None] = [None] * len(names)
    if seed is not None:
        seeds = _seeds(seed, len(names))
    for call, name in zip(captured.calls, names, strict=True):
        if name not in sites:
            site = program(name, call, opset, noise=seed is not None)
            number = call.node.attributes["number"].as_int()
            inputs = _inputs(model.graph, site, parameters)
            sites[name] = _Written(site, number, inputs, seeds[len(sites)])
        _replace(model.graph, call, sites[name], Writer(opset, LEVELS[level], functions), level)
    common.RemoveUnusedNodesPass()(model)
    for function in functions.values():
        model.functions[function.identifier()] = function
    model.ir_version = max(model.ir_version, _IR_VERSION)
    model.opset_imports.pop(DOMAIN, None)
    if functions:
        model.opset_imports[DOMAIN] = VERSION
    return list(sites.values())


@dataclass
class _Written:
    """A site in the file: its inputs beside x, and where it is called."""

    site: Programmed
    number: int
    """Of the site in :func:`analogfx.onnx.calls.numbered`."""
    inputs: dict[str, ir.Value]
    """By name of the op's input."""
    seeds: Seeds | None
    probes: list[Probe] = field(default_factory=list)
    why_floats: str | None = None
    """At level qdq: why the site multiplies floats, if it does."""

    def call(self, x: ir.Value, y: ir.Value, integer: bool) -> str:
        """Note another call; returns its name, which has a number if there are others."""
        again = f"@{len(self.probes) + 1}" if self.probes else ""
        bias = self.inputs.get("bias")
        names = (None if value is None else str(value.name) for value in (x, y, bias))
        self.probes.append(Probe(self.site, self.site.name + again, *names, integer))  # type: ignore
        return self.probes[-1].label

    def draws(self) -> bool:
        """Whether the site has noise in the file."""
        return bool(self.site.spec.noise_std or self.site.spec.out_noise)

    def record(self) -> dict[str, Any]:
        """What the file's metadata says about the site; what is computed has no initializer."""
        constants = {k: str(v.name) for k, v in self.inputs.items() if v.is_initializer()}
        return record(self.site, constants, [probe.label for probe in self.probes])


def _site_names(calls: tuple[SiteCall, ...]) -> list[str]:
    """Module path of every call, with the parameter where the module has several sites."""
    names = []
    for call in calls:
        sites = call.module._analog.sites
        label = ""
        if call.expert is not None:
            label = call.site.name
        elif len(sites) > 1 or call.site.name != "weight":
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


def _inputs(graph: ir.Graph, site: Programmed, parameters: Collection[str]) -> dict[str, ir.Value]:
    """What one site reads beside x, by input of the op; initializers, but for a computed bias."""
    _, weight, bias, input_range = (*site.call.node.inputs, None, None, None)[:4]
    assert weight is not None
    values = {"weight": weight}
    if site.weight is not None:
        values["weight"] = _initializer(graph, f"{site.name}.analog_weight", site.weight)
    elif weight.name not in parameters:  # a constant that the exporter folded, such as a transpose
        name = f"{site.name}.analog_weight"
        weight.name = name
    if site.scale is not None:
        values["weight_scale"] = _tensor(graph, f"{site.name}.weight_scale", site.scale)
    if bias is not None:
        values["bias"] = bias
    if input_range is not None:
        values["input_range"] = input_range
        own, name = site.input_range(), f"{site.name}.input_range"
        if own is not None and input_range.is_initializer() and name not in graph.initializers:
            values["input_range"] = _tensor(graph, name, own)
    if site.maxima is not None:
        values["weight_max"] = _tensor(graph, f"{site.name}.weight_max", site.maxima)
    if site.code_scale is not None:
        values["code_scale"] = _tensor(graph, f"{site.name}.code_scale", site.code_scale)
    if site.gain is not None:
        values["gain"] = _tensor(graph, f"{site.name}.gain", site.gain)
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
    writer.scope = written.call(x, old, operator.integer)
    rest = (written.inputs.get(name) for name in operator.inputs[1:])
    y = writer.call(operator, x, *rest, name=writer.scope)
    y.type, y.shape, y.name = old.type, old.shape, old.name
    made = list(writer.tape.nodes)
    for node in made:
        node.metadata_props[METADATA] = written.site.name
        if node.op_type == type(operator).__name__:
            node.doc_string = _tile_grid(written.site.spec)
    ir.convenience.replace_nodes_and_values(graph, call.node, [call.node], made, [old], [y])


def _tile_grid(spec: MVMSpec) -> str:
    """What a viewer of the graph is to show of a site: its tiles, and their largest size."""
    rows, columns = spec.in_sizes, spec.out_sizes
    tiles = "tile" if len(rows) * len(columns) == 1 else "tiles"
    size = f"{max(rows)} inputs x {max(columns)} outputs at most"
    return f"{len(rows)} x {len(columns)} {tiles} of {size}"


def _operator(
    call: SiteCall, written: _Written, data: ir.DataType, level: str
) -> AnalogLinear | AnalogConv:
    site, seeds, gain = written.site, written.seeds, written.site.gain is not None
    operator: AnalogLinear | AnalogConv
    if call.window is None:
        operator = AnalogLinear(site.spec, data, site.codes, seeds=seeds, compensated=gain)
    else:
        window = Window(*map(tuple, call.window))  # type: ignore[arg-type]
        operator = AnalogConv(
            site.spec, data, site.codes, seeds=seeds, compensated=gain, window=window
        )
    if level != "qdq":
        return operator
    written.why_floats = operator.why_floats()
    if written.why_floats and call.held is not None:
        written.why_floats = "a chip holds no codes"
    return replace(operator, integer=written.why_floats is None)


# --------------------------------------------------------------------------------- metadata


def _annotate(model: ir.Model, analog: nn.Module, level: str, written: Sequence[_Written]) -> None:
    """Write down what a toolchain needs beside the graph: configs, tile maps, versions."""
    configs: list[dict[str, Any]] = []
    modules: dict[str, int] = {}
    for path, module, _ in sites(analog):
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
        "sites": [site.record() for site in written],
    }
    model.metadata_props[METADATA] = json.dumps(contents)
    model.producer_name, model.producer_version = "analogfx", analogfx.__version__


def _check(file: Path) -> None:
    """Hold a file against ONNX's own rules, shape inference included."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # its checker and its shape inference raise their own
        raise OnnxError(f"onnx.checker refuses the exported model: {error}") from error
