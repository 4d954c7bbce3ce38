"""The analog sites of an ONNX file, for toolchains, tests and people.

A file is data to distrust: it is parsed, never run. Its record must have the right fields of the
right types (:mod:`analogfx.onnx.fields`) and say what the graph says; tensors must have the right
types and shapes, and lie inside the file's own folder and inside their files.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper, numpy_helper

from analogfx.config import TorchInferenceRPUConfig
from analogfx.errors import ConfigError, OnnxError
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.onnx import fields
from analogfx.onnx.export import METADATA
from analogfx.onnx.levels import LEVELS
from analogfx.onnx.operators import AnalogConv, AnalogLinear
from analogfx.onnx.sites import SCHEMA, tile_map
from analogfx.onnx.writer import DOMAIN, VERSION

_MALFORMED = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, MemoryError,
    RecursionError, ConfigError,
)  # fmt: skip
"""What reading a record or a tensor of a damaged file raises."""


@dataclass(frozen=True)
class OnnxTile:
    """What one tile is programmed with, and what its converters know."""

    row: int
    column: int
    """Place in the grid, along the inputs and along the outputs."""
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    """Which part of the weight matrix it holds: from, and up to."""
    weight: np.ndarray[Any, Any]
    """(outputs, inputs) weights: the codes times their scales, or the floats."""
    codes: np.ndarray[Any, Any] | None
    """(outputs, inputs) integers; None for weights of floats."""
    scales: np.ndarray[Any, Any] | None
    """(outputs,) what a code of 1 stands for; None for weights of floats."""
    input_range: float | None
    """Of the DAC; None for a range that every input has of its own, or none."""
    weight_max: np.ndarray[Any, Any] | None
    """(outputs,) what scales the bound of each output's ADC; None where nothing reads it."""
    bounds: np.ndarray[Any, Any] | None
    """(outputs,) bound of each output's ADC; None without one, and for dynamic ranges, where it is
    ``range * out_bound * weight_max``."""
    code_scale: np.ndarray[Any, Any] | None
    """(outputs,) steps of the ADC for one step of the products; None for products of floats."""
    bias: np.ndarray[Any, Any] | None
    """(outputs,) what is added digitally, once for all tiles of a column; None for no constant."""


