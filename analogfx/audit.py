"""What a model really multiplies by: one run, watched below torch's dispatcher.

The report says what was decided from the code of modules. The audit knows nothing of that code: it
follows by storage which values are computed from parameters alone, through views, casts and
arithmetic, and notes every product that has such a value as one operand and an activation as the
other. So it sees what code hides: custom functions, jit, decorators, a weight that another module
reads.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from analogfx import terminal
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import unwrapped
from analogfx.passes.contract import SiteReport
from analogfx.report import Report, report

Names = frozenset[str]


@dataclass(frozen=True)
class Product:
    """Products of one op with the same parameters, in the same module."""

    parameters: tuple[str, ...]
    """Paths of the parameters that the weight is computed from, of two dimensions or more."""
    module: str
    """Path of the module whose code multiplies."""
    op: str
    """The op that multiplied, such as "aten.mm"."""
    elements: int
    """Elements of the parameters."""
    calls: int
    status: str
    """"analog" or "digital"."""
    reported: bool
    """Whether the report has a row of this status for one of the parameters."""
    where: str
    """File and line of the statement, the innermost outside torch; empty if there is none."""


@dataclass(frozen=True)
class Audit:
    """What one run of a model multiplied by. Printing it gives a table, misses first."""

    products: tuple[Product, ...] = field(repr=False)
    report: Report = field(repr=False)
    """The report that the run is compared with."""
    idle: tuple[SiteReport, ...] = field(repr=False)
    """Sites that the report calls analog, and that the run did not multiply by."""

    @property
    def missed(self) -> tuple[Product, ...]:
        """The digital products that the report does not list."""
        return tuple(p for p in self.products if p.status == "digital" and not p.reported)

    @property
    def ok(self) -> bool:
        """Whether the report lists every product that was seen, as what it was."""
        return all(p.reported for p in self.products)

    @property
    def coverage(self) -> float:
        """Share of the elements that only analog products multiplied by; 1.0 where none did.

        Of the parameters that the run multiplied by, each counted once.
        """
        sizes = {p.parameters: p.elements for p in self.products}
        digital = {p.parameters for p in self.products if p.status == "digital"}
        total = sum(sizes.values())
        return 1.0 - sum(sizes[names] for names in digital) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "ok": self.ok,
            "coverage": self.coverage,
            "reported_coverage": self.report.coverage,
            "products": [asdict(p) for p in self.products],
            "idle": [s.name for s in self.idle],
        }

    def text(self, width: int | None = None) -> str:
        """The table.

        Args:
            width: columns to wrap to; None to wrap nothing.
        """
        rows = [row for row, _ in self._rows()]
        return "\n".join([terminal.text(_HEADER, rows, width), *self._below()])

    def print(self) -> None:
        """Print the table, in colours where stdout is a terminal."""
        rows = self._rows()
        terminal.show(_HEADER, [r for r, _ in rows], [s for _, s in rows], self._below())

    def __str__(self) -> str:
        return self.text(terminal.terminal_width())

    def __repr__(self) -> str:
        return str(self)

    def _rows(self) -> list[tuple[terminal.Row, str]]:
        ranked = sorted(self.products, key=lambda p: [*_STYLES].index(_verdict(p)))
        rows = [
            (" + ".join(p.parameters), _verdict(p), p.op, p.module or "(the model)", p.where)
            for p in ranked
        ]
        # Folded by the parameter's path; the module's numbers are those of the parameter.
        plain = [(r[0], r[1], r[2], _unnumbered(r[3]), r[4]) for r in rows]
        return [(row, _STYLES[row[1]]) for row in terminal.counted(plain)]

    def _below(self) -> list[str]:
        analog = sum(p.status == "analog" for p in self.products)
        lines = [
            f"{analog} of {len(self.products)} products analog, {self.coverage:.1%} of the weight "
            f"elements as measured; the report says {self.report.coverage:.1%}"
        ]
        if self.missed:
            lines.append(f"{len(self.missed)} digital products that the report does not list")
        if self.idle:
            shown = [row[0] for row in terminal.counted([(s.name,) for s in self.idle])]
            lines.append(f"analog, but not reached by this run: {', '.join(shown)}")
        return lines


_HEADER = ("parameter", "seen", "op", "in", "statement")
_STYLES = {
    "digital, MISSED": "bold red",
    "analog, not listed": "bold red",
    "digital, reported": "yellow",
    "analog": "",
}


def _verdict(product: Product) -> str:
    if product.status == "analog":
        return "analog" if product.reported else "analog, not listed"
    return "digital, reported" if product.reported else "digital, MISSED"


def _unnumbered(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def audit(analog: nn.Module, *inputs: Any, **kwargs: Any) -> Audit:
    """Run a model once, and compare the products that were seen with the report.

    Runs in the model's present mode, with gradients on or off as they are. Buffers, input ranges
    and the random state are put back afterwards, so nothing of the model changes.

    What counts is a product (``mm``, ``conv2d``, attention, a custom op, ...) of an activation and
    a value that comes from parameters of two or more dimensions. Look-ups in a matrix, norms,
    biases and arithmetic by element are none; a product that is spelled as a multiplication by
    element and a sum is not recognised.

    Args:
        analog: what :func:`analogfx.analogize` or :func:`analogfx.load` returned.
        inputs, kwargs: what the model's forward takes.

    Raises:
        PlacementError: the model was not analogized. A digital model under
            ``torch.compile(backend="analogfx")`` computes inside compiled code, where there is
            nothing to watch.

    Example:
        >>> result = audit(analogize(nn.Sequential(nn.Linear(4, 3)), config), torch.randn(2, 4))
        >>> result.ok, result.coverage
        (True, 1.0)
    """
    model = unwrapped(analog)
    placed = report(model)
    watch = _Watch(model)
    before = [(t, t.detach().clone()) for t in _written(model) if not t.is_meta]
    with torch.random.fork_rng():
        try:
            with watch:
                model(*inputs, **kwargs)
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
    return Audit(tuple(watch.products(placed.sites)), placed, tuple(watch.idle(placed.sites)))


def _written(model: nn.Module) -> Iterator[Tensor]:
    """What a forward may write to: buffers, and what sites remember."""
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, AnalogModule):
            names = module._analog.state_names()
            yield from (p for n in names if (p := module._parameters.get(n)) is not None)


# ------------------------------------------------------------------------------- the dispatch mode


_PRODUCTS = {
    "mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot",
    "linear", "mkldnn_linear", "_int_mm", "_scaled_mm", "_sparse_mm", "_sparse_addmm", "sspaddmm",
    "convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "conv_tbc",
    "slow_conv3d", "_slow_conv2d_forward", "conv_depthwise3d", "_conv_depthwise2d",
    "slow_conv_transpose2d", "slow_conv_transpose3d", "slow_conv_dilated2d", "slow_conv_dilated3d",
    "cudnn_convolution", "cudnn_convolution_transpose", "miopen_convolution", "_trilinear",
    "_grouped_mm", "_scaled_grouped_mm", "_cdist_forward", "_euclidean_dist",
    "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_lstm_mps",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_fused_sdp_choice",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
}  # fmt: skip
"""ATen's ops that multiply matrices, below those that are made of others."""

