import gc
import weakref

import pytest
import torch
from compiled import DYNAMO_CONFIGS, QUIET
from samples import CONFIGS, Deep, merged, mlp

from analogfx.backend.configs import Configs, configs_of, refuse_learned
from analogfx.config import resolve
from analogfx.errors import ConfigError


def test_one_config_is_that_of_every_module():
    model = mlp()
    configs = Configs(QUIET, model)
    assert configs.for_all is not None
    assert configs.of(model.first).resolved == resolve(QUIET)


def test_patterns_choose_by_module_and_by_weight():
    model = Deep()
    configs = Configs({"head": None, "layers.*.up": QUIET}, model)
    up, down = model.layers[0]["up"], model.layers[0]["down"]
    assert configs.for_all is None
    assert configs.of(up).resolved == resolve(QUIET)
    assert (configs.of(down).resolved, configs.of(model.head).resolved) == (None, None)
    assert configs.of(model.head).asked
    assert configs.same(up.weight, resolve(QUIET))
    assert not configs.same(down.weight, resolve(QUIET))


def test_a_module_outside_the_model_stays_digital():
    configs = Configs({"first": QUIET}, mlp())
    chosen = configs.of(torch.nn.Linear(2, 2))
    assert chosen.resolved is None and "not part of the compiled model" in chosen.reason


def test_configs_are_resolved_once_for_a_model_until_its_modules_change():
    model, rules = mlp(), {"*": QUIET}
    first = configs_of(rules, model)
    assert configs_of(rules, model) is first
    assert configs_of({"*": QUIET}, model) is not first
    model.third = torch.nn.Linear(4, 4)
    assert configs_of(rules, model).of(model.third).resolved == resolve(QUIET)


def test_a_model_is_not_kept_alive():
    model = mlp()
    configs = configs_of({"*": QUIET}, model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None and not configs.by_module


@pytest.mark.parametrize(
    ("config", "training", "fields"),
    [
        (CONFIGS["static range"], False, ["pre_post.input_range.learn_input_range"]),
        (CONFIGS["fast"], True, ["pre_post.input_range.learn_input_range"]),
        (CONFIGS["learned clip"], False,
         ["pre_post.input_range.learn_input_range", "clip.type"]),
        (CONFIGS["gaussian clip"], True,
         ["pre_post.input_range.learn_input_range", "clip.sigma"]),
    ],
)  # fmt: skip
def test_what_an_optimizer_must_own_is_refused_by_field(config, training, fields):
    with pytest.raises(ConfigError) as caught:
        refuse_learned(resolve(config), "layer.weight", training)
    assert [conflict.field for conflict in caught.value.conflicts] == fields
    assert "layer.weight" in str(caught.value)


@pytest.mark.parametrize("config", DYNAMO_CONFIGS)
def test_what_statistics_set_is_not(config):
    refuse_learned(resolve(merged(DYNAMO_CONFIGS[config])), "layer.weight", training=True)
