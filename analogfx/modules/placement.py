"""What makes a module analog: its config, its sites, and the program that a call runs."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._guards import TracingContext

from analogfx import held, shards
from analogfx.config import Resolved, TorchInferenceRPUConfig, resolve
from analogfx.errors import CaptureError, PlacementError
from analogfx.kernels import changes, dispatch
from analogfx.modules import parallel
from analogfx.modules import program as programs
from analogfx.modules.capture import (
    TRACING,
    Pattern,
    default_pattern,
    pattern_of,
    takes_constants,
)
from analogfx.modules.program import AnalogSite, Program, build, check_same_sites, other_sites
from analogfx.modules.remember import fit_state, renew_notes, reset_state
from analogfx.modules.untraced import OwnForward, build_or_run, of_both_modes, own_forward
from analogfx.ops.transforms import in_transform
from analogfx.passes.contract import Decision
from analogfx.passes.pipeline import Pass

_placements = itertools.count()

_warned_alone = False
"""Whether this process was told that it trains its ranges alone among others."""

_MANY = 32
"""Programs of one module that are probably one for every value of something."""
_KEPT = 256
"""Programs of one module that are kept; those built first go first."""


def _constant_in_dynamo(function: Any) -> Any:
    """``torch.compiler.assume_constant_result``, which would import the compiler for its mark."""
    function._dynamo_marked_constant = True
    return function


def _key(pattern: Pattern) -> tuple[Any, ...]:
    """A pattern as a key that tells 1 from True and 1.0."""
    return tuple((name, type(value), value) for name, value in pattern)


def _inside(module: nn.Module, path: str) -> nn.Module:
    """The module at a path, or an empty one where it was taken away."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return nn.Module()


