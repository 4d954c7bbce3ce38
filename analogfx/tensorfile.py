"""The safetensors format, read out of memory, so that what was checked is what is used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from analogfx.files import parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a file can hold, by the format's names."""

_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def tensors_in(data: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    The library's own reader opens the path itself, so that another file may be there by then; and
    what it reads out of memory it copies.

    Args:
        data: the whole file: eight bytes of length, a JSON header, the tensors' elements.

    Returns:
        Tensors on the CPU that share memory with ``data``, and the header's strings.

    Raises:
        ValueError: it is no such file.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(_HEADER_BYTES, len(data) - 8):
        raise ValueError("it is no safetensors file")
    header = parse_json(data[8 : 8 + size], depth=3)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no strings")
    return {name: _tensor(data, 8 + size, name, entry) for name, entry in header.items()}, metadata


def _tensor(data: bytearray, start: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sizes = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its entry for {name!r} is none") from None
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"its entry for {name!r} has sizes that are none")
    count = math.prod(shape)
    if last - first != count * dtype.itemsize or start + last > len(data):
        raise ValueError(f"its elements of {name!r} are not all there")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + first).view(shape)