_ATTENTION = slice(0, 3)
_BEHIND_ADDEND = slice(1, 3)
_FACTORS = {
    **dict.fromkeys(("linear", "mkldnn_linear", "convolution", "_convolution"), slice(0, 2)),
    **dict.fromkeys(("addmm", "_addmm_activation", "baddbmm", "addbmm", "addmv"), _BEHIND_ADDEND),
    **dict.fromkeys((name for name in _PRODUCTS if "attention" in name), _ATTENTION),
    **dict.fromkeys(
        ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), slice(None)
    ),
}
"""Which of an op's tensors are multiplied, where others are added: biases and masks."""

_KNOWN_SPACES = {"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional"}
"""Namespaces of which all products are known; any op of another one may hold a product."""

_CHOOSING = {"index", "index_select", "gather", "take_along_dim"}
"""Ops that take parts of a tensor: of a stack of matrices, as experts are, what is a weight."""


@dataclass(frozen=True)
class _Origin:
    """Where a value that no input reaches comes from."""

    matrices: Names = frozenset()
    """Parameters of two dimensions or more."""
    others: Names = frozenset()
    """Other parameters, buffers, and modules that made a constant."""

    def __or__(self, other: _Origin) -> _Origin:
        return _Origin(self.matrices | other.matrices, self.others | other.others)


@dataclass
class _Seen:
    """What is counted of one kind of product."""

    where: str
    calls: int = 0