class Placement:
    """A module's config, sites and programs, which follow what is done to the module."""

    def __init__(
        self, name: str, config: TorchInferenceRPUConfig, passes: tuple[Pass, ...] = ()
    ) -> None:
        """A placement without programs; see :meth:`prepare`."""
        self.name = name
        """The module's path, for messages."""
        self.config = config
        self.resolved = resolve(config)
        self.passes = passes
        """The caller's own, which every program of the module goes through."""
        self.number = next(_placements)
        """What a chip knows the module by: another for a copy."""
        self.programs: dict[tuple[bool, Any], Program] = {}
        self.left: dict[tuple[bool, Any], str] = {}
        """Calls that no program can stand for, and why: they run the module's own forward."""
        self._own: OwnForward | None = None
        """What runs them, where children compute products of theirs."""
        self.unforeseen: dict[str, str] = {}
        """Weights that the module's own forward multiplied by digitally, by their path, and why."""
        self.takes_constants = False
        self.inherited: type[nn.Module] | None = None
        """The torch layer whose forward the programs are for, where it is not the module's own."""
        self.unset: set[str] = set()
        """State that takes its initial value from weights that were not there yet."""
        self._late: dict[tuple[bool, Any], Program] = {}
        """Programs built on their first use, where Dynamo looks when that is in its trace."""
        self._readers: tuple[str, ...] = ()
        self.layout: parallel.Layout | None = None
        """How tensor parallelism cut the module; None if it did not."""
        self._parts: dict[bool, Callable[..., Any]] = {}
        """By mode, the forward of the part that this process holds."""
        self._variants: dict[Any, Placement] = {}
        """Those of the same site in a layer of other attributes, see :meth:`variant`."""
        self._steps: int | None = None
        """Steps that optimizers had made when it first wrote its ranges in training."""
        self._asked = False
        """Whether it was asked, at the next step, if others train beside this process."""
        self._read: list[Any] = []

    @property
    def sites(self) -> tuple[AnalogSite, ...]:
        """The module's analog products."""
        return next(iter(self.programs.values())).sites

    @property
    def runs_own_forward(self) -> bool:
        """Whether the module's own forward runs in every call, see :mod:`.untraced`."""
        return any(isinstance(program.fused, OwnForward) for program in self.programs.values())

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was decided about every product of the module."""
        return next(iter(self.programs.values())).decisions

    def computed_by(self, module: nn.Module) -> list[str]:
        """What computes each site's products in the module's mode: a kernel, or torch and why."""
        found = (p for (training, _), p in self.programs.items() if training == module.training)
        return [
            "torch: its chain of ops is not one that lower knows"
            if lowered is None
            else dispatch.chosen(site.weight(module), lowered.spec, lowered.op)
            for program in itertools.islice(found, 1)
            for site, lowered in zip(program.sites, program.lowered, strict=True)
        ]

    def state_names(self) -> list[str]:
        """Names of everything that the sites may have registered on the module."""
        return [name for site in self.sites for name in site.state.all()]

    # ------------------------------------------------------------------- how programs come to be

    def prepare(self, module: nn.Module) -> None:
        """Build the programs of both modes for a call with the required arguments."""
        train, evaluate = self._built(module, self.resolved)
        self.adopt(module, train, evaluate)

    def adopt(self, module: nn.Module, train: Program, evaluate: Program) -> None:
        """Take the programs that were built for the module, or for one that looks alike."""
        own = isinstance(train.fused, OwnForward)
        self.takes_constants = takes_constants(module) and not own
        pattern = () if own else _key(default_pattern(module))
        self.programs = {(True, pattern): train, (False, pattern): evaluate}
        self._late = {}
        self._parts = {}
        self._variants = {}
        self.left = {}
        self.unforeseen = {}
        self._readers = tuple(dict.fromkeys(train.readers + evaluate.readers))
        self.watch(module)

    def _built(self, module: nn.Module, config: Resolved) -> tuple[Program, Program]:
        pattern = default_pattern(module)
        train, evaluate = (
            build_or_run(module, config, mode, pattern, passes=self.passes)
            for mode in (True, False)
        )
        return of_both_modes(train, evaluate)

    def change(self, module: nn.Module, config: TorchInferenceRPUConfig) -> None:
        """Another config, or other attributes, for a module that is analog already.

        Raises:
            CaptureError: its forward would multiply by other parameters; nothing is changed.
        """
        with TRACING:
            now = self.resolved
            resolved = replace(resolve(config), collects=now.collects, processes=now.processes)
            train, evaluate = self._built(module, resolved)
            before = self.sites
            if [(s.name, s.state) for s in before] != [(s.name, s.state) for s in train.sites]:
                raise other_sites(before, train.sites)
            self.config, self.resolved = config, resolved
            self._take(module, train, evaluate)

    def collect(
        self, module: nn.Module, resolved: Resolved, train: Program, evaluate: Program
    ) -> None:
        """Take programs that note what training sees, or such that write its ranges.

        Args:
            resolved: what the programs were built for: the same scalars but for ``collects``.
        """
        self.resolved = resolved
        self.adopt(module, train, evaluate)
        renew_notes(module, self.sites, resolved)

    def watch(self, module: nn.Module) -> None:
        """Take the module's parameters, state included, for those that its programs are for."""
        self._read = self._reading(module)

    def follow(self, module: nn.Module) -> None:
        """Take up what was done to the module's parameters since its programs were built.

        A bias that came or went, a weight of another shape, a parametrization: the programs are
        built for the module as it is. State that no longer fits starts anew.

        Raises:
            CaptureError: the forward has other products now, for which there are no ranges.
        """
        if self.unset or self._is_other(module):
            self._follow(module)

    @_disable_dynamo
    def _follow(self, module: nn.Module) -> None:
        with TRACING:
            read = self._reading(module)
            if read != self._read:
                if self._moved_only(module, read):
                    self._read = read
                else:
                    self._take(module, *self._built(module, self.resolved))
            if self.unset:
                unset, self.unset = self.unset, set()
                reset_state(module, self.sites, self.resolved, unset)

    def _take(self, module: nn.Module, train: Program, evaluate: Program) -> None:
        before = self.sites
        if len(before) != len(train.sites):
            raise other_sites(before, train.sites)
        sizes = [
            [(s.state, s.in_sizes, s.out_sizes, s.range_shape) for s in ss]
            for ss in (before, train.sites)
        ]
        if sizes[0] != sizes[1]:
            fit_state(module, before, train.sites, self.resolved)
            renew_notes(module, train.sites, self.resolved)
        self.adopt(module, train, evaluate)

    def _reading(self, module: nn.Module) -> list[Any]:
        """Names and shapes of the parameters that the forward may read, the absent ones too."""
        return [
            (name, p if p is None else p.shape)
            for path in self._readers
            for name, p in (_inside(module, path) if path else module)._parameters.items()
        ]

    def _is_other(self, module: nn.Module) -> bool:
        """Whether parameters came, went or took another shape since the programs were built."""
        at = 0
        for path in self._readers:
            owner = _inside(module, path) if path else module
            for name, p in owner._parameters.items():
                if at == len(self._read) or self._read[at] != (
                    name,
                    None if p is None else p.shape,
                ):
                    return True
                at += 1
        return at != len(self._read)

    def _moved_only(self, module: nn.Module, read: list[Any]) -> bool:
        """Whether what is missing are parameters that became plain tensors of the same shape.

        So do data-parallel wrappers for the time of a forward.
        """
        missing = [item for item in self._read if item not in read]
        plain = module.__dict__
        return bool(missing) and all(
            isinstance(tensor := plain.get(name), Tensor) and tensor.shape == shape
            for name, shape in missing
        )

    def program(self, module: nn.Module, training: bool, pattern: Pattern) -> Program | None:
        """The program for a mode and for the constants of a call, built on its first use.

        None for a call that cannot be traced.

        Raises:
            CaptureError: the call multiplies by other parameters than the calls before it, for
                which there are no ranges.
        """
        key = training, _key(pattern) if pattern else ()
        found = self.programs.get(key)
        if found is None and key not in self.left:
            found = self._late[key] if self._first_use(module, key, pattern) else None
        return found

    @_constant_in_dynamo
    def _first_use(
        self, module: nn.Module, key: tuple[bool, tuple[Any, ...]], pattern: Pattern
    ) -> bool:
        """Build a program; where Dynamo traces the call, it runs this as it is.

        Returns:
            Whether there is one.
        """
        with TRACING:  # another thread may be at it
            made = self.programs.get(key) or self._late.get(key)
            if made is None:
                try:
                    made = build(module, self.resolved, key[0], pattern, passes=self.passes)
                except CaptureError as error:
                    self._leave(module, key, str(error))
                    return False
                try:
                    check_same_sites(next(iter(self.programs.values())), made)
                except CaptureError as error:
                    raise CaptureError(f"{self._called(module)}: {error}") from None
            self._late[key] = made
            if TracingContext.try_get() is not None:
                return True  # Dynamo has seen that ``programs`` lacks it, and guards that
            self.programs = dict(itertools.islice(self.programs.items(), 2)) | dict(
                itertools.islice(self.programs.items(), max(2, len(self.programs) - _KEPT), None)
            )
            self.programs[key] = made
            self._late = {key: p for key, p in self._late.items() if key in self.programs}
        if len(self.programs) == _MANY:
            warnings.warn(
                f"{self._called(module)}: traced for {_MANY} combinations of "
                "mode and constant arguments; pass what varies as a tensor",
                stacklevel=6,
            )
        return True

    def _called(self, module: nn.Module) -> str:
        """What a message calls the module."""
        return self.name or type(module).__name__

    def _leave(self, module: nn.Module, key: tuple[bool, Any], why: str) -> None:
        """Run calls of one kind as the module's own forward from now on."""
        if TracingContext.try_get() is None:  # or a guard of Dynamo's would fail at once
            self.left[key] = why
        self._own = own_forward(module)
        names = [site.name for site in self.sites] or (self._own.others if self._own else ())
        if not names:
            return
        warnings.warn(
            f"{self._called(module)}: {why}. Calls with such arguments run the module's own "
            f"forward: digital by {', '.join(names)}, with its analog layers inside. "
            'torch.compile(model, backend="analogfx") follows what a trace cannot',
            stacklevel=7,
        )

    # ------------------------------------------------------------------------------------- a call

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's graph for its mode.

        Raises:
            PlacementError: tensor parallelism cut its parameters as no analog layer can be cut.
            RuntimeError: under ``torch.func``, which cannot store what ranges learn from the data.
        """
        training = module.training
        if training and self.resolved.has_state:
            if not (self._asked or self.resolved.collects):
                self._warn_if_alone()
            if in_transform():
                raise RuntimeError(
                    f"{self._called(module)}: in training its input range follows the data, which "
                    "torch.func and torch.vmap cannot store: call eval(), or use backward() or "
                    "torch.autograd.grad() instead"
                )
        self.follow(module)
        if shards.any_dtensor() and (paths := self._in_parts(module)):
            return self._tensor_parallel(module, paths, args, kwargs)
        pattern = pattern_of(module, args, kwargs) if self.takes_constants else ()
        program = self.program(module, training, pattern)
        holdings = held.of(self)
        if program is None:
            if holdings is not None:
                raise RuntimeError(
                    f"{self._called(module)}: a programmed chip cannot run a call with these "
                    f"arguments: {self.left[training, _key(pattern)]}"
                )
            own = self._own or type(module).digital_forward  # type: ignore[attr-defined]
            return own(module, *args, **kwargs)
        if holdings is not None:
            return self._on_chip(module, program, holdings, args, kwargs)
        run = program.explicit if programs._explicit else program.fused
        return run(module, *args, **kwargs)

    def distribute(self, module: nn.Module) -> None:
        """Follow ``distribute_module``: the state is cut as the weights are.

        Raises:
            PlacementError: they cannot be cut so.
        """
        if self._in_parts(module):
            self.layout = parallel.layout_of(self._called(module), module, self.sites)
            parallel.place_state(module, self.layout)
            renew_notes(module, self.sites, self.resolved)

    def _in_parts(self, module: nn.Module) -> list[str]:
        """Paths of modules whose parameters are DTensors, as tensor parallelism has them."""
        return [
            path
            for path in self._readers
            for p in (_inside(module, path) if path else module)._parameters.values()
            if type(p) is not nn.Parameter and p is not None and shards.is_sharded(p)
        ]

    def _tensor_parallel(self, module: nn.Module, paths: list[str], args: Any, kwargs: Any) -> Any:
        """Run the part of the module that this process holds."""
        if any(paths):
            raise PlacementError(
                f"{self._called(module)}: it multiplies by DTensors of {max(paths)}: leave that "
                "out of the tensor-parallel plan"
            )
        if held.of(self) is not None:
            raise PlacementError(
                f"{self._called(module)}: a chip's weights are whole, and this layer is cut for "
                "tensor parallelism: evaluate chips on a model that is not"
            )
        if self.layout is None:
            self.layout = parallel.layout_of(self._called(module), module, self.sites)
        if module.training not in self._parts:
            pattern = default_pattern(module)
            self._parts[module.training] = build(
                module,
                self.resolved,
                module.training,
                pattern,
                passes=self.passes,
                share=self.layout.share,
            ).fused
        run = self._parts[module.training]
        return parallel.run(self.layout, module, run, args, kwargs)

    def variant(self, module: nn.Module, twin: nn.Module, changed: Any) -> Placement:
        """The placement of a layer like the module, with the same site.

        Args:
            twin: the layer: it shares the module's tensors.
            changed: what differs between the two.
        """
        if self.unset or self._reading(module) != self._read:
            self.follow(module)
        found = self._variants.get(changed)
        if found is None or found.resolved is not self.resolved:
            with TRACING:
                found = copy.copy(self)
                found.resolved, found.passes = self.resolved, self.passes
                found.adopt(twin, *found._built(twin, self.resolved))
                self._variants[changed] = found
        return found

    def _warn_if_alone(self) -> None:
        """Warn once a process if ranges follow its own data while others train beside it.

        Asked at the module's second step: those who train together have met by then.
        """
        global _warned_alone
        if torch.compiler.is_compiling():
            return
        if self._steps is None:
            self._steps = changes.steps
        elif changes.steps > self._steps:
            self._asked = True
            if _warned_alone or shards.world_size() == 1:
                return
            _warned_alone = True
            warnings.warn(
                f"{self.name or 'the model'} trains on {shards.world_size()} processes, and its "
                "input range follows the data of this one: call "
                "analogfx.prepare_training(optimizer, model) before training, so that all have "
                "the same ranges",
                stacklevel=6,
            )

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
        own: dict[str, Any] = {
            "programs": dict(self.programs),
            "left": dict(self.left),
            "unset": set(self.unset),
            "unforeseen": dict(self.unforeseen),
        }
        new: dict[str, Any] = {"config": twin.config, "number": twin.number}
        new |= {"_late": {}, "_parts": {}, "_variants": {}}
        twin.__dict__.update(self.__dict__ | new | own)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the programs, which are built again after unpickling."""
        empty: dict[str, Any] = {"programs": {}, "left": {}, "_late": {}, "_parts": {}}
        empty["_variants"] = {}
        return self.__dict__ | {"config": self.config.to_dict()} | empty

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, config=TorchInferenceRPUConfig.from_dict(state["config"]))
