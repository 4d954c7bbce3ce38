from analogfx import recipes
from analogfx.config import resolve


def test_afm_runs_and_says_what_was_published():
    resolved = resolve(recipes.afm())
    assert (resolved.inp_res, resolved.out_res, resolved.out_bound) == (254, 254, 14)
    assert resolved.out_noise == 0
    assert (resolved.clip_sigma, resolved.clip_per_channel) == (2.5, True)
    assert (resolved.noise_std, resolved.noise_per_channel) == (0.03, True)
    assert resolved.weight_states == 0
    assert (resolved.range_mode, resolved.learn_range) == ("static", True)
    assert (resolved.init_value, resolved.init_from_data, resolved.init_std_alpha) == (3, 500, 18)
    assert (resolved.decay, resolved.input_min_percentage) == (0.01, 0.95)
    assert (resolved.max_input_size, resolved.max_output_size) == (-1, -1)


def test_afm_returns_a_config_of_its_own():
    changed = recipes.afm()
    changed.mapping.max_input_size = 512
    assert recipes.afm().mapping.max_input_size == -1
