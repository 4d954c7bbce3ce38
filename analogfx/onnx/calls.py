"""Which site a node of an exported graph is.

While torch's exporter traces a model, every call of a fused op becomes a call of the provisional op
``analogfx_onnx::site``, which carries the number of its site; in ONNX it is a node ``Site`` that
carries the same. Counting nodes would not do: a call whose result is unused leaves no node.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import analogfx.ops  # noqa: F401 (registers the fused ops)
from analogfx import held
from analogfx.errors import OnnxError
from analogfx.held import Held
from analogfx.kernels import experts
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode, encode
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.driven import is_driven
from analogfx.modules.program import AnalogSite
from analogfx.modules.sites import sites
from analogfx.onnx.writer import DOMAIN, VERSION

_EXPERTS = torch.ops.analogfx.analog_experts.default
_FUSED = (torch.ops.analogfx.analog_linear.default, torch.ops.analogfx.analog_conv.default)
_HELD_EXPERTS = torch.ops.analogfx.held_experts.default
_HELD = (torch.ops.analogfx.held_linear.default, torch.ops.analogfx.held_conv.default)

_library = torch.library.Library("analogfx_onnx", "DEF")
_library.define(
    "site(Tensor x, Tensor weight, Tensor? bias, Tensor? input_range, int number, str window, "
    "str spec) -> Tensor"
)


def _fake_site(
    x: Tensor, weight: Tensor, bias: Any, input_range: Any, number: int, window: str, spec: str
) -> Tensor:
    """What the fused op would return."""
    fused = _FUSED[bool(window)]
    texts = (window, spec) if window else (spec,)
    y: Tensor = fused(x, weight, bias, input_range, None, None, *texts)[0]
    return y


torch.library.register_fake("analogfx_onnx::site", _fake_site, lib=_library)

SITE = torch.ops.analogfx_onnx.site.default


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
    expert: int | None = None
    """Which of a layer's experts it is; None for a product of one matrix."""
    held: Held | None = None
    """What a chip holds there: of all experts, if there are any; None outside of every chip."""

    def is_convolution(self) -> bool:
        """Whether the model convolves here, with or without patches."""
        return self.site.weight(self.module).dim() > 2


# ---------------------------------------------------------------------------------- in torch


Observer = Callable[[int, Tensor, Tensor], None]
"""Takes the number of a site, its input and its output."""


class _Numbering(TorchFunctionMode):
    """Turns the fused ops of one module's forward into provisional ones, numbered as they come.

    With an observer the fused ops stay, and it is told of each. A driven module calls its sites
    many times: a parameter tells which one it is.
    """

    def __init__(self, first: int, weights: Sequence[Tensor], observe: Observer | None) -> None:
        super().__init__()
        self.first = first
        self.observe = observe
        self.weights = weights
        self.counted = itertools.count(first)
        self.seen: set[int] = set()

    def _number(self, weight: Tensor) -> int:
        known = [n for n, mine in enumerate(self.weights, self.first) if mine is weight]
        return known[0] if len(known) == 1 else next(self.counted)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # The fused ops' other outputs are for the backward.
        if func is _EXPERTS:
            return self._experts(*args[:5], *args[-2:]), None, None
        if func in _FUSED:
            return self._site(func, self._number(args[1]), args, args[6:-1]), None, None
        if func is _HELD_EXPERTS:
            x, weight, bias, input_range = args[:4]
            offsets, spec = args[-2:]
            matrices = weight.unflatten(0, (offsets.shape[0], -1))
            return self._experts(x, matrices, bias, input_range, None, offsets, spec)
        if func in _HELD:
            return self._site(func, self._number(args[1]), args, args[9:-1])
        return func(*args, **(kwargs or {}))

    def _site(self, func: Any, number: int, args: Sequence[Any], window: Sequence[str]) -> Tensor:
        """One call of a site, with the arguments of its op."""
        self.seen.add(number)
        y: Tensor
        if self.observe is None:
            y = SITE(*args[:4], number, "".join(window), args[-1])
            return y
        y = func(*args)[0]
        self.observe(number, args[0], y)
        return y

    def _experts(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_range: Tensor | None,
        clip: Tensor | None,
        offsets: Tensor,
        spec: str,
    ) -> Tensor:
        """A site for every expert, each on all rows: how many are its own depends on the data."""
        count = offsets.shape[0]
        one = encode(experts.of_one(decode(MVMSpec, spec), count))
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
        clips = [None] * count if clip is None else clip.chunk(count, 1)
        numbers = [next(self.counted) for _ in range(count)]
        out = None
        for e in reversed(range(count)):
            of_expert = None if bias is None else bias[e]
            ranges = experts.range_of(input_range, e)
            call = x, weight[e], of_expert, ranges, clips[e], None, one
            y = self._site(_FUSED[0], numbers[e], call, ())
            behind = torch.zeros_like(y) if out is None else out
            out = torch.where(rows < offsets[e], y, behind)
        assert out is not None
        return out


