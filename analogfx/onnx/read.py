"""The analog sites of an ONNX file, for toolchains, tests and people.

A file is data to distrust: it is parsed, never run; names must exist, shapes must fit, tensors
must lie inside the file's own folder and inside their files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from analogfx.config import TorchInferenceRPUConfig
from analogfx.errors import ConfigError, OnnxError
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.onnx.export import METADATA
from analogfx.onnx.levels import LEVELS
from analogfx.onnx.sites import SCHEMA

_MALFORMED = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, MemoryError,
    RecursionError, ConfigError,
)  # fmt: skip
"""What reading a record or a tensor of a damaged file raises."""


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
        return self.array("weight") if "weight_scale" in self.tensors else None

    def weight(self) -> np.ndarray[Any, Any]:
        """The weights as the tiles hold them: codes times their steps, or the floats."""
        weight = self.array("weight")
        if "weight_scale" not in self.tensors:
            return weight
        scale = self.array("weight_scale")
        matrix = weight.reshape(weight.shape[0], -1).astype(scale.dtype)
        steps = np.repeat(scale, self.spec.in_sizes, axis=0).T
        return (matrix * steps).reshape(weight.shape)


@dataclass(frozen=True)
class OnnxSites:
    """The sites of a file. Printing it gives a table."""

    version: str
    """The analogfx that wrote the file."""
    level: str
    sites: tuple[OnnxSite, ...] = field(repr=False)

    def __str__(self) -> str:
        header = ("site", "op", "weight", "type", "tiles", "range", "DAC", "ADC", "bound")
        rows = [
            (
                s.name,
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
        lines.append(
            f"{len(self.sites)} sites on {tiles} tiles, level {self.level}, analogfx {self.version}"
        )
        return "\n".join(lines)


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
            raise OnnxError(f"{file} has schema {record['schema']!r}; this version reads {SCHEMA}")
        return _sites(record, {t.name: Tensor(t, file.parent) for t in model.graph.initializer})
    except (*_MALFORMED, OSError) as error:
        raise OnnxError(f"{file} is damaged: {error or type(error).__name__}") from error


def _sites(record: dict[str, Any], tensors: dict[str, Tensor]) -> OnnxSites:
    if record["level"] not in LEVELS:
        raise ValueError(f"level is {record['level']!r}")
    configs = [TorchInferenceRPUConfig.from_dict(config) for config in record["configs"]]
    sites = [_site(site, record["modules"], configs, tensors) for site in record["sites"]]
    return OnnxSites(str(record["analogfx"]), record["level"], tuple(sites))


def _site(
    record: dict[str, Any],
    modules: dict[str, int],
    configs: list[TorchInferenceRPUConfig],
    tensors: dict[str, Tensor],
) -> OnnxSite:
    name, window = str(record["name"]), record["window"]
    held = {key: tensors[initializer] for key, initializer in record["initializers"].items()}
    site = OnnxSite(
        name=name,
        op=record["op"],
        weight_shape=tuple(record["weight_shape"]),
        tiles=tuple(record["tiles"]),
        spec=MVMSpec(**record["spec"]),
        window=None if window is None else Window(**window),
        config=configs[modules[record["module"]]],
        nodes=tuple(record["nodes"]),
        tensors=held,
    )
    _check_shapes(site)
    return site


def _check_shapes(site: OnnxSite) -> None:
    """Refuse constants that do not fit the site's tiles."""
    if site.op != ("AnalogLinear" if site.window is None else "AnalogConv"):
        raise ValueError(f"{site.name} is a {site.op!r}")
    outputs, inputs = site.weight_shape[0], math.prod(site.weight_shape[1:])
    rows = len(site.spec.in_sizes)
    if sum(site.spec.in_sizes) != inputs or sum(site.spec.out_sizes) != outputs:
        raise ValueError(f"the tiles of {site.name} do not cover its weight {site.weight_shape}")
    expected = {
        "weight": site.weight_shape,
        "weight_scale": (rows, outputs),
        "bias": (outputs,),
        "input_range": (rows,),
        "weight_max": (rows, outputs),
    }
    for name, tensor in site.tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(f"{name} of {site.name} is {tensor.shape}, not {expected[name]}")
        tensor.check()
    site.tensors["weight"]