@dataclass(frozen=True)
class OnnxSite:
    """One analog site of a file."""

    name: str
    """Path of the module, with the parameter where the module has several sites."""
    op: str
    """"AnalogLinear" or "AnalogConv"."""
    weight_shape: tuple[int, ...]
    tiles: tuple[dict[str, Any], ...]
    """Every tile: "row" and "column" in the grid, and its slice of "inputs" and "outputs"."""
    spec: MVMSpec
    window: Window | None
    config: TorchInferenceRPUConfig
    nodes: tuple[str, ...]
    """Names of the nodes that compute the site, at level "fused"; else their prefix."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Constants by input of the op: "weight", "weight_scale", "bias", ..."""
    integer: bool = False
    """Whether the file multiplies codes by codes here: level "qdq", where the numbers allow it."""

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Tiles along the inputs and along the outputs."""
        return len(self.spec.in_sizes), len(self.spec.out_sizes)

    @property
    def weight_type(self) -> str:
        """Type of the stored weight: "int4", "int8", "float", ..."""
        return self.tensors["weight"].type

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A constant of the site, read now; codes as int8 or int4.

        Raises:
            OnnxError: the site has no such constant, or its file is too short.
        """
        if name not in self.tensors:
            raise OnnxError(f"{self.name} has no {name}: it has {', '.join(self.tensors)}")
        return self.tensors[name].array()

    def codes(self) -> np.ndarray[Any, Any] | None:
        """The integer codes of the weight, None for a weight of floats."""
        return self.array("weight") if self.weight_type in _CODES else None

    def scales(self) -> np.ndarray[Any, Any] | None:
        """(k, O) what a code of 1 stands for, None for a weight of floats."""
        if self.weight_type not in _CODES:
            return None
        if "weight_scale" in self.tensors:
            return self.array("weight_scale")
        bound = self.array("weight_max")  # of a site that multiplies codes, level "fused" apart
        if not self.spec.weight_per_channel:
            starts = np.cumsum([0, *self.spec.out_sizes[:-1]])
            largest = np.maximum.reduceat(bound, starts, axis=1)
            bound = np.repeat(largest, self.spec.out_sizes, axis=1)
        step = 2 * (bound / bound.dtype.type(self.spec.weight_states))
        return np.where(step == 0, bound.dtype.type(1), step)

    def weight(self) -> np.ndarray[Any, Any]:
        """The weights as the tiles hold them: codes times their steps, or the floats."""
        weight = self.array("weight")
        scale = self.scales()
        if scale is None:
            return weight
        matrix = weight.reshape(weight.shape[0], -1).astype(scale.dtype)
        steps = np.repeat(scale, self.spec.in_sizes, axis=0).T
        return (matrix * steps).reshape(weight.shape)

    def tile(self, row: int, column: int) -> OnnxTile:
        """What one tile is programmed with, read now.

        Args:
            row: along the inputs, from 0.
            column: along the outputs, from 0.

        Raises:
            OnnxError: there is no such tile, or a constant's file is too short.
        """
        rows, columns = self.tile_grid
        if not (0 <= row < rows and 0 <= column < columns):
            raise OnnxError(
                f"{self.name} has no tile ({row}, {column}): its grid is {rows}x{columns}"
            )
        place = self.tiles[row + rows * column]
        inputs, outputs = tuple(place["inputs"]), tuple(place["outputs"])
        part = slice(*outputs), slice(*inputs)

        def matrix(whole: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
            return None if whole is None else whole.reshape(len(whole), -1)[part]

        def vector(name: str) -> np.ndarray[Any, Any] | None:
            return self.array(name)[row, part[0]] if name in self.tensors else None

        weight, scales, largest = matrix(self.weight()), self.scales(), vector("weight_max")
        assert weight is not None
        if largest is not None and not self.spec.bound_per_channel:
            largest = np.full_like(largest, largest.max())
        reach = self.array("input_range")[row] if "input_range" in self.tensors else None
        bounds = None
        if self.spec.out_bound and reach is not None and largest is not None:
            bounds = (reach * reach.dtype.type(self.spec.out_bound)) * largest
        return OnnxTile(
            row,
            column,
            inputs,
            outputs,
            weight=weight,
            codes=matrix(self.codes()),
            scales=None if scales is None else scales[row, part[0]],
            input_range=None if reach is None else float(reach),
            weight_max=largest,
            bounds=bounds,
            code_scale=vector("code_scale"),
            bias=self.array("bias")[part[0]] if "bias" in self.tensors else None,
        )


@dataclass(frozen=True)
class OnnxSites:
    """The sites of a file. Printing it gives a table."""

    version: str
    """The analogfx that wrote the file."""
    level: str
    sites: tuple[OnnxSite, ...] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    """The metadata of the file, as docs/onnx/sites.schema.json describes it."""

    def to_json(self) -> str:
        """The metadata of the file: JSON of docs/onnx/sites.schema.json."""
        return json.dumps(self.record, indent=2)

    def __str__(self) -> str:
        header = ("site", "op", "weight", "type", "tiles", "range", "DAC", "ADC", "bound")
        rows = [
            (
                printable(s.name),
                s.op,
                "x".join(map(str, s.weight_shape)),
                s.weight_type,
                "x".join(map(str, s.tile_grid)),
                s.spec.range_mode,
                *(f"{v:g}" if v else "-" for v in (s.spec.inp_res, s.spec.out_res)),
                f"{s.spec.out_bound:g}" if s.spec.out_bound else "-",
            )
            for s in self.sites
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, tuple("-" * w for w in widths), *rows)
        ]
        tiles = sum(math.prod(s.tile_grid) for s in self.sites)
        version = printable(self.version)
        counts = f"{_count(len(self.sites), 'site')} on {_count(tiles, 'tile')}"
        lines.append(f"{counts}, level {self.level}, analogfx {version}")
        if self.level == "qdq":
            integers = sum(s.integer for s in self.sites)
            verb = "multiplies" if integers == 1 else "multiply"
            lines.append(f"{integers} of {_count(len(self.sites), 'site')} {verb} integers")
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """A text of a file with escapes for what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet."""

    proto: TensorProto = field(repr=False)
    folder: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.proto.dims)

    @property
    def type(self) -> str:
        """Its element type, in ONNX's spelling: "float", "int8", ..."""
        return TensorProto.DataType.Name(self.proto.data_type).lower()

    def check(self) -> None:
        """Refuse a tensor whose bytes are not where and as many as they should be."""
        if any(d < 0 for d in self.shape):
            raise ValueError(f"{self.proto.name} has the shape {self.shape}")
        if self.proto.data_location == TensorProto.EXTERNAL:
            self._span()
        else:
            numpy_helper.to_array(self.proto)

    def array(self) -> np.ndarray[Any, Any]:
        """The tensor's elements."""
        try:
            if self.proto.data_location != TensorProto.EXTERNAL:
                return numpy_helper.to_array(self.proto)
            file, offset, length = self._span()
            with file.open("rb") as stream:
                stream.seek(offset)
                raw = stream.read(length)
            whole = TensorProto(dims=self.proto.dims, data_type=self.proto.data_type, raw_data=raw)
            return numpy_helper.to_array(whole)
        except (*_MALFORMED, OSError) as error:
            raise OnnxError(f"tensor {self.proto.name!r} cannot be read: {error}") from error

    def _span(self) -> tuple[Path, int, int]:
        """File, offset and length of an external tensor, inside the folder and the file."""
        entries = {entry.key: entry.value for entry in self.proto.external_data}
        location = PurePosixPath(entries["location"])
        if location.is_absolute() or ".." in location.parts or "\\" in str(location):
            raise ValueError(f"{self.proto.name} lies outside of the folder: {location}")
        file = self.folder / location
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{self.proto.name} lies in {location}, which is no plain file")
        if self.folder.resolve() not in file.resolve().parents:
            raise ValueError(f"{self.proto.name} lies outside of the folder: {location}")
        offset, length = int(entries.get("offset", "0")), int(entries["length"])
        bits = math.prod(self.shape) * _bits(self.proto.data_type)
        if offset < 0 or length != (bits + 7) // 8 or offset + length > file.stat().st_size:
            raise ValueError(f"{self.proto.name} needs {bits} bits, its file says {length} bytes")
        return file, offset, length


