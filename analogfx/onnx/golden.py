"""Golden vectors: what a model and each of its sites did on some inputs, beside the file.

A toolchain that reads the file checks itself against them; docs/onnx/golden.md says what is
written, and names such a check.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from analogfx.errors import OnnxError
from analogfx.kernels import integers
from analogfx.onnx.arguments import bound, tensors_of
from analogfx.onnx.calls import numbered
from analogfx.onnx.interval import codes_of
from analogfx.onnx.runtimes import host
from analogfx.onnx.sites import Programmed

SCHEMA = "1"
"""Version of the file's layout."""

ENDING = ".golden.safetensors"
"""What stands behind the name of the ONNX file."""

Vectors = dict[str, Tensor]


@torch.no_grad()
def vectors(
    analog: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    count: int,
    sites: Mapping[int, tuple[Programmed, Sequence[str]]],
    names: tuple[Sequence[str], Sequence[str]],
) -> Vectors:
    """Run a model in eval mode, and note what every site did.

    Args:
        count: of calls. Each rolls the inputs of the example along their last axis by one more, so
            tokens stay tokens and masks stay masks.
        sites: by number, each with the labels of its calls.
        names: of the inputs and of the outputs.

    Returns:
        Tensors by name, each with the calls as first axis.
    """
    rows = []
    for number in range(count):
        given, named = _rolled((args, dict(kwargs)), number)
        rows.append(_call(analog, given, named, sites, names))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _rolled(call: Any, by: int) -> Any:
    def roll(leaf: Any) -> Any:
        return leaf.roll(by, -1) if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return tree_map(roll, call)


def _call(
    analog: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: Mapping[int, tuple[Programmed, Sequence[str]]],
    names: tuple[Sequence[str], Sequence[str]],
) -> Vectors:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    with numbered(analog, lambda number, x, y: seen[number].append((host(x), host(y)))):
        outputs = tensors_of(analog(*args, **kwargs))
    inputs = tensors_of(bound(analog, args, kwargs))
    found = {f"input/{n}": host(t) for n, t in zip(names[0], inputs, strict=True)}
    found |= {f"output/{n}": host(t) for n, t in zip(names[1], outputs, strict=True)}
    for number, (site, labels) in sites.items():
        if len(labels) != len(seen[number]):
            raise OnnxError(
                f"{site.name} is called {len(seen[number])} times by the model and {len(labels)} "
                "times by its file, so no golden vectors belong to its nodes: leave out golden="
            )
        for label, (x, y) in zip(labels, seen[number], strict=True):
            noted = {"x": x, "y": y, **_codes(site, x)}
            found |= {f"site/{label}/{key}": value for key, value in noted.items()}
    return found


def _codes(site: Programmed, x: Tensor) -> Vectors:
    """The codes behind the converters of a site that multiplies codes; none for another."""
    if site.code_scale is None:
        return {}
    spec = site.spec
    pairs = (spec.inp_res, spec.out_res)
    ends = [integers.largest(integers.states(res)) for res in pairs]
    kinds = [torch.int16 if end <= torch.iinfo(torch.int16).max else torch.int32 for end in ends]
    dac, adc = codes_of(site, x)
    return {"dac": dac.to(kinds[0]), "adc": adc.clamp(-ends[1], ends[1]).to(kinds[1])}


def write(found: Vectors, file: Path) -> None:
    """Write vectors beside their file, whose digest they name.

    Raises:
        OnnxError: they cannot be written.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    place = file.with_name(file.name + ENDING)
    scratch = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
    contiguous = {name: t.contiguous() for name, t in found.items()}
    try:
        scratch.write_bytes(save(contiguous, {"schema": SCHEMA, "sha256": digest}))
        os.replace(scratch, place)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OnnxError(f"{place} cannot be written: {error.strerror or error}") from error
