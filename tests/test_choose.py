import copy

import pytest
import torch
from samples import COARSE, TILES, Deep, analog_names, merged, statuses

import analogfx
from analogfx import recipes
from analogfx.choose import LONGEST_KEY
from analogfx.errors import ConfigError

CHOICES = {
    "exact": ({"head": COARSE}, {"head"}),
    "glob": ({"layers.*.up": COARSE}, {"layers.0.up", "layers.1.up", "layers.2.up"}),
    "glob of a set": (
        {"layers.[01].*": COARSE}, {f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "down")}),
    "a regular expression": (
        {r"re:layers\.(0|2)\.down": COARSE}, {"layers.0.down", "layers.2.down"}),
    "a name covers what is inside": ({"layers.0": COARSE}, {"layers.0.up", "layers.0.down"}),
    "first match wins": ({"layers.0.*": None, "layers.*": COARSE},
                         {f"layers.{i}.{n}" for i in (1, 2) for n in ("up", "down")}),
    "first match wins, the other way": ({"*": COARSE, "head": None}, {
        "head", *(f"layers.{i}.{n}" for i in range(3) for n in ("up", "down"))}),
    "no pattern": ({}, set()),
    "a callable": (
        lambda name, module: COARSE if name.endswith("up") and module.in_features == 4 else None,
                   {"layers.0.up", "layers.1.up", "layers.2.up"}),
    "None": (None, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_patterns(name):
    choice, expected = CHOICES[name]
    analog = analogfx.analogize(Deep(), choice, strict=True)
    assert set(analog_names(analog)) == expected
    assert {site for site, status in statuses(analog).items() if status == "analog"} == expected


@pytest.mark.parametrize("key", ["hea", "re:hea", "re:head.+", "layers.0.u"])
def test_a_pattern_that_matches_nothing_is_a_warning(key):
    with pytest.warns(
        UserWarning, match=f"the pattern {key!r} matches no module".replace("+", r"\+")
    ):
        analog = analogfx.analogize(Deep(), {key: COARSE})
    assert analog_names(analog) == []


def test_layers_may_have_different_configs():
    analog = analogfx.analogize(Deep(1), {"head": merged(COARSE, TILES), "*": recipes.afm()})
    assert analog.head._analog.config.forward.inp_res == 6
    assert len(analog.head.input_range) == 1 and analog.head._analog.sites[0].out_sizes == (2, 2)
    assert analog.layers[0]["up"]._analog.config.forward.inp_res == 254


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"layers.*": COARSE}, "no pattern of the config matches"),
        ({"he?d": None, "*": COARSE}, "left digital by the pattern 'he?d'"),
        (lambda name, module: None if name == "head" else COARSE, "left digital by the config"),
    ],
)
def test_the_report_says_who_left_a_layer_digital(choice, reason):
    analog = analogfx.analogize(Deep(1), choice)
    (site,) = (s for s in analogfx.report(analog).sites if s.name == "head")
    assert (site.status, site.reason, site.asked) == ("digital", reason, True)


BAD_CHOICES = {
    "not a name": ({3: COARSE}, "rpu_config = 3: expected a module name"),
    "a bad regular expression": ({"re:(": COARSE}, "a regular expression"),
    "a recipe that was not called": (
        recipes.afm, "expected afm(), with parentheses, or a callable of (name, module)"),
    "a callable of one": (lambda name: None, "expected a callable of (name, module)"),
    "an expression of 10 MB": ({"re:" + "x" * 10_000_000: COARSE}, "at most 10,000 characters"),
    "a glob of 10 MB": ({"x" * 10_000_000: COARSE}, "at most 10,000 characters, not 10,000,000"),
    "a pattern longer by one": ({"x" * (LONGEST_KEY + 1): COARSE}, "not 10,001"),
    "nested too deep": ({"re:" + "(" * 9_000: COARSE}, "a regular expression"),
    "a field of 10 MB": ({"forward": {"x" * 10_000_000: 3}}, "a field of IOParameters"),
    "a value of 10 MB": ({"forward": {"inp_res": "x" * 10_000_000}}, "a value of type float"),
    "a thousand unknown fields": ({"forward": {f"f{i}": 1 for i in range(1000)}}, "950 more"),
    "no config": ("afm", "TorchInferenceRPUConfig"),
    "no config in a pattern": ({"head": 3}, "head: rpu_config"),
    "an unknown field": ({"forward": {"inp_re": 3}}, "did you mean 'inp_res'"),
    "a config that cannot run": ({"forward": {"inp_res": 6}}, "forward.inp_res = 6.0: expected"),
    "a config that cannot run, for a layer": (
        {"head": {"forward": {"inp_res": 6}}}, "head: forward.inp_res"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", BAD_CHOICES)
def test_bad_choices_are_refused_before_anything_is_touched(name, inplace):
    choice, message = BAD_CHOICES[name]
    model = Deep(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as caught:
        analogfx.analogize(model, choice, inplace=inplace)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 10_000
    assert not analog_names(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_longest_pattern_that_matches_nothing_is_a_short_warning():
    with pytest.warns(UserWarning, match="matches no module") as told:
        analogfx.analogize(Deep(1), {"x" * LONGEST_KEY: COARSE})
    assert len(str(told[0].message)) < 1000


def test_a_resolution_that_looks_like_bits_is_a_warning():
    config = {"forward": {"inp_res": 8}, "pre_post": {"input_range": {"enable": True}}}
    with pytest.warns(UserWarning, match=r"forward.inp_res = 8 .* analogfx.bits\(8\)"):
        analogfx.analogize(Deep(1), config)


@pytest.mark.parametrize(
    "choice",
    [lambda name, module, more=None: None, lambda *args: None],
    ids=["a default", "any number"],
)
def test_whatever_takes_two_arguments_is_a_callable(choice):
    assert analog_names(analogfx.analogize(Deep(1), choice)) == []


def test_an_expression_that_takes_for_ever_is_stopped():
    model = torch.nn.ModuleDict({"a" * 60 + "c": torch.nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="within 1 s: avoid repeats inside repeats"):
        analogfx.analogize(model, {"re:(a|aa)+$": COARSE})
