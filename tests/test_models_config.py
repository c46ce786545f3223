"""Configs: presets, derived fields, and refusals that say what would work."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxpref.models import PRESETS, Config, LinearScaling, Llama3Scaling, Model, Rope, preset

# Published parameter counts (unique weights), from the models' cards.
PARAMETERS = {
  'gpt2': 124_439_808,
  'llama3-8b': 8_030_261_248,
  'llama3.2-1b': 1_235_814_400,
  'qwen2.5-0.5b': 494_032_768,
  'qwen3-0.6b': 596_049_920,
  'qwen3-8b': 8_190_735_360,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
  assert count(Model(preset(name))) == PARAMETERS[name]


def count(model):

  return sum(x.size for x in jax.tree.leaves(model.param_shapes()))


def test_presets_are_hashable_and_differ():
  assert len({preset(name) for name in PRESETS}) == len(PRESETS)
  assert preset('tiny', vocab_size=300).vocab_size == 300
  assert preset('tiny').vocab_size == 259


def test_the_source_text_is_no_part_of_a_configs_identity():
  config = preset('tiny')
  other = dataclasses.replace(config, source='{}')
  assert config == other and hash(config) == hash(other)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: preset('lama3-8b'), "did you mean 'llama3-8b'"),
    (lambda: preset('tiny', vocabsize=3), "did you mean 'vocab_size'"),
    (lambda: preset('tiny', num_kv_heads=3), 'num_heads 4 is not a multiple of num_kv_heads 3'),
    (lambda: preset('tiny', num_heads=5, num_kv_heads=5), 'give head_dim'),
    (lambda: preset('tiny', head_dim=7), 'even head_dim, got 7'),
    (lambda: preset('tiny', windows=(4,)), r'one entry per layer \(2\), got 1'),
    (lambda: preset('tiny', activation='swiglu'), "activation must be one of .* got 'swiglu'"),
    (lambda: preset('tiny', norm='batch'), 'norm must be one of'),
    (lambda: preset('tiny', norm_placement='in'), 'norm_placement must be one of'),
    (lambda: preset('tiny', num_layers=0), 'num_layers must be at least 1'),
    (lambda: Model(preset('tiny'), remat='dots'), "remat must be None or one of .* got 'dots'"),
  ],
)
def test_a_wrong_config_says_what_would_work(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_windows_of_none_are_no_windows():
  assert preset('tiny', windows=(None, None)) == preset('tiny')


def test_key_heads_default_to_heads():
  config = Config(vocab_size=5, width=8, num_layers=1, num_heads=2, mlp_width=4)
  assert (config.num_kv_heads, config.head_dim) == (2, 4)


def test_linear_scaling_divides_every_frequency():
  plain, scaled = Rope(100.0), Rope(100.0, LinearScaling(4.0))
  np.testing.assert_allclose(scaled.frequencies(8), plain.frequencies(8) / 4, rtol=1e-6)


def test_llama3_scaling_keeps_fast_divides_slow_and_is_monotone_between():
  scaling = Llama3Scaling(factor=8.0, low_factor=1.0, high_factor=4.0, original_max_positions=64)
  plain, scaled = Rope(1e4).frequencies(64), Rope(1e4, scaling).frequencies(64)
  turns = 64 * plain / (2 * np.pi)
  np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
  np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
  ratio = scaled / plain
  assert ((turns > 1) & (turns < 4)).any() and np.all(np.diff(ratio) <= 1e-6)


def test_flops_count_two_per_weight_and_four_per_key_and_channel():
  model = Model(preset('tiny'))
  # q and out 64x64, k and v 64x32, three MLP matrices 64x176, two layers.
  weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
  assert model.flops_per_token(0) == 2 * weights
  assert model.flops_per_token(10) - model.flops_per_token(0) == 4 * 10 * 64 * 2
  windowed = Model(preset('tiny', windows=(4, None)))
  assert windowed.flops_per_token(10) - windowed.flops_per_token(0) == 4 * (4 + 10) * 64
  assert model.head_flops_per_token == 2 * 64 * 259
