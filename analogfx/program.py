"""What the passes make of a module's forward, and which of it a call runs."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Graph, Node

from analogfx import held
from analogfx.capture import (
    Pattern,
    bind,
    capture,
    default_pattern,
    pattern_of,
    source,
    takes_constants,
)
from analogfx.config import Resolved, TorchInferenceRPUConfig, resolve
from analogfx.errors import CaptureError
from analogfx.kernels import dispatch
from analogfx.kernels.spec import MVMSpec
from analogfx.ops.transforms import in_transform
from analogfx.passes import pipeline
from analogfx.passes.contract import Context, Decision, Site, StateNames
from analogfx.passes.hold import hold
from analogfx.passes.sites import fused_sites
from analogfx.passes.stationary import without_cast

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
    """Gives the product's weight for a module: (O, I), or torch's layout of a convolution."""


@dataclass(frozen=True)
class Program:
    """What the passes made of one forward, shared by all modules that look alike."""

    explicit: Callable[..., Any]
    fused: Callable[..., Any]
    decisions: tuple[Decision, ...]
    sites: tuple[AnalogSite, ...]
    lowered: tuple[Lowered | None, ...]
    """What every site was lowered to; None for a chain that stayed explicit."""
    held: Callable[..., Any] | None = None
    """The fused forward on what a chip holds, as its second argument; None in training."""


class _ModuleContext(Context):
    """Answers for a graph that runs with the module itself as ``self``."""

    def path(self, graph: Graph, site: Site) -> Node:
        """Read from the placement: modules of other paths share the graph."""
        return graph.create_node("get_attr", "_analog.name")


class Lowered(NamedTuple):
    """The fused op of one site."""

    spec: MVMSpec
    is_conv: bool


def build(
    module: nn.Module,
    config: Resolved | None,
    training: bool,
    pattern: Pattern,
    debug_dir: Path | None = None,
) -> Program:
    """Capture a module's forward and run the passes over it.

    Args:
        config: scalars of the module's sites; None leaves its products digital.
        debug_dir: where to write the graph after every pass.

    Raises:
        CaptureError: the forward cannot be traced.
    """
    graph = capture(module, training, pattern)
    context = _ModuleContext(config, training)
    after = None
    if debug_dir is not None:
        after = functools.partial(_write, debug_dir, itertools.count(1))
        _write(debug_dir, itertools.count(), "capture", graph, 0)
    pipeline.run(pipeline.EXPLICIT, graph, context, after)
    sites = tuple(_analog_site(site) for site in context.sites)
    explicit = bind(graph)
    pipeline.run(pipeline.FUSED, graph, context, after)
    fused = {f.node.meta["made"][0]: Lowered(f.spec, f.is_conv) for f in fused_sites(graph)}
    lowered = tuple(fused.get(site.index) for site in context.sites)
    decided, run = tuple(pipeline.decisions(graph)), bind(graph)
    held = None
    if not training and sites and None not in lowered:
        pipeline.run((hold,), graph, context, after)
        held = bind(graph)
    return Program(explicit, run, decided, sites, lowered, held)


def check_same_sites(first: Program, second: Program) -> None:
    """Refuse programs of one module whose sites are not the same.

    Raises:
        CaptureError: naming the parameters of both.
    """
    if _identity(first) != _identity(second):
        names = [sorted(s.name for s in program.sites) for program in (first, second)]
        raise CaptureError(
            f"the forward multiplies by {names[0]} or by {names[1]}, as its mode or arguments say"
        )


def _identity(program: Program) -> list[tuple[Any, ...]]:
    return [(s.name, s.state, s.in_sizes, s.out_sizes, s.groups) for s in program.sites]


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
        _weight_function(site.weight),
    )


def _weight_function(weight: Node) -> Callable[[nn.Module], Tensor]:
    """The part of a graph that computes a weight from the module's parameters."""
    graph = Graph()
    copies: dict[Node, Node] = {}

    def copy(node: Node) -> Node:
        node = without_cast(node)
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    graph.output(copy(weight))
    return bind(graph)


_MANY = 32
"""Programs of one module that are probably one for every value of something."""


def _key(pattern: Pattern) -> tuple[Any, ...]:
    """A pattern as a key that tells 1 from True and 1.0."""
    return tuple((name, type(value), value) for name, value in pattern)


_placements = itertools.count()


