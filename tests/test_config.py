import contextlib
import copy
import dataclasses
import json
import math
import pickle
import warnings
from enum import Enum

import aihwkit_lightning.simulator.configs as lightning
import aihwkit_lightning.simulator.parameters.enums as lightning_enums
import pytest
from aihwkit_lightning.nn import AnalogLinear
from hypothesis import given
from hypothesis import strategies as st

import analogfx
from analogfx import chip
from analogfx import config as own
from analogfx.config import ExpertRange, TorchInferenceRPUConfig, as_config, resolve
from analogfx.errors import AnalogfxError, ConfigError

CLASSES = [
    "IOParameters",
    "InputRangeParameter",
    "MappingParameter",
    "PrePostProcessingParameter",
    "TorchInferenceRPUConfig",
    "WeightClipParameter",
    "WeightModifierParameter",
]
ENUMS = [
    "WeightClipType",
    "WeightModifierType",
    "WeightNoiseInjectionType",
    "WeightQuantizationType",
]


def make(**values):
    """A config with the given fields, where ``__`` stands for the dot of a field's path."""
    config = TorchInferenceRPUConfig()
    for path, value in values.items():
        *sections, name = path.split("__")
        section = config
        for step in sections:
            section = getattr(section, step)
        setattr(section, name, value)
    return config


def with_range(**values):
    """A config with an enabled input range and the given fields of it."""
    fields = {"enable": True, **values}
    return make(**{f"pre_post__input_range__{name}": value for name, value in fields.items()})


def conflicts_of(config):
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    return caught.value.conflicts


def plain(config):
    """Nested dicts of any config dataclass, enumerations by value."""
    if dataclasses.is_dataclass(config):
        return {item.name: plain(getattr(config, item.name)) for item in dataclasses.fields(config)}
    return config.value if isinstance(config, Enum) else config


def to_lightning(value):
    """The same config, section or enumeration member of aihwkit-lightning."""
    if isinstance(value, Enum):
        return getattr(lightning_enums, type(value).__name__)[value.name]
    if not dataclasses.is_dataclass(value):
        return value
    own = fields_of_our_own(value)
    values = {name: to_lightning(item) for name, item in vars(value).items() if name not in own}
    return getattr(lightning, type(value).__name__)(**values)


def fields_of_our_own(section):
    """Names of the fields that aihwkit-lightning's class does not have."""
    theirs = dataclasses.fields(getattr(lightning, type(section).__name__))
    return {item.name for item in dataclasses.fields(section)} - {item.name for item in theirs}


def switched_off(section):
    """The same section with the fields of our own at their defaults."""
    values = {
        name: switched_off(item) if dataclasses.is_dataclass(item) else item
        for name, item in vars(section).items()
        if name not in fields_of_our_own(section)
    }
    return type(section)(**values)


NUMBERS = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
}


PARTS = {
    chip.NoiseModel | None: [
        None,
        chip.PCMLikeNoiseModel(g_max=30.0),
        chip.StuckAtNoiseModel(chip.HermesNoiseModel(num_devices=1), at_g_min=0.1),
    ],
    chip.BaseDriftCompensation | None: [None, chip.PerColumnDriftCompensation()],
}


def sections(kind):
    """Any section of this class, whether it can run or not."""

    def values(of):
        if of in PARTS:
            return st.sampled_from(PARTS[of])
        if issubclass(of, Enum):
            return st.sampled_from(of)
        return NUMBERS[of] if of in NUMBERS else sections(of)

    return st.builds(kind, **{item.name: values(item.type) for item in dataclasses.fields(kind)})


configs = sections(TorchInferenceRPUConfig)


def own_numbers(kind, section=TorchInferenceRPUConfig, path=""):
    """The paths, as `make` takes them, of all fields of a type."""
    found = []
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(item.type):
            found += own_numbers(kind, item.type, f"{path}{item.name}__")
        elif item.type is kind:
            found.append(path + item.name)
    return found