def parts(site: AnalogSite) -> list[tuple[AnalogSite, int | None]]:
    """The sites of one matrix each that a file has for a site, with the expert of each."""
    if not site.experts:
        return [(site, None)]
    outputs = len(site.out_sizes) // site.experts
    return [
        (
            replace(
                site,
                name=f"{site.name}.{e}",
                out_sizes=site.out_sizes[:outputs],
                weight=functools.partial(_of_expert, site, e),
                experts=0,
            ),
            e,
        )
        for e in range(site.experts)
    ]


def _of_expert(site: AnalogSite, expert: int, module: nn.Module) -> Tensor:
    return site.matrices(site.weight(module))[expert]


@contextmanager
def numbered(analog: nn.Module, observe: Observer | None = None) -> Iterator[None]:
    """A context in which the sites of a model run as provisional ops, or are observed."""
    first, placements = 0, []
    for path, module in analog.named_modules():
        if isinstance(module, AnalogModule):
            placement = module._analog
            placement.forward = functools.partial(_forward, path, first, observe)  # type: ignore
            placements.append(placement)
            first += sum(len(parts(site)) for site in placement.sites)
    try:
        yield
    finally:
        for placement in placements:
            del placement.forward


def _forward(
    path: str,
    first: int,
    observe: Observer | None,
    module: AnalogModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    placement = module._analog
    weights: list[Tensor] = []
    holdings = held.of(placement)
    if is_driven(module):
        weights = [site.weight(module) for site in placement.sites]
        weights = weights if holdings is None else [one.weight for one in holdings]
    with _Numbering(first, weights, observe) as numbering:
        out = type(placement).forward(placement, module, args, kwargs)
    products = sum(len(parts(site)) for site in placement.sites)
    if len(numbering.seen) != products:
        raise OnnxError(
            f"{path or type(module).__name__}: {len(numbering.seen)} of its {products} "
            "analog products are fused ops, and the others have no translation"
        )
    return out


# ----------------------------------------------------------------------------------- in ONNX


def translate(
    x: Any, weight: Any, bias: Any, input_range: Any, number: int, window: str, spec: str
) -> Any:
    """The provisional node of a provisional op; clips are read off the module later."""
    site = Op(Opset(DOMAIN, VERSION), "Site", _schema())
    return site(x, weight, bias, input_range, number=number, window=window, spec=spec)


def _schema() -> onnx.defs.OpSchema:
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    parameter = onnx.defs.OpSchema.FormalParameter
    attribute, kind = onnx.defs.OpSchema.Attribute, onnx.defs.OpSchema.AttrType
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
        outputs=[parameter("y", "T")],
        type_constraints=[("T", floats, ""), ("R", floats, "")],
        attributes=[
            attribute("number", kind.INT),
            attribute("window", kind.STRING),
            attribute("spec", kind.STRING),
        ],
    )


def is_site(node: ir.Node) -> bool:
    """Whether a node is a provisional one."""
    return (node.domain, node.op_type) == (DOMAIN, "Site")


def site_calls(analog: nn.Module, graph: ir.Graph) -> Iterator[SiteCall]:
    """The calls of a model's sites, in the order of a graph."""
    found = [
        (path, module, part, expert, holding(module, site))
        for path, module, site in sites(analog)
        for part, expert in parts(site)
    ]
    for node in filter(is_site, graph):
        path, module, site, expert, on_chip = found[node.attributes["number"].as_int()]
        window, spec = (node.attributes[name].as_string() for name in ("window", "spec"))
        geometry = decode(Window, window) if window else None
        yield SiteCall(node, path, module, site, decode(MVMSpec, spec), geometry, expert, on_chip)


def holding(module: AnalogModule, site: AnalogSite) -> Held | None:
    """What the chip that the thread is inside of holds of a site; None where there is none."""
    placement = module._analog
    found = held.of(placement)
    return None if found is None else found[placement.sites.index(site)]
