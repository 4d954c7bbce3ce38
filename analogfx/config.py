"""The RPU config: what the analog hardware does to a weight-stationary product.

The dataclasses, fields, defaults and enumerations are those of aihwkit-lightning 2.1.0's
``TorchInferenceRPUConfig``, under the same names; `MappingParameter.max_output_size` and
`MappingParameter.packed_projections`, `MappingParameter.experts` are new. A
field refuses an unknown name and a wrong type on assignment. Whether the fields fit together is
decided by `resolve`, which turns a config into the plain scalars that all later layers read.

A resolution (``inp_res``, ``out_res``, ``res``) above 1 is a number of steps over the full range,
one in (0, 1] is the step as a fraction of it, and anything else means no quantization. `bits` gives
the number of steps of a converter whose width is known in bits.
"""

import copy
import difflib
import json
import math
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar, get_args

from analogfx.chip.compensation import BaseDriftCompensation
from analogfx.chip.model import NoiseModel
from analogfx.chip.record import Record
from analogfx.chip.record import read as read_record
from analogfx.errors import ConfigError, Conflict, shown

SCHEMA = 1
"""Version of the layout that `TorchInferenceRPUConfig.to_dict` writes."""


class WeightNoiseInjectionType(Enum):
    """Noise added to the weights in training."""

    NONE = "None"
    ADD_NORMAL = "AddNormal"
    """Gaussian, relative to the largest weight of the tile."""
    ADD_NORMAL_PER_CHANNEL = "AddNormalPerChannel"
    """Gaussian, relative to the largest weight of the output channel within the tile."""


class WeightQuantizationType(Enum):
    """Quantization of the weights, in training and in evaluation."""

    NONE = "None"
    DISCRETIZE = "Discretize"
    """Steps relative to the largest weight of the tile."""
    DISCRETIZE_PER_CHANNEL = "DiscretizePerChannel"
    """Steps relative to the largest weight of the output channel within the tile."""


class WeightClipType(Enum):
    """Clipping of the weights."""

    NONE = "None"
    LAYER_GAUSSIAN = "LayerGaussian"
    """After the optimizer step, at ``sigma`` standard deviations of the weight matrix."""
    LAYER_GAUSSIAN_PER_CHANNEL = "LayerGaussianPerChannel"
    """After the optimizer step, at ``sigma`` standard deviations of the output channel."""
    LEARNABLE_PER_CHANNEL = "LearnablePerChannel"
    """In the forward, at a learned bound for each output channel and tile (LSQ, ParetoQ)."""


class WeightModifierType(Enum):
    """Deprecated: noise and quantization in one; see `WeightModifierParameter.type`."""

    NONE = "None"
    DISCRETIZE = "Discretize"
    DISCRETIZE_PER_CHANNEL = "DiscretizePerChannel"
    ADD_NORMAL = "AddNormal"
    ADD_NORMAL_PER_CHANNEL = "AddNormalPerChannel"
    DISCRETIZE_ADD_NORMAL = "DiscretizeAddNormal"
    DISCRETIZE_ADD_NORMAL_PER_CHANNEL = "DiscretizeAddNormalPerChannel"


class ExpertRange(Enum):
    """Whose inputs an input range of a layer of experts is for. aihwkit-lightning has no such."""

    SHARED = "shared"
    """Those of all experts: one range for the layer."""
    OWN = "own"
    """Those of one expert: as many ranges as experts."""