class TestSameAsLightning:
    @pytest.mark.parametrize("name", CLASSES)
    def test_fields_and_defaults(self, name):
        expected = plain(getattr(lightning, name)())
        made = getattr(analogfx, name)()
        found = plain(to_lightning(made))
        assert found == expected
        own = fields_of_our_own(made)
        assert [name for name in plain(made) if name not in own] == list(expected)

    def test_what_is_our_own_is_off_by_default(self):
        """A config of Lightning's fields alone means what it means there."""
        config = TorchInferenceRPUConfig()
        assert (config.mapping.max_output_size, config.mapping.packed_projections) == (-1, False)
        assert config.mapping.experts is ExpertRange.SHARED
        assert config.noise_model is None and config.drift_compensation is None
        assert switched_off(config) == config

    @pytest.mark.parametrize("name", ENUMS)
    def test_enumerations(self, name):
        def members(enum):
            return {member.name: member.value for member in enum}

        assert members(getattr(analogfx, name)) == members(getattr(lightning_enums, name))


class TestAssignment:
    def test_unknown_field_is_refused_with_the_near_miss(self):
        config = TorchInferenceRPUConfig()
        with pytest.raises(ConfigError, match=r"forward\.inp_rez = 254: .*'inp_res'"):
            config.forward.inp_rez = 254
        with pytest.raises(ConfigError, match="did you mean 'modifier'"):
            config.modifer = None

    def test_unknown_field_without_a_near_miss_lists_the_fields(self):
        with pytest.raises(ConfigError, match="sigma, type"):
            TorchInferenceRPUConfig().clip.xyz = 1

    @pytest.mark.parametrize("value", ["AddNormal", "ADD_NORMAL"])
    def test_enumeration_from_string(self, value):
        config = make(modifier__noise_type=value)
        assert config.modifier.noise_type is own.WeightNoiseInjectionType.ADD_NORMAL

    @pytest.mark.parametrize("name", ENUMS)
    def test_enumeration_of_lightning(self, name):
        path = {
            "WeightClipType": "clip__type",
            "WeightModifierType": "modifier__type",
            "WeightNoiseInjectionType": "modifier__noise_type",
            "WeightQuantizationType": "modifier__quantization_type",
        }[name]
        for member in getattr(lightning_enums, name):
            section, field = path.split("__")
            assigned = getattr(getattr(make(**{path: member}), section), field)
            assert assigned is getattr(own, name)[member.name]

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("forward__inp_res", "254"),
            ("forward__inp_res", True),
            ("forward__inp_res", None),
            ("forward__out_noise_per_channel", 1),
            ("mapping__max_input_size", 512.0),
            ("mapping__max_input_size", True),
            ("clip__type", "Gaussian"),
            ("clip__type", None),
            ("forward", 254),
            ("pre_post", None),
        ],
    )
    def test_wrong_type_is_refused(self, path, value):
        with pytest.raises(ConfigError) as caught:
            make(**{path: value})
        (conflict,) = caught.value.conflicts
        assert conflict.field == path.replace("__", ".")
        assert conflict.value == value

    def test_integer_becomes_a_float(self):
        assert isinstance(make(forward__inp_res=254).forward.inp_res, float)

    def test_section_keeps_its_identity(self):
        io = own.IOParameters()
        config = TorchInferenceRPUConfig(forward=io)
        io.inp_res = 254
        assert config.forward is io

    def test_section_of_lightning(self):
        config = make(forward=lightning.IOParameters(inp_res=254))
        assert config.forward == own.IOParameters(inp_res=254)


