"""What a user may say to ``torch.compile(model, backend="analogfx", options=...)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from analogfx.errors import ConfigError, Conflict
from analogfx.passes import pipeline

COMPILERS = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """Options of the backend, with their defaults."""

    rpu_config: Any = None
    """What ``analogize`` takes: a config, a mapping of name patterns, or a callable. None for a
    model that is analog already."""
    freeze: bool = True
    """Whether to compute what depends on weights alone once, where no gradients are wanted."""
    passes: Sequence[str | Callable[..., int]] | None = None
    """The whole-graph passes in the order to run: names of those in
    ``analogfx.passes.pipeline.WHOLE_GRAPH`` or passes of your own. None for all."""
    report: bool = False
    """Whether to print the placement whenever a graph is compiled."""
    compiler: str = "inductor"
    """What compiles the rewritten graph: "inductor", "aot_eager" or "eager"."""
    mode: str | None = None
    """One of torch's, which takes none beside options: "reduce-overhead", "max-autotune", ..."""
    inductor: Mapping[str, Any] | None = None
    """Settings of ``torch._inductor.config`` by name, for this model alone."""

    def pipeline(self) -> tuple[pipeline.Pass, ...]:
        """The whole-graph passes to run."""
        known = {p.__name__: p for p in pipeline.WHOLE_GRAPH}
        wanted = known if self.passes is None else self.passes
        chosen = [known[p] if isinstance(p, str) else p for p in wanted]
        return tuple(p for p in chosen if self.freeze or p is not known["freeze"])


def parse(given: Any) -> Options:
    """Options from the mapping that ``torch.compile`` hands on.

    Raises:
        ConfigError: naming every option that is unknown or has no meaning.
    """
    given = dict(given or {})
    known = [f.name for f in fields(Options)]
    conflicts = [
        Conflict(f"options[{name!r}]", value, f"one of {', '.join(known)}")
        for name, value in given.items()
        if name not in known
    ]
    options = Options(**{name: value for name, value in given.items() if name in known})
    for name in ("freeze", "report"):
        value = getattr(options, name)
        if not isinstance(value, bool):
            conflicts.append(Conflict(f"options[{name!r}]", value, "True or False"))
    if options.compiler not in COMPILERS:
        valid = f"one of {', '.join(COMPILERS)}"
        conflicts.append(Conflict("options['compiler']", options.compiler, valid))
    if options.mode not in (None, *MODES):
        conflicts.append(Conflict("options['mode']", options.mode, f"one of {', '.join(MODES)}"))
    conflicts += _pass_conflicts(options.passes) + _inductor_conflicts(options.inductor)
    if conflicts:
        raise ConfigError(conflicts)
    return options


def _pass_conflicts(passes: Any) -> list[Conflict]:
    if passes is None:
        return []
    names = [p.__name__ for p in pipeline.WHOLE_GRAPH]
    valid = f"a list of functions and of names: {', '.join(names)}"
    if isinstance(passes, str) or not isinstance(passes, Sequence):
        return [Conflict("options['passes']", passes, valid)]
    wrong = [p for p in passes if not (callable(p) or p in names)]
    return [Conflict("options['passes']", p, valid) for p in wrong]


def _inductor_conflicts(settings: Any) -> list[Conflict]:
    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        valid = "a mapping of names in torch._inductor.config to values"
        return [Conflict("options['inductor']", settings, valid)]
    import torch._inductor.config

    known = torch._inductor.config.get_config_copy()
    unknown = [name for name in settings if name not in known]
    valid = "a setting that torch._inductor.config has"
    return [Conflict(f"options['inductor'][{n!r}]", settings[n], valid) for n in unknown]
