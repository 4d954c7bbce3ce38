"""What the passes make of a module's forward."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Graph, Node

from analogfx.config import Resolved
from analogfx.errors import CaptureError, PassError
from analogfx.kernels.spec import MVMSpec
from analogfx.modules.capture import TRACING, Pattern, bind, capture, source
from analogfx.modules.children import child_of
from analogfx.modules.direct import called_directly
from analogfx.modules.driven import bound, is_driven, spread, whole_of
from analogfx.passes import pipeline
from analogfx.passes.contract import Context, Decision, Site
from analogfx.passes.hold import hold
from analogfx.passes.sites import fused_sites
from analogfx.passes.stationary import without_cast
from analogfx.passes.take_part import Share, take_part
from analogfx.state import StateNames

_explicit = False
"""Whether analog modules run their explicit graphs, see :class:`explicit_level`."""


class explicit_level:
    """Context in which analog modules run one node for every role, for whoever reads graphs."""

    def __enter__(self) -> None:
        global _explicit
        self.before, _explicit = _explicit, True

    def __exit__(self, *_: object) -> None:
        global _explicit
        _explicit = self.before


@dataclass(frozen=True)
class AnalogSite:
    """One analog product of a module."""

    name: str
    """The parameter it multiplies by."""
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    groups: int
    state: StateNames
    rearranged: bool
    """Whether the weight only rearranges a parameter's elements, so that it can be written back."""
    weight: Callable[[nn.Module], Tensor]
    """Gives the product's weight for a module: (O, I), (E * O, I) of experts, or torch's layout of
    a convolution."""
    experts: int = 0
    """Matrices of which every row takes one; 0 for a product of one matrix, or of groups."""
    range_shape: tuple[int, ...] = ()
    """Of the site's input ranges: (tiles,), or (experts, tiles) where each has its own."""

    def matrices(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The matrices (O, I) that a weight consists of: one, or one for every expert."""
        return weight.flatten(1).chunk(max(self.experts, 1))


@dataclass(frozen=True)
class Program:
    """What the passes made of one forward, shared by all modules that look alike."""

    explicit: Callable[..., Any]
    fused: Callable[..., Any]
    decisions: tuple[Decision, ...]
    sites: tuple[AnalogSite, ...]
    lowered: tuple[Lowered | None, ...]
    """What every site was lowered to; None for a chain that stayed explicit."""
    readers: tuple[str, ...]
    """Paths of the modules whose parameters the forward reads, from the module; it comes first."""
    delegates: bool
    """Whether children compute products in the place of the module's own code."""
    held: Callable[..., Any] | None = None
    """The fused forward on what a chip holds, as its second argument; None in training."""


@dataclass
class ModuleContext(Context):
    """Answers for a graph that runs with the module itself as ``self``."""

    module: nn.Module = field(default_factory=nn.Module)

    def child_of(self, product: Node) -> str | None:
        """By the parameters that the product's operands are, as they are."""
        weight, bias = (self._parameter(a) for a in product.args[1:3])
        return child_of(self.module, product, weight, bias)

    def _parameter(self, operand: Any) -> Any:
        """The parameter that an operand is; anything else as it is."""
        direct = isinstance(operand, Node) and operand.op == "get_attr"
        return operator.attrgetter(str(operand.target))(self.module) if direct else operand

    def path(self, graph: Graph, site: Site) -> Node:
        """Read from the placement: modules of other paths share the graph."""
        return graph.create_node("get_attr", "_analog.name")


class Lowered(NamedTuple):
    """The fused op of one site."""

    spec: MVMSpec
    op: str
    """"linear", "conv" or "experts"."""


def build(
    module: nn.Module,
    config: Resolved | None,
    training: bool,
    pattern: Pattern,
    debug_dir: Path | None = None,
    passes: Sequence[pipeline.Pass] = (),
    share: Share | None = None,
) -> Program:
    """Capture a module's forward and run the passes over it.

    Args:
        config: scalars of the module's sites; None leaves its products digital.
        debug_dir: where to write the graph after every pass.
        passes: the caller's own, which see one node for every role.
        share: the part of its one product that this process computes; None for all of it.

    Raises:
        CaptureError: the forward cannot be traced, or its product cannot be cut.
        PassError: one of ``passes`` failed.
    """
    with TRACING:
        return _build(module, config, training, pattern, debug_dir, passes, share)


def _build(
    module: nn.Module,
    config: Resolved | None,
    training: bool,
    pattern: Pattern,
    debug_dir: Path | None,
    passes: Sequence[pipeline.Pass],
    share: Share | None = None,
) -> Program:
    graph = capture(module, training, pattern)
    context = ModuleContext(config, training, module=module)
    after = None
    if debug_dir is not None:
        after = functools.partial(_write, debug_dir, itertools.count(1))
        _write(debug_dir, itertools.count(), "capture", graph, 0)
    pipeline.run(pipeline.EXPLICIT, graph, context, after)
    for step in passes if context.sites else ():
        _run_own(step, graph, context, type(module).__name__, after)
    sites = tuple(_analog_site(site) for site in context.sites)
    paths = (str(n.target) for n in graph.find_nodes(op="get_attr"))
    read = {path.rpartition(".")[0]: True for path in paths if not path.startswith("_analog.")}
    apart = spread([s.state for s in sites], config, training)
    explicit = bound(module, graph, apart)
    pipeline.run(pipeline.FUSED, graph, context, after)
    fused = {f.node.meta["made"][0]: Lowered(f.spec, f.op) for f in fused_sites(graph)}
    lowered = tuple(fused.get(site.index) for site in context.sites)
    decisions = tuple(pipeline.decisions(graph))
    if share is not None:
        if None in lowered:
            raise CaptureError("its chain of ops is not one that lower knows, so no part can run")
        pipeline.run((functools.partial(take_part, share=share),), graph, context, after)
    known = [(s.weight, s.state, f.spec) for s, f in zip(sites, lowered, strict=True) if f]
    # What passes of the caller's own, or a part for tensor parallelism, have put around a site is
    # in its graph alone.
    alone = passes or share is not None
    whole = None if alone or config is None else whole_of(module, known, config, training)
    whole_graph = is_driven(module) or share is not None
    eager = graph if whole_graph else called_directly(graph)
    run, held = bound(module, eager, apart, whole), None
    if not training and sites and None not in lowered and share is None:
        pipeline.run((hold,), graph, context)
        held = bound(module, graph, apart)
    readers, delegates = tuple({"": True} | read), bool(context.delegated)
    return Program(explicit, run, decisions, sites, lowered, readers, delegates, held)


def _run_own(step: pipeline.Pass, graph: Graph, context: Context, where: str, after: Any) -> None:
    """Run a pass of the caller's own.

    Raises:
        PassError: it failed, naming the pass and the module's class.
    """
    try:
        pipeline.run((step,), graph, context, after)
    except Exception as error:  # any code may fail in any way
        name, why = pipeline.pass_name(step), f"{type(error).__name__}: {error}"
        raise PassError(f"pass {name} failed on the graph of {where} ({why})") from error


def check_same_sites(first: Program, second: Program) -> None:
    """Refuse programs of one module whose sites are not the same.

    Raises:
        CaptureError: naming the parameters of both.
    """
    if _identity(first) != _identity(second):
        raise other_sites(first.sites, second.sites)


def other_sites(first: Sequence[AnalogSite], second: Sequence[AnalogSite]) -> CaptureError:
    """The error for a module whose products are now these, now those."""
    names = [sorted(s.name for s in sites) for sites in (first, second)]
    return CaptureError(
        f"the forward multiplies by {names[0]} or by {names[1]}, as its mode, arguments or "
        "attributes say"
    )


def _identity(program: Program) -> list[tuple[Any, ...]]:
    return [(s.name, s.state, s.in_sizes, s.out_sizes, s.groups, s.experts) for s in program.sites]


def _write(folder: Path, numbers: Iterator[int], name: str, graph: Graph, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# after {name}: {count} changed\n{source(graph)}"
    (folder / f"{next(numbers):02d}_{name}.py").write_text(text)


def _analog_site(site: Site) -> AnalogSite:
    return AnalogSite(
        site.decision.name,
        site.in_sizes,
        site.out_sizes,
        site.groups,
        site.state,
        site.rearranged,
        _weight_function(site.weight, bool(site.experts)),
        site.experts,
        site.range_shape,
    )


def _weight_function(weight: Node, of_experts: bool) -> Callable[[nn.Module], Tensor]:
    """The part of a graph that computes a weight from the module's parameters.

    The matrices of experts become one, whose rows are those of one expert after another.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}

    def copy(node: Node) -> Node:
        node = without_cast(node)
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    value = copy(weight)
    graph.output(graph.call_method("flatten", (value, 0, 1)) if of_experts else value)
    return bind(graph)