@dataclass
class _Section:
    """Base of the config dataclasses: assignment checks the name and the type of a field."""

    _path: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = "") -> None:
        cls._path = path

    def __setattr__(self, name: str, value: object) -> None:
        kinds = {item.name: item.type for item in fields(self)}
        where = f"{self._path}.{name}" if self._path else name
        if name not in kinds:
            close = difflib.get_close_matches(name[:100], kinds, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f" ({', '.join(kinds)})"
            raise ConfigError([Conflict(where, value, f"a field of {type(self).__name__}{hint}")])
        object.__setattr__(self, name, _coerce(kinds[name], value, where))


@dataclass
class IOParameters(_Section, path="forward"):
    """The converters around the tile and the noise of its outputs."""

    inp_res: float = -1.0
    """Resolution of the DAC over ``[-input_range, input_range]``; at most 0: off."""
    out_noise: float = 0.0
    """Standard deviation of the output noise, in units of input range × largest weight."""
    out_noise_per_channel: bool = False
    """Whether the largest weight above is that of the output channel, not of the tile."""
    out_bound: float = 0.0
    """Bound of the ADC, in units of input range × largest weight; at most 0: none."""
    out_res: float = -1.0
    """Resolution of the ADC over ``[-bound, bound]``; at most 0: off."""


@dataclass
class WeightClipParameter(_Section, path="clip"):
    """Clipping of the weights."""

    sigma: float = -1.0
    """Bound in standard deviations, for the Gaussian types; at most 0: none, and to ask for
    clipping is an error.

    A Gaussian type without it still decides to what ``forward.out_bound`` refers: the largest
    weight of the output channel (``LAYER_GAUSSIAN_PER_CHANNEL``) or of the tile.
    """
    type: WeightClipType = WeightClipType.NONE

    @property
    def is_gaussian(self) -> bool:
        """Whether the type takes its bound from the spread of the weights."""
        gaussian = (WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL)
        return self.type in gaussian


@dataclass
class WeightModifierParameter(_Section, path="modifier"):
    """What the forward does to the weights."""

    std_dev: float = 0.0
    """Standard deviation of the noise, relative to the largest weight."""
    res: float = 0.0
    """Resolution of the quantization over ``[-largest weight, largest weight]``."""
    enable_during_test: bool = False
    """Deprecated and ignored with a warning: there is no weight noise in evaluation."""
    type: WeightModifierType = WeightModifierType.NONE
    """Deprecated: `as_config` translates it to the two fields below, with a warning."""
    noise_type: WeightNoiseInjectionType = WeightNoiseInjectionType.NONE
    quantization_type: WeightQuantizationType = WeightQuantizationType.NONE


@dataclass
class MappingParameter(_Section, path="mapping"):
    """Size of a tile. A larger weight matrix is split evenly over several; at most 0: no limit."""

    max_input_size: int = -1
    """Largest number of rows, that is of inputs."""
    max_output_size: int = -1
    """Largest number of columns, that is of outputs. aihwkit-lightning never splits them."""
    packed_projections: bool = False
    """Whether an attention's ``in_proj_weight`` is one matrix, and not three."""
    experts: ExpertRange = ExpertRange.SHARED
    """Whose input range a layer of experts has. By the value, too: ``"shared"`` or ``"own"``."""


@dataclass
class InputRangeParameter(_Section, path="pre_post.input_range"):
    """The range to which inputs are clipped and to which the DAC's steps refer."""

    fast_mode: bool = False
    """Whether to follow the extrema of the inputs instead of their standard deviation."""
    act_range_momentum: float = 0.95
    """Momentum of the extrema in ``fast_mode``; -1 keeps the most extreme ever seen."""
    enable: bool = False
    """Whether there is an input range at all."""
    dynamic: bool = False
    """Whether each input vector has its own range, its largest magnitude."""
    learn_input_range: bool = True
    """Whether the range is trained."""
    init_value: float = 3.0
    """The range before any data was seen."""
    init_from_data: int = 100
    """Number of training batches that set the range from their statistics; at most 0: none."""
    init_std_alpha: float = 3.0
    """The range that statistics set, in standard deviations of the inputs."""
    decay: float = 0.001
    """Strength with which the gradient shrinks the range while few inputs are clipped."""
    input_min_percentage: float = 0.95
    """Fraction of inputs that must lie within the range for ``decay`` to act."""


@dataclass
class PrePostProcessingParameter(_Section, path="pre_post"):
    """Digital processing around the tile."""

    input_range: InputRangeParameter = field(default_factory=InputRangeParameter)


@dataclass
class TorchInferenceRPUConfig(_Section):
    """All settings of one analog product. The default changes nothing: it is a plain product."""

    forward: IOParameters = field(default_factory=IOParameters)
    clip: WeightClipParameter = field(default_factory=WeightClipParameter)
    modifier: WeightModifierParameter = field(default_factory=WeightModifierParameter)
    mapping: MappingParameter = field(default_factory=MappingParameter)
    pre_post: PrePostProcessingParameter = field(default_factory=PrePostProcessingParameter)
    noise_model: NoiseModel | None = None
    """What a chip does to the weights, for `analogfx.program`; of `analogfx.chip` or of AIHWKIT."""
    drift_compensation: BaseDriftCompensation | None = None
    """What makes up for drift behind the ADC; None: nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values (enumerations by value) and the ``"schema"`` version."""
        return {"schema": SCHEMA, **_plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TorchInferenceRPUConfig":
        """Read what `to_dict` wrote; fields that are left out keep their default.

        Raises:
            ConfigError: For another schema, unknown fields and wrong types, all of them at once.
        """
        if data.get("schema") != SCHEMA:
            raise ConfigError([Conflict("schema", data.get("schema"), str(SCHEMA))])
        return _read(cls, {name: value for name, value in data.items() if name != "schema"})

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "TorchInferenceRPUConfig":
        """Read what `to_json` wrote.

        Raises:
            ConfigError: For text that is not a JSON object, and as in `from_dict`.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # syntax; 5,000 digits; a nesting too deep
            raise ConfigError([Conflict("JSON", text, f"a JSON object ({error})")]) from error
        if not isinstance(data, dict):
            raise ConfigError([Conflict("JSON", data, "a JSON object")])
        return cls.from_dict(data)


def as_config(config: object, warn: bool = True) -> TorchInferenceRPUConfig:
    """Return a config of our own, independent of the one handed in, which stays as it is.

    The deprecated ``modifier.type`` is translated, and ``modifier.enable_during_test`` dropped,
    each with a warning, unless ``warn`` is False.

    Args:
        config: A `TorchInferenceRPUConfig`, the one of aihwkit-lightning, or nested dicts of
            fields, where those left out keep their default and ``"schema"`` is optional.

    Raises:
        ConfigError: For any other type, unknown fields and wrong types, all of them at once.
    """
    sections = [item.name for item in fields(TorchInferenceRPUConfig) if not _is_part(item.type)]
    if isinstance(config, Mapping):
        own = TorchInferenceRPUConfig.from_dict({"schema": SCHEMA, **copy.deepcopy(config)})
    elif _is_record(config) and all(hasattr(config, name) for name in sections):
        own = _read(TorchInferenceRPUConfig, copy.deepcopy(config))
    else:
        valid = "a TorchInferenceRPUConfig, of analogfx or of aihwkit-lightning, or a dict"
        raise ConfigError([Conflict("rpu_config", type(config), valid)])
    if warn:
        _warn_of_deprecated(own.modifier)
    _replace_deprecated(own.modifier)
    return own


def leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts by its dotted name, of ``to_dict`` for example."""
    for name, value in fields.items():
        where = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from leaves(value, where)
        else:
            yield where, value


def differences(
    first: TorchInferenceRPUConfig, second: TorchInferenceRPUConfig
) -> list[tuple[str, Any, Any]]:
    """Return (dotted field, value in the first, value in the second) where two configs differ."""
    one, other = dict(leaves(first.to_dict())), dict(leaves(second.to_dict()))
    names = {**one, **other}
    return [(n, one.get(n), other.get(n)) for n in names if one.get(n) != other.get(n)]


def described(config: TorchInferenceRPUConfig, base: TorchInferenceRPUConfig) -> str:
    """Say in a line where a config differs from another; parts of a chip by their class.

    Example:
        >>> config = TorchInferenceRPUConfig()
        >>> config.forward.inp_res = 254
        >>> described(config, TorchInferenceRPUConfig())
        'forward.inp_res 254'
    """
    return ", ".join(f"{name} {_in_words(value)}" for name, value in _changed(config, base, ""))


def _changed(section: _Section, base: _Section, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in fields(section):
        value, other = getattr(section, item.name), getattr(base, item.name)
        if isinstance(value, _Section):
            yield from _changed(value, other, f"{prefix}{item.name}.")
        elif value != other:
            yield f"{prefix}{item.name}", value


def _in_words(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return f"{value:g}"
    return type(value).__name__ if isinstance(value, Record) else str(value)


def bits(width: int) -> int:
    """Return the number of steps of a converter: ``2**width - 2``, as ``inp_res`` counts them.

    There is one level less than the code has values, so that the levels lie symmetrically around
    zero and zero is one of them: 8 bits are the 255 levels -127 .. 127, with 254 steps between.

    Args:
        width: Bits of the converter, 2 to 24: float32 resolves no more.

    Raises:
        ValueError: For any other width.
        TypeError: For what is no whole number.

    Example:
        >>> bits(8)
        254
    """
    width = operator.index(width)
    if not 2 <= width <= 24:
        raise ValueError(f"bits({shown(width)}): expected 2 to 24 bits")
    return (1 << width) - 2


def doubts(config: TorchInferenceRPUConfig) -> list[str]:
    """Return a sentence for every field that can run and is probably not what was meant.

    8, 10 and 12 are usual widths of converters in bits, and no number of steps that one has. 255
    and its like leave the ends of the range without a level.
    """
    found = []
    for name in ("inp_res", "out_res"):
        value = getattr(config.forward, name)
        if value in (8, 10, 12):
            found.append(
                f"forward.{name} = {value:g} is a quantizer of {value:g} steps; "
                f"for {value:g} bits set analogfx.bits({value:g}), that is {bits(int(value))}"
            )
        elif value in (31, 63, 127, 255, 511, 1023, 4095, 65535):
            width = int(value).bit_length()
            found.append(
                f"forward.{name} = {value:g} is odd, so that an end of the range lies between two "
                f"levels; for {width} bits set analogfx.bits({width}), that is {bits(width)}"
            )
    return found


@dataclass(frozen=True)
class Resolved:
    """A config that can run, as plain scalars: hashable, equal by value, every switch decided.

    Units are those of the config's fields. 0.0 means off wherever no other meaning is given.
    """

    max_input_size: int
    """At most 0: one tile."""
    max_output_size: int
    """At most 0: one tile."""
    packed_projections: bool
    """Whether an attention's packed weight is one matrix, and not three."""
    own_expert_ranges: bool
    """Whether each matrix of a layer of experts has an input range of its own."""
    range_mode: str
    """``"none"``, ``"static"``, ``"fast"`` or ``"dynamic"``."""
    learn_range: bool
    init_value: float
    init_from_data: int
    init_std_alpha: float
    momentum: float
    decay: float
    input_min_percentage: float
    inp_res: float
    """Number of steps if above 1, else step as a fraction of the full range."""
    out_res: float
    """As ``inp_res``."""
    out_bound: float
    out_noise: float
    out_noise_per_channel: bool
    noise_std: float
    noise_per_channel: bool
    weight_states: float
    """Number of steps between the negative and the positive largest weight."""
    weight_per_channel: bool
    learnable_clip: bool
    clip_sigma: float
    """Bound of the Gaussian clip after the optimizer step; 0.0 if there is none."""
    clip_per_channel: bool
    bound_per_channel: bool
    """Whether ``out_bound`` refers to the largest weight of the channel, not of the tile."""
    collects: bool = False
    """Whether training leaves what it learned of ranges to ``prepare_training``: no config says."""
    processes: str = ""
    """Process groups whose members share what they see in every forward; no config says."""

    @property
    def learns_by_share(self) -> bool:
        """Whether a range shrinks while few inputs are saturated, as static ranges do."""
        return self.learn_range and self.range_mode == "static" and self.decay > 0

    @property
    def has_range(self) -> bool:
        """Whether inputs have a range."""
        return self.range_mode != "none"

    @property
    def has_state(self) -> bool:
        """Whether the range is kept from one call to the next."""
        return self.range_mode in ("static", "fast")

    @property
    def is_identity(self) -> bool:
        """Whether the product, apart from its split into tiles, stays a plain one."""
        weights_change = self.noise_std or self.weight_states or self.clip_sigma
        return not (self.has_range or weights_change or self.learnable_clip)


def resolve(config: object) -> Resolved:
    """Decide once what a config means.

    Args:
        config: Anything that `as_config` accepts.

    Raises:
        ConfigError: For a config that cannot run, with all of its conflicts.
    """
    config = as_config(config)
    mode = _range_mode(config)
    conflicts = [
        *_beyond_arithmetic(config),
        *_range_conflicts(config.pre_post.input_range, mode),
        *_converter_conflicts(config.forward, mode),
        *_weight_conflicts(config.modifier, config.clip),
    ]
    if conflicts:
        raise ConfigError(conflicts)

    io, modifier, clip = config.forward, config.modifier, config.clip
    ranges = config.pre_post.input_range
    return Resolved(
        max_input_size=config.mapping.max_input_size,
        max_output_size=config.mapping.max_output_size,
        packed_projections=config.mapping.packed_projections,
        own_expert_ranges=config.mapping.experts is ExpertRange.OWN,
        range_mode=mode,
        learn_range=mode in ("static", "fast") and ranges.learn_input_range,
        init_value=ranges.init_value,
        init_from_data=max(ranges.init_from_data, 0),
        init_std_alpha=ranges.init_std_alpha,
        momentum=ranges.act_range_momentum,
        decay=ranges.decay,
        input_min_percentage=ranges.input_min_percentage,
        inp_res=max(io.inp_res, 0.0),
        out_res=max(io.out_res, 0.0),
        out_bound=max(io.out_bound, 0.0),
        out_noise=io.out_noise,
        out_noise_per_channel=io.out_noise_per_channel,
        noise_std=modifier.std_dev if _adds_noise(modifier) else 0.0,
        noise_per_channel=modifier.noise_type is WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL,
        weight_states=max(modifier.res, 1 / modifier.res) if _quantizes(modifier) else 0.0,
        weight_per_channel=(
            modifier.quantization_type is WeightQuantizationType.DISCRETIZE_PER_CHANNEL
        ),
        learnable_clip=clip.type is WeightClipType.LEARNABLE_PER_CHANNEL,
        clip_sigma=max(clip.sigma, 0.0) if clip.is_gaussian else 0.0,
        clip_per_channel=clip.type is WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL,
        bound_per_channel=clip.type
        in (WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, WeightClipType.LEARNABLE_PER_CHANNEL),
    )


_SectionT = TypeVar("_SectionT", bound=_Section)

_NUMBERS: dict[type, type] = {bool: bool, int: Integral, float: Real}

_SMALLEST, _LARGEST = 1e-30, 1e30
"""Magnitudes within which products and quotients of scalars, weights and inputs stay in float32."""

_INT64 = 2**63 - 1
_MOST_BATCHES = 2**31 - 1
"""A range that was calibrated is marked by a count of 2**31 batches."""

_TRANSLATION = {
    WeightModifierType.DISCRETIZE: ("NONE", "DISCRETIZE"),
    WeightModifierType.DISCRETIZE_PER_CHANNEL: ("NONE", "DISCRETIZE_PER_CHANNEL"),
    WeightModifierType.ADD_NORMAL: ("ADD_NORMAL", "NONE"),
    WeightModifierType.ADD_NORMAL_PER_CHANNEL: ("ADD_NORMAL_PER_CHANNEL", "NONE"),
    WeightModifierType.DISCRETIZE_ADD_NORMAL: ("ADD_NORMAL", "DISCRETIZE"),
    WeightModifierType.DISCRETIZE_ADD_NORMAL_PER_CHANNEL: (
        "ADD_NORMAL_PER_CHANNEL",
        "DISCRETIZE_PER_CHANNEL",
    ),
}


def _coerce(kind: Any, value: object, where: str) -> object:
    """Return ``value`` as a ``kind`` (number, enumeration or section) without changing it."""
    if _is_part(kind):
        return None if value is None else read_record(get_args(kind)[0], value, where)
    if issubclass(kind, _Section):
        return value if isinstance(value, kind) else _read(kind, value)
    if issubclass(kind, Enum):
        label = value.value if isinstance(value, Enum) else value
        for member in kind:
            if label in (member.value, member.name):
                return member
        valid = f"one of {', '.join(member.name for member in kind)}"
    else:
        # A bool is an Integral to Python, but True is no resolution.
        if isinstance(value, _NUMBERS[kind]) and (kind is bool or not isinstance(value, bool)):
            try:
                return kind(value)
            except OverflowError:  # an integer too large for a float
                raise ConfigError([Conflict(where, value, "a number below 1e30")]) from None
        valid = f"a value of type {kind.__name__}"
    raise ConfigError([Conflict(where, value, valid)])


def _is_part(kind: Any) -> bool:
    """Whether a field holds a part of a chip, or None."""
    return any(isinstance(k, type) and issubclass(k, Record) for k in get_args(kind))


def _read(kind: type[_SectionT], source: object) -> _SectionT:
    """Build a section from a mapping or from another dataclass, whatever class that is."""
    if not (isinstance(source, Mapping) or _is_record(source)):
        valid = f"{kind.__name__} or a dict of its fields"
        raise ConfigError([Conflict(kind._path, source, valid)])
    # Not the declared fields: a plain dataclass keeps whatever a user assigned to it.
    values = source if isinstance(source, Mapping) else vars(source)
    section = kind()
    conflicts: list[Conflict] = []
    for name, value in values.items():
        try:
            setattr(section, str(name), value)
        except ConfigError as error:
            conflicts += error.conflicts
    if conflicts:
        raise ConfigError(conflicts)
    return section


def _is_record(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any) -> Any:
    if isinstance(value, _Section):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Record):
        return value.to_dict()
    return value.value if isinstance(value, Enum) else value


def _warn_of_deprecated(modifier: WeightModifierParameter) -> None:
    if modifier.type in _TRANSLATION:
        noise, quantization = _TRANSLATION[modifier.type]
        warnings.warn(
            "modifier.type is deprecated: use "
            f"modifier.noise_type = {noise} and modifier.quantization_type = {quantization}",
            DeprecationWarning,
            stacklevel=3,
        )
    if modifier.enable_during_test:
        warnings.warn("modifier.enable_during_test = True is deprecated and ignored", stacklevel=3)


def _replace_deprecated(modifier: WeightModifierParameter) -> None:
    if modifier.type in _TRANSLATION:
        noise, quantization = _TRANSLATION[modifier.type]
        modifier.noise_type = WeightNoiseInjectionType[noise]
        modifier.quantization_type = WeightQuantizationType[quantization]
        modifier.type = WeightModifierType.NONE
    modifier.enable_during_test = False


def _range_mode(config: TorchInferenceRPUConfig) -> str:
    ranges = config.pre_post.input_range
    if not ranges.enable:
        return "none"
    if ranges.fast_mode:
        return "fast"
    return "dynamic" if ranges.dynamic else "static"


def _adds_noise(modifier: WeightModifierParameter) -> bool:
    return modifier.noise_type is not WeightNoiseInjectionType.NONE


def _quantizes(modifier: WeightModifierParameter) -> bool:
    return modifier.quantization_type is not WeightQuantizationType.NONE


def _beyond_arithmetic(section: _Section) -> Iterator[Conflict]:
    """Numbers that float32, and the 64 bits of an integer, do not hold: in every field."""
    for item in fields(section):
        value = getattr(section, item.name)
        where = f"{section._path}.{item.name}"
        if isinstance(value, _Section):
            yield from _beyond_arithmetic(value)
        elif isinstance(value, float):
            if not math.isfinite(value):
                yield Conflict(where, value, "a finite number")
            elif value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
                valid = f"0, or a magnitude of {_SMALLEST} to {_LARGEST}, for float32"
                yield Conflict(where, value, valid)
        elif isinstance(value, int):
            most = _MOST_BATCHES if item.name == "init_from_data" else _INT64
            if not -_INT64 <= value <= most:
                yield Conflict(where, value, f"a whole number, at most {most}")


def _range_conflicts(ranges: InputRangeParameter, mode: str) -> Iterator[Conflict]:
    def conflict(name: str, valid: str) -> Conflict:
        return Conflict(f"{ranges._path}.{name}", getattr(ranges, name), valid)

    if mode == "fast":
        if ranges.dynamic:
            yield conflict("dynamic", "False with fast_mode, which keeps one range for all inputs")
        if not (0 <= ranges.act_range_momentum <= 1 or ranges.act_range_momentum == -1):
            yield conflict("act_range_momentum", "0 to 1, or -1 for the extrema ever seen")
    if mode in ("static", "fast") and ranges.init_value <= 0:
        yield conflict("init_value", "a number above 0")
    if mode == "static":
        if ranges.init_std_alpha <= 0:
            yield conflict("init_std_alpha", "a number above 0")
        if ranges.decay < 0:
            yield conflict("decay", "a number above 0, or 0 for none")
        if not 0 <= ranges.input_min_percentage <= 1:
            yield conflict("input_min_percentage", "a fraction, 0 to 1")


def _converter_conflicts(io: IOParameters, mode: str) -> Iterator[Conflict]:
    with_range = "with pre_post.input_range.enable = True"
    if mode == "none":
        if io.inp_res > 0:
            yield Conflict("forward.inp_res", io.inp_res, f"-1 (off), or {with_range}")
        if io.out_bound > 0:
            yield Conflict("forward.out_bound", io.out_bound, f"0 (none), or {with_range}")
        if io.out_noise > 0:
            yield Conflict("forward.out_noise", io.out_noise, f"0 (off), or {with_range}")
    if io.out_res > 0 and io.out_bound <= 0:
        yield Conflict("forward.out_res", io.out_res, "-1 (off), or with forward.out_bound > 0")
    if io.out_noise < 0:
        yield Conflict("forward.out_noise", io.out_noise, "a number above 0, or 0 for none")


def _weight_conflicts(
    modifier: WeightModifierParameter, clip: WeightClipParameter
) -> Iterator[Conflict]:
    if _adds_noise(modifier) and modifier.std_dev < 0:
        yield Conflict("modifier.std_dev", modifier.std_dev, "a number above 0, or 0 for none")
    if _quantizes(modifier) and modifier.res <= 0:
        valid = "a number of steps, or a step in (0, 1], or with modifier.quantization_type = NONE"
        yield Conflict("modifier.res", modifier.res, valid)
    if (
        modifier.quantization_type is WeightQuantizationType.DISCRETIZE
        and clip.type is WeightClipType.LEARNABLE_PER_CHANNEL
    ):
        valid = "NONE or DISCRETIZE_PER_CHANNEL with clip.type = LEARNABLE_PER_CHANNEL"
        yield Conflict("modifier.quantization_type", modifier.quantization_type, valid)