def _bits(data_type: int) -> int:
    if data_type in (TensorProto.INT4, TensorProto.UINT4):
        return 4
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8


def read(path: str | os.PathLike[str]) -> OnnxSites:
    """See :func:`analogfx.load_onnx_sites`."""
    file = Path(path)
    try:
        model = onnx.ModelProto.FromString(file.read_bytes())
    except OSError as error:
        raise OnnxError(f"{file} cannot be read: {error}") from error
    except (DecodeError, *_MALFORMED) as error:
        raise OnnxError(f"{file} is no ONNX model, or damaged: {error}") from error
    metadata = [entry.value for entry in model.metadata_props if entry.key == METADATA]
    if len(metadata) != 1:
        raise OnnxError(f"{file} has no analog sites: expected a file that export_onnx() wrote")
    try:
        record = json.loads(metadata[0])
        if record["schema"] != SCHEMA:
            raise OnnxError(
                f"{file} has schema {record['schema']!r}; this version reads {SCHEMA}: export the "
                "model anew, or read the file with the analogfx that wrote it "
                f"({printable(str(record.get('analogfx')))})"
            )
        versions = {o.version for o in model.opset_import if o.domain == DOMAIN}
        if versions - {VERSION}:
            raise ValueError(f"its ops are of version {max(versions)} of {DOMAIN}, not {VERSION}")
        return _sites(record, _Graph(model.graph, file.parent))
    except (*_MALFORMED, OSError) as error:
        text = printable(str(error) or type(error).__name__)
        raise OnnxError(f"{file} is damaged: {text}") from error


class _Graph:
    """What a record names in a graph."""

    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        self.tensors = {t.name: Tensor(t, folder) for t in graph.initializer}
        self.size = len(graph.node)
        self.nodes: dict[str, list[NodeProto]] = defaultdict(list)
        """By name, and by what stands before the last slash of it."""
        for node in graph.node:
            for name in {node.name, node.name.rpartition("/")[0]}:
                self.nodes[name].append(node)


def _sites(record: dict[str, Any], graph: _Graph) -> OnnxSites:
    level = fields.one_of(record["level"], LEVELS, "level")
    version = fields.text(record["analogfx"], "analogfx")
    records = fields.listed(record["sites"], "sites")
    if len(records) > graph.size:
        raise ValueError(f"{len(records)} sites in a graph of {graph.size} nodes")
    configs = [TorchInferenceRPUConfig.from_dict(c) for c in record["configs"][: len(records)]]
    sites = [_site(site, level, record["modules"], configs, graph) for site in records]
    names = [site.name for site in sites]
    if len(set(names)) < len(names):
        raise ValueError("two sites have the same name")
    return OnnxSites(version, level, tuple(sites), record)


def _site(
    record: dict[str, Any],
    level: str,
    modules: dict[str, int],
    configs: list[TorchInferenceRPUConfig],
    graph: _Graph,
) -> OnnxSite:
    labels = fields.texts(record["nodes"], "nodes")
    found = {label: graph.nodes.get(label, []) for label in labels}
    spec = fields.spec(record["spec"])
    number = fields.whole(modules[fields.text(record["module"], "module")], "modules")
    site = OnnxSite(
        name=fields.text(record["name"], "name"),
        op=fields.one_of(record["op"], ("AnalogLinear", "AnalogConv"), "op"),
        weight_shape=fields.wholes(record["weight_shape"], "weight_shape", least=1),
        tiles=_tiles(fields.listed(record["tiles"], "tiles"), spec),
        spec=spec,
        window=fields.window(record["window"]),
        config=configs[number],
        nodes=labels,
        tensors={key: graph.tensors[name] for key, name in record["initializers"].items()},
        integer=any(n.op_type in _INTEGER for nodes in found.values() for n in nodes),
    )
    _check_shapes(site)
    _check_tensors(site)
    _check_nodes(site, level, found)
    return site