class _Watch(TorchDispatchMode):
    """Follows by storage what comes from parameters alone, and notes what multiplies by it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.sizes: dict[str, int] = {}
        self.origins: dict[int, _Origin] = {}
        """By the storage's address; a storage that is not there holds an activation."""
        self.alive: list[Any] = []
        """Those storages, so that no other takes their address."""
        self.parameters: set[int] = set()
        self.seen: dict[tuple[tuple[str, ...], str, str, bool], _Seen] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            matrix = parameter.dim() > 1
            self._learn(parameter, _Origin(_names(name, matrix), _names(name, not matrix)))
            self.parameters.add(_key(parameter) or 0)
            self.sizes[name] = parameter.numel()
        for name, buffer in model.named_buffers(remove_duplicate=False):
            if _key(buffer) not in self.origins:
                self._learn(buffer, _Origin(others=frozenset([name])))

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # as they come in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        origins = [self.origins.get(_key(t) or 0) for t in given]
        space, _, name = func._schema.name.partition("::")
        ours = space == "analogfx"
        unknown = not ours and space not in _KNOWN_SPACES and bool(given)
        if ours or unknown or name in _PRODUCTS:
            foreign = self._multiplies(func, given, origins, ours)
            if foreign or ours:
                origins = [None]
        self._follow(func, name, given, origins, out)
        return out

    def _multiplies(
        self, func: OpOverload, given: list[Tensor], origins: list[_Origin | None], ours: bool
    ) -> bool:
        """Note a product; say whether it was one of a weight and what is none."""
        factors = _FACTORS.get(func._schema.name.partition("::")[2], slice(None))
        given, origins = given[factors], origins[factors]
        weights = [
            origin
            for tensor, origin in zip(given, origins, strict=True)
            if origin is not None and origin.matrices and tensor.dim() > 1
        ]
        if not weights:
            return False
        path, where = self._place()
        if None not in origins:
            # Of parameters alone. A module that gets one of its operands from outside multiplies
            # as by an activation; one that has them all computes a weight.
            inside = [o for o in weights if _is_inside(o, path)]
            if not inside or all(o is None or _is_inside(o, path) for o in origins):
                return False
            weights = inside
        for weight in weights:
            key = tuple(sorted(weight.matrices)), path, str(func.overloadpacket), ours
            self.seen.setdefault(key, _Seen(where)).calls += 1
        return True

    def _follow(
        self,
        func: OpOverload,
        name: str,
        given: list[Tensor],
        origins: Sequence[_Origin | None],
        out: Any,
    ) -> None:
        """Take down what the results of an op come from."""
        first = origins[0] if origins else None
        origin: _Origin | None
        if name == "embedding":  # a look-up is an activation, though its positions be constants
            origin = None
        elif name in _CHOOSING and first and first.matrices and given[0].dim() > 2:
            origin = first
        elif None in origins:
            origin = None
        elif origins:
            origin = functools.reduce(_Origin.__or__, (o for o in origins if o))
        else:
            origin = _Origin(others=frozenset([self._place()[0]]))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            key = _key(tensor)
            if key is None:
                continue
            if func._schema.is_mutable:
                if key in self.parameters:
                    continue
                if origin is None:
                    self.origins.pop(key, None)
                elif key in self.origins:
                    self.origins[key] |= origin
            elif origin is not None and key not in self.origins:
                self._learn(tensor, origin)

    def _learn(self, tensor: Tensor, origin: _Origin) -> None:
        key = _key(tensor)
        if key is not None:
            known = self.origins.get(key)
            self.origins[key] = origin if known is None else known | origin
            self.alive.append(tensor.untyped_storage())

    def _place(self) -> tuple[str, str]:
        """The module whose forward runs, and the statement."""
        where = ""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if not where and not code.co_filename.startswith(_INNER):
                where = f"{_short(code.co_filename)}:{frame.f_lineno}"
            if code is _CALL:
                module = frame.f_locals["self"]
                if module in self.paths:
                    # What a parametrization computes, its module computes.
                    return self.paths[module].partition(".parametrizations.")[0], where
            frame = frame.f_back
        return "", where

    def products(self, sites: Iterable[SiteReport]) -> Iterator[Product]:
        """What was seen, beside what the report says."""
        said: dict[str, list[str]] = {"analog": [], "digital": []}
        for site in sites:
            said[site.status].append(site.parameter)
        for (names, module, op, analog), seen in self.seen.items():
            status = "analog" if analog else "digital"
            elements = sum(self.sizes[name] for name in names)
            listed = any(self._is_of(parameter, names) for parameter in said[status])
            yield Product(names, module, op, elements, seen.calls, status, listed, seen.where)

    def idle(self, sites: Iterable[SiteReport]) -> Iterator[SiteReport]:
        """The analog sites that were not seen."""
        seen = [(names, module) for names, module, _, analog in self.seen if analog]
        for site in sites:
            ran = any(m == site.module and self._is_of(site.parameter, n) for n, m in seen)
            if site.status == "analog" and not ran:
                yield site

    def _is_of(self, parameter: str, names: Iterable[str]) -> bool:
        """Whether a site's parameter is one of these.

        It may be what they compute: of a parametrized weight, and of one that a hook sets from
        ``weight_orig`` say, there is no parameter of that name.
        """
        if parameter in self.sizes:
            return parameter in names
        return any(name.startswith((f"{parameter}.", f"{parameter}_")) for name in names)


_CALL = nn.Module._call_impl.__code__
_INNER = (
    str(Path(torch.__file__).parent) + os.sep,
    str(Path(__file__).parent) + os.sep,
    "<",
)
"""Where frames are not the user's: torch, this package, code that is in no file."""


def _key(tensor: Tensor) -> int | None:
    """The address of a tensor's storage, None where it has none of its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _names(name: str, wanted: bool) -> Names:
    return frozenset([name] if wanted else ())


def _is_inside(origin: _Origin, path: str) -> bool:
    """Whether all that a value comes from is in a module."""
    prefix = f"{path}." if path else ""
    return all(name == path or name.startswith(prefix) for name in origin.matrices | origin.others)


@functools.cache
def _is_composite(func: OpOverload) -> bool:
    """Whether an op is made of others in its implementation."""
    return func.namespace == "aten" and func.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )


def _short(path: str) -> str:
    """The last folder and the name of a file."""
    return "/".join(Path(path).parts[-2:])