class TestAsConfig:
    @given(configs)
    def test_returns_an_independent_copy(self, config):
        config.modifier.type = "NONE"
        config.modifier.enable_during_test = False
        before = copy.deepcopy(config)
        copied = as_config(config)
        assert copied == config
        copied.pre_post.input_range.init_value = 17.0
        copied.forward.inp_res = 17.0
        assert config == before

    @given(configs)
    def test_accepts_lightnings_config(self, config):
        config.modifier.type = "NONE"
        config.modifier.enable_during_test = False
        config = switched_off(config)
        foreign = to_lightning(config)
        before = copy.deepcopy(foreign)
        assert as_config(foreign) == config
        assert foreign == before

    def test_accepts_a_dict_of_some_fields(self):
        data = {"forward": {"inp_res": 254}, "clip": {"type": "LayerGaussian"}}
        assert as_config(data) == make(forward__inp_res=254, clip__type="LAYER_GAUSSIAN")
        assert data == {"forward": {"inp_res": 254}, "clip": {"type": "LayerGaussian"}}

    def test_takes_over_a_field_that_lightning_swallowed(self):
        foreign = lightning.TorchInferenceRPUConfig()
        foreign.mapping.max_output_size = 512
        assert as_config(foreign).mapping.max_output_size == 512

    def test_refuses_unknown_fields_that_lightning_swallowed(self):
        foreign = lightning.TorchInferenceRPUConfig()
        foreign.modifier.offset = 0.1
        foreign.pre_post.input_range.init_with_max = True
        foreign.noise_model = "PCM"
        with pytest.raises(ConfigError) as caught:
            as_config(foreign)
        assert [conflict.field for conflict in caught.value.conflicts] == [
            "modifier.offset",
            "pre_post.input_range.init_with_max",
            "noise_model",
        ]

    @pytest.mark.parametrize("other", [None, 3, "afm", [], own.IOParameters(), math])
    def test_refuses_other_types_by_name(self, other):
        with pytest.raises(ConfigError, match=type(other).__name__):
            as_config(other)