_INTEGER = ("MatMulInteger", "QLinearConv")
_FLOATS = ("float", "float16", "bfloat16", "double")
_CODES = ("int8", "int4", "int16")


def _tiles(record: list[Any], spec: MVMSpec) -> tuple[dict[str, Any], ...]:
    """The tile map, which must be that of the sizes."""
    count = len(spec.in_sizes) * len(spec.out_sizes)
    if len(record) != count or record != (expected := tile_map(spec)):
        raise ValueError(f"tiles is no map of the {count} tiles of in_sizes and out_sizes")
    return tuple(expected)


def _check_shapes(site: OnnxSite) -> None:
    """Refuse tiles that do not cover the weight."""
    if site.op != ("AnalogLinear" if site.window is None else "AnalogConv"):
        raise ValueError(f"{site.name} is a {site.op!r}")
    outputs, inputs = site.weight_shape[0], math.prod(site.weight_shape[1:])
    spec = site.spec
    if sum(spec.in_sizes) != inputs or sum(spec.out_sizes) != outputs or outputs % spec.groups:
        raise ValueError(f"the tiles of {site.name} do not cover its weight {site.weight_shape}")
    if site.window is not None and site.weight_shape[2:] != tuple(site.window.kernel_size):
        raise ValueError(f"the weight of {site.name} {site.weight_shape} is not as its window")


def _check_tensors(site: OnnxSite) -> None:
    """Refuse constants of the wrong type or shape."""
    outputs, rows = site.weight_shape[0], len(site.spec.in_sizes)
    codes = "weight_scale" in site.tensors or "code_scale" in site.tensors
    real = ("float", "double")
    expected = {
        "weight": (site.weight_shape, _CODES if codes else _FLOATS),
        "weight_scale": ((rows, outputs), real),
        "bias": ((outputs,), _FLOATS),
        "input_range": ((rows,), real),
        "weight_max": ((rows, outputs), real),
        "code_scale": ((rows, outputs), real),
        "gain": ((rows, outputs), real),
    }
    for name, tensor in site.tensors.items():
        shape, types = expected[name]
        if tensor.shape != shape:
            raise ValueError(f"{name} of {site.name} is {tensor.shape}, not {shape}")
        if tensor.type not in types:
            raise ValueError(f"{name} of {site.name} is {tensor.type}, not {' or '.join(types)}")
        tensor.check()
    site.tensors["weight"]


# ------------------------------------------------------------------------------------- nodes


def _check_nodes(site: OnnxSite, level: str, found: Mapping[str, Sequence[NodeProto]]) -> None:
    """Refuse a record whose nodes are missing or say something else."""
    for label, nodes in found.items():
        if not nodes:
            raise ValueError(f"{site.name} has no node {label}")
        noted = {e.value for n in nodes for e in n.metadata_props if e.key == METADATA}
        if noted != {site.name}:
            raise ValueError(f"node {label} belongs to {sorted(noted)}, not to {site.name}")
        if level == "fused":
            _check_attributes(site, [node for node in nodes if node.name == label])


def _check_attributes(site: OnnxSite, nodes: Sequence[NodeProto]) -> None:
    for node in nodes:
        if (node.domain, node.op_type) != (DOMAIN, site.op):
            raise ValueError(f"node {node.name} is a {node.domain} {node.op_type}, not {site.op}")
        given = {a.name: _value(helper.get_attribute_value(a)) for a in node.attribute}
        for name, value in _attributes(site).items():
            if given.get(name) != _value(value):
                raise ValueError(
                    f"node {node.name} has {name} {given.get(name)}, its record {value}"
                )


def _attributes(site: OnnxSite) -> dict[str, Any]:
    """What the nodes of a site say at level "fused", but for noise."""
    given = site.spec, ir.DataType.FLOAT, site.weight_type in _CODES
    if site.window is None:
        return AnalogLinear(*given).attributes()
    return AnalogConv(*given, window=site.window).attributes()


def _value(value: Any) -> Any:
    """An attribute as a file holds it."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, float):
        return float(np.float32(value))
    return list(value) if isinstance(value, (list, tuple)) else value