class Placement:
    """What makes a module analog: its config, its sites and its programs."""

    def __init__(self, name: str, config: TorchInferenceRPUConfig) -> None:
        """A placement without programs; see :meth:`prepare`."""
        self.name = name
        """The module's path, for messages."""
        self.config = config
        self.resolved = resolve(config)
        self.number = next(_placements)
        """What a chip knows the module by: another for a copy."""
        self.programs: dict[tuple[bool, Any], Program] = {}
        self.takes_constants = False

    @property
    def sites(self) -> tuple[AnalogSite, ...]:
        """The module's analog products."""
        return next(iter(self.programs.values())).sites

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was decided about every product of the module."""
        return next(iter(self.programs.values())).decisions

    def computed_by(self, module: nn.Module) -> list[str]:
        """What computes each site's products in the module's mode: a kernel, or torch and why."""
        programs = (p for (training, _), p in self.programs.items() if training == module.training)
        return [
            "torch: its chain of ops is not one that lower knows"
            if lowered is None
            else dispatch.chosen(site.weight(module), lowered.spec, lowered.is_conv)
            for program in itertools.islice(programs, 1)
            for site, lowered in zip(program.sites, program.lowered, strict=True)
        ]

    def state_names(self) -> list[str]:
        """Names of everything that the sites may have registered on the module."""
        return [name for site in self.sites for name in site.state.all()]

    def prepare(self, module: nn.Module) -> None:
        """Build the programs of both modes for a call with the required arguments."""
        self.takes_constants = takes_constants(module)
        for training in (True, False):
            self.program(module, training, default_pattern(module))

    def change(self, module: nn.Module, config: TorchInferenceRPUConfig) -> None:
        """Another config, or other attributes, for a module that is analog already.

        Raises:
            CaptureError: its forward would multiply by other parameters; nothing is changed.
        """
        before = self.config, self.resolved, self.programs
        self.config, self.resolved, self.programs = config, resolve(config), {}
        try:
            self.prepare(module)
            check_same_sites(*(next(iter(p.values())) for p in (before[2], self.programs)))
        except CaptureError:
            self.config, self.resolved, self.programs = before
            raise

    def adopt(self, module: nn.Module, train: Program, evaluate: Program) -> None:
        """Take the programs that were built for a module that looks alike."""
        self.takes_constants = takes_constants(module)
        pattern = _key(default_pattern(module))
        self.programs = {(True, pattern): train, (False, pattern): evaluate}

    def program(self, module: nn.Module, training: bool, pattern: Pattern) -> Program:
        """The program for a mode and for the constants of a call, built on its first use.

        Raises:
            CaptureError: a call with these constants cannot be traced, or multiplies by other
                parameters than the calls before it, for which there are no ranges.
        """
        key = training, _key(pattern)
        program = self.programs.get(key)
        if program is None:
            program = build(module, self.resolved, training, pattern)
            if self.programs:
                check_same_sites(next(iter(self.programs.values())), program)
            self.programs[key] = program
            if len(self.programs) == _MANY:
                warnings.warn(
                    f"{self.name or type(module).__name__}: traced for {_MANY} combinations of "
                    "mode and constant arguments; pass what varies as a tensor",
                    stacklevel=5,
                )
        return program

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's graph for its mode.

        Raises:
            RuntimeError: under ``torch.func``, which cannot store what ranges learn from the data.
        """
        if module.training and self.resolved.has_state and in_transform():
            raise RuntimeError(
                f"{self.name or type(module).__name__}: in training its input range follows the "
                "data, which torch.func and torch.vmap cannot store: call eval(), or use "
                "backward() or torch.autograd.grad() instead"
            )
        pattern = pattern_of(module, args, kwargs) if self.takes_constants else ()
        program = self.program(module, module.training, pattern)
        holdings = held.of(self.number)
        if holdings is not None:
            return self._on_chip(module, program, holdings, args, kwargs)
        run = program.explicit if _explicit else program.fused
        return run(module, *args, **kwargs)

    def _on_chip(
        self, module: nn.Module, program: Program, holdings: Any, args: Any, kwargs: Any
    ) -> Any:
        """Run the module on what a chip holds."""
        if module.training:
            raise RuntimeError(
                f"{self.name or type(module).__name__}: a programmed chip does not train: call "
                "eval(), or leave device.at()"
            )
        assert program.held is not None  # or the device would not have been made
        return program.held(module, holdings, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Placement:
        """A copy with its own config; programs never change and stay shared."""
        twin = Placement(self.name, TorchInferenceRPUConfig.from_dict(self.config.to_dict()))
        twin.programs = dict(self.programs)
        twin.takes_constants = self.takes_constants
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the programs, which are built again after unpickling."""
        return self.__dict__ | {"config": self.config.to_dict(), "programs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, config=TorchInferenceRPUConfig.from_dict(state["config"]))
        self.number = next(_placements)