class TestDeprecated:
    @pytest.mark.parametrize("member", own.WeightModifierType)
    def test_type_is_translated_as_lightning_does(self, member):
        foreign = lightning.TorchInferenceRPUConfig()
        foreign.modifier.type = lightning_enums.WeightModifierType[member.name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adjusted = AnalogLinear(2, 2, rpu_config=copy.deepcopy(foreign)).rpu_config.modifier
            translated = as_config(foreign).modifier
        assert translated.noise_type.value == adjusted.noise_type.value
        assert translated.quantization_type.value == adjusted.quantization_type.value

    def test_type_warns_once(self):
        config = make(modifier__type="DISCRETIZE_ADD_NORMAL")
        with pytest.warns(DeprecationWarning, match=r"noise_type = ADD_NORMAL and .*DISCRETIZE"):
            translated = as_config(config)
        assert as_config(translated) == translated
        assert config.modifier.type is own.WeightModifierType.DISCRETIZE_ADD_NORMAL

    def test_noise_in_evaluation_is_ignored_with_a_warning(self):
        config = make(modifier__enable_during_test=True)
        with pytest.warns(UserWarning, match="enable_during_test"):
            assert as_config(config) == TorchInferenceRPUConfig()


class TestSerialization:
    @given(configs)
    def test_round_trips(self, config):
        assert TorchInferenceRPUConfig.from_dict(config.to_dict()) == config
        assert TorchInferenceRPUConfig.from_json(config.to_json()) == config
        assert pickle.loads(pickle.dumps(config)) == config
        assert copy.deepcopy(config) == config

    def test_json_is_plain_and_versioned(self):
        data = json.loads(analogfx.recipes.afm().to_json())
        assert data["schema"] == 1
        assert data["clip"] == {"sigma": 2.5, "type": "LayerGaussianPerChannel"}

    @pytest.mark.parametrize("schema", [None, 0, 2, "1"])
    def test_other_schema_is_refused(self, schema):
        with pytest.raises(ConfigError, match="schema"):
            TorchInferenceRPUConfig.from_dict({"schema": schema})

    def test_absent_schema_is_refused_when_reading_back(self):
        with pytest.raises(ConfigError, match="schema"):
            TorchInferenceRPUConfig.from_dict({})

    def test_all_unknown_fields_and_wrong_types_are_listed(self):
        data = {"schema": 1, "forward": {"inp_rez": 254, "out_res": "x"}, "extra": 1, "clip": 2}
        with pytest.raises(ConfigError) as caught:
            TorchInferenceRPUConfig.from_dict(data)
        found = [conflict.field for conflict in caught.value.conflicts]
        assert found == ["forward.inp_rez", "forward.out_res", "extra", "clip"]

    @pytest.mark.parametrize("text", ["", "{", "[]", "3"])
    def test_text_that_is_no_json_object_is_refused(self, text):
        with pytest.raises(ConfigError, match="a JSON object"):
            TorchInferenceRPUConfig.from_json(text)


CONFLICTS = {
    "forward.inp_res": make(forward__inp_res=254),
    "forward.out_bound": make(forward__out_bound=10),
    "forward.out_noise": make(forward__out_noise=0.1),
    "forward.out_res": make(forward__out_res=254),
    "modifier.std_dev": make(modifier__noise_type="ADD_NORMAL", modifier__std_dev=-0.1),
    "modifier.res": make(modifier__quantization_type="DISCRETIZE"),
    "modifier.quantization_type": make(
        modifier__quantization_type="DISCRETIZE",
        modifier__res=14,
        clip__type="LEARNABLE_PER_CHANNEL",
    ),
    "pre_post.input_range.dynamic": with_range(fast_mode=True, dynamic=True),
    "pre_post.input_range.act_range_momentum": with_range(fast_mode=True, act_range_momentum=1.5),
    "pre_post.input_range.init_value": with_range(init_value=0),
    "pre_post.input_range.init_std_alpha": with_range(init_std_alpha=-1),
    "pre_post.input_range.decay": with_range(decay=-0.1),
    "pre_post.input_range.input_min_percentage": with_range(input_min_percentage=95),
}


class TestConflicts:
    @pytest.mark.parametrize("field", CONFLICTS)
    def test_each_alone(self, field):
        (conflict,) = conflicts_of(CONFLICTS[field])
        value = CONFLICTS[field]
        for name in field.split("."):
            value = getattr(value, name)
        assert (conflict.field, conflict.value) == (field, value)
        assert conflict.valid

    def test_all_at_once_in_one_error(self):
        config = make(
            forward__inp_res=254,
            forward__out_res=254,
            forward__out_noise=0.1,
            modifier__quantization_type="DISCRETIZE",
            clip__type="LEARNABLE_PER_CHANNEL",
            modifier__noise_type="ADD_NORMAL",
            modifier__std_dev=math.nan,
        )
        found = [conflict.field for conflict in conflicts_of(config)]
        assert sorted(found) == [
            "forward.inp_res",
            "forward.out_noise",
            "forward.out_res",
            "modifier.quantization_type",
            "modifier.res",
            "modifier.std_dev",
        ]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_numbers_that_are_not_finite(self, value):
        config = with_range(act_range_momentum=value)
        config.clip.sigma = value
        found = [conflict.field for conflict in conflicts_of(config)]
        assert found == ["clip.sigma", "pre_post.input_range.act_range_momentum"]

    @pytest.mark.parametrize("value", [1e31, 1e39, -1e39, 1e300, 1e-46, 5e-324])
    @pytest.mark.parametrize("path", own_numbers(float))
    def test_numbers_beyond_float32(self, path, value):
        (conflict,) = [c for c in conflicts_of(make(**{path: value})) if "float32" in c.valid]
        assert (conflict.field, conflict.value) == (path.replace("__", "."), value)

    @pytest.mark.parametrize("value", [2**63, -(2**64), pytest.param(10**5000, id="long")])
    @pytest.mark.parametrize("path", own_numbers(int))
    def test_numbers_beyond_an_integer(self, path, value):
        (conflict,) = conflicts_of(make(**{path: value}))
        assert (conflict.field, conflict.value) == (path.replace("__", "."), value)
        assert len(str(ConfigError([conflict]))) < 1000

    def test_a_count_that_would_open_a_calibrated_range(self):
        assert conflicts_of(with_range(init_from_data=2**31))
        assert resolve(with_range(init_from_data=2**31 - 1))

    @pytest.mark.parametrize("path", own_numbers(float))
    def test_an_integer_beyond_a_float(self, path):
        with pytest.raises(ConfigError, match=path.replace("__", r"\.")):
            make(**{path: 10**400})

    def test_negative_output_noise(self):
        assert [conflict.field for conflict in conflicts_of(make(forward__out_noise=-1))] == [
            "forward.out_noise"
        ]

    @pytest.mark.parametrize("kind", ["DISCRETIZE", "DISCRETIZE_PER_CHANNEL"])
    @pytest.mark.parametrize("res", [0, -1])
    def test_quantization_without_resolution(self, kind, res):
        config = make(modifier__quantization_type=kind, modifier__res=res)
        assert [conflict.field for conflict in conflicts_of(config)] == ["modifier.res"]

    def test_message_has_one_line_for_each_and_the_module(self):
        config = make(forward__inp_res=254, modifier__noise_type="ADD_NORMAL", modifier__std_dev=-1)
        error = ConfigError(conflicts_of(config), module="encoder.fc1")
        assert str(error).splitlines() == [
            "encoder.fc1: forward.inp_res = 254.0: "
            "expected -1 (off), or with pre_post.input_range.enable = True",
            "encoder.fc1: modifier.std_dev = -1.0: expected a number above 0, or 0 for none",
        ]
        assert isinstance(error, AnalogfxError)
        assert isinstance(error, ValueError)

    def test_error_survives_pickling(self):
        error = ConfigError(conflicts_of(make(forward__inp_res=254)), module="fc")
        restored = pickle.loads(pickle.dumps(error))
        assert str(restored) == str(error)
        assert restored.conflicts == error.conflicts

    @pytest.mark.parametrize(
        "config",
        [
            make(modifier__res=-1, modifier__std_dev=-1),
            make(clip__sigma=-5),
            make(forward__inp_res=0, forward__out_res=-254, forward__out_bound=-1),
            make(pre_post__input_range__init_value=-1, pre_post__input_range__decay=-1),
            with_range(act_range_momentum=7),
            with_range(fast_mode=True, act_range_momentum=-1, decay=-1),
            with_range(dynamic=True, init_from_data=-1),
        ],
    )
    def test_fields_without_effect_are_not_judged(self, config):
        resolve(config)


class TestResolve:
    def test_default_is_the_identity(self):
        resolved = resolve(TorchInferenceRPUConfig())
        assert resolved.is_identity
        assert not resolved.has_range
        assert not resolved.has_state

    def test_tiles_alone_stay_the_identity(self):
        assert resolve(make(mapping__max_input_size=512)).is_identity

    @pytest.mark.parametrize(
        "config",
        [
            with_range(),
            make(modifier__noise_type="ADD_NORMAL", modifier__std_dev=0.1),
            make(modifier__quantization_type="DISCRETIZE", modifier__res=14),
            make(clip__type="LAYER_GAUSSIAN", clip__sigma=2.5),
            make(clip__type="LEARNABLE_PER_CHANNEL"),
        ],
    )
    def test_anything_else_is_not(self, config):
        assert not resolve(config).is_identity

    @given(configs)
    def test_raises_nothing_but_config_errors(self, config):
        with warnings.catch_warnings(), contextlib.suppress(ConfigError):
            warnings.simplefilter("ignore")
            resolve(config)

    def test_equal_and_hashable_by_value(self):
        assert len({resolve(analogfx.recipes.afm()), resolve(analogfx.recipes.afm())}) == 1
        assert resolve(analogfx.recipes.afm()) != resolve(TorchInferenceRPUConfig())

    @pytest.mark.parametrize(
        ("values", "mode", "has_state"),
        [
            ({}, "static", True),
            ({"fast_mode": True}, "fast", True),
            ({"dynamic": True}, "dynamic", False),
            ({"enable": False, "dynamic": True, "fast_mode": True}, "none", False),
        ],
    )
    def test_range_mode(self, values, mode, has_state):
        resolved = resolve(with_range(**values))
        assert (resolved.range_mode, resolved.has_state) == (mode, has_state)
        assert resolved.learn_range == has_state
        assert resolved.has_range == (mode != "none")

    def test_range_that_is_not_learned(self):
        assert not resolve(with_range(learn_input_range=False)).learn_range

    @pytest.mark.parametrize(("res", "states"), [(254, 254), (0.125, 8), (1, 1)])
    def test_weight_states_from_number_or_fraction(self, res, states):
        config = make(modifier__quantization_type="DISCRETIZE_PER_CHANNEL", modifier__res=res)
        resolved = resolve(config)
        assert (resolved.weight_states, resolved.weight_per_channel) == (states, True)

    def test_switched_off_is_zero(self):
        resolved = resolve(
            make(
                forward__out_bound=-3,
                modifier__std_dev=0.1,
                modifier__res=14,
                clip__sigma=2.5,
            )
        )
        assert (resolved.inp_res, resolved.out_res, resolved.out_bound) == (0, 0, 0)
        assert (resolved.noise_std, resolved.weight_states, resolved.clip_sigma) == (0, 0, 0)

    @pytest.mark.parametrize(
        ("kind", "gaussian", "per_channel", "learnable", "bound_per_channel"),
        [
            ("NONE", False, False, False, False),
            ("LAYER_GAUSSIAN", True, False, False, False),
            ("LAYER_GAUSSIAN_PER_CHANNEL", True, True, False, True),
            ("LEARNABLE_PER_CHANNEL", False, False, True, True),
        ],
    )
    def test_clip(self, kind, gaussian, per_channel, learnable, bound_per_channel):
        resolved = resolve(make(clip__type=kind, clip__sigma=2.5))
        assert resolved.clip_sigma == (2.5 if gaussian else 0)
        assert resolved.clip_per_channel == per_channel
        assert resolved.learnable_clip == learnable
        assert resolved.bound_per_channel == bound_per_channel

    @pytest.mark.parametrize("never", [0, -1, -7])
    @pytest.mark.parametrize("fast", [False, True])
    def test_a_range_that_never_follows_data(self, fast, never):
        resolved = resolve(with_range(fast_mode=fast, init_from_data=never))
        assert resolved.init_from_data == 0

    @pytest.mark.parametrize(
        ("kind", "per_channel"),
        [("LAYER_GAUSSIAN", False), ("LAYER_GAUSSIAN_PER_CHANNEL", True)],
    )
    def test_a_gaussian_type_without_sigma_chooses_the_bound_alone(self, kind, per_channel):
        resolved = resolve(make(clip__type=kind))
        assert (resolved.clip_sigma, resolved.bound_per_channel) == (0.0, per_channel)
        assert resolved.is_identity

    def test_accepts_what_as_config_accepts(self):
        foreign = lightning.TorchInferenceRPUConfig()
        foreign.mapping.max_input_size = 512
        assert resolve(foreign) == resolve({"mapping": {"max_input_size": 512}})

    def test_leaves_the_config_as_it_is(self):
        config = make(modifier__type="ADD_NORMAL", modifier__std_dev=0.1)
        before = copy.deepcopy(config)
        with pytest.warns(DeprecationWarning, match="noise_type = ADD_NORMAL"):
            assert resolve(config).noise_std == 0.1
        assert config == before


class TestBits:
    @pytest.mark.parametrize(("width", "steps"), [(2, 2), (3, 6), (4, 14), (8, 254), (12, 4094)])
    def test_levels_are_the_codes_but_one(self, width, steps):
        assert analogfx.bits(width) == steps
        levels = {round(value * steps / 2) for value in (-1.0, 0.0, 1.0)}
        assert levels == {-(2 ** (width - 1) - 1), 0, 2 ** (width - 1) - 1}

    @pytest.mark.parametrize("width", [1, 0, -8, 25, pytest.param(10**5000, id="long")])
    def test_other_widths_are_refused(self, width):
        with pytest.raises(ValueError, match="expected 2 to 24 bits"):
            analogfx.bits(width)

    @pytest.mark.parametrize("width", [8.0, "8", None])
    def test_other_types_are_refused(self, width):
        with pytest.raises(TypeError):
            analogfx.bits(width)

    @pytest.mark.parametrize("path", ["forward__inp_res", "forward__out_res"])
    def test_a_resolution_that_looks_like_bits_is_doubted(self, path):
        (sentence,) = own.doubts(make(**{path: 8}))
        assert path.replace("__", ".") in sentence and "analogfx.bits(8), that is 254" in sentence

    @pytest.mark.parametrize("path", ["forward__inp_res", "forward__out_res"])
    def test_an_odd_count_of_steps_is_doubted(self, path):
        (sentence,) = own.doubts(make(**{path: 255}))
        assert "is odd" in sentence and "analogfx.bits(8), that is 254" in sentence

    @pytest.mark.parametrize("value", [-1, 0, 0.125, 2, 3, 4, 6, 7, 14, 15, 16, 62, 254, 256])
    def test_other_resolutions_are_not(self, value):
        assert own.doubts(make(forward__inp_res=value)) == []

    def test_eight_weight_states_are_usual(self):
        assert own.doubts(make(modifier__res=8)) == []
