"""Configs: presets, derived fields, and refusals that say what would work."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxpref.models import (
  PRESETS,
  Config,
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  Model,
  Rope,
  preset,
)

# Published parameter counts (unique weights), from the models' cards.
PARAMETERS = {
  'gpt2': 124_439_808,
  'llama3-8b': 8_030_261_248,
  'llama3.1-8b': 8_030_261_248,
  'llama3.1-70b': 70_553_706_496,
  'llama3.2-1b': 1_235_814_400,
  'qwen2.5-0.5b': 494_032_768,
  'qwen3-0.6b': 596_049_920,
  'qwen3-8b': 8_190_735_360,
  'qwen3-30b-a3b': 30_532_122_624,
  'llama2-7b': 6_738_415_616,
  'mistral-7b': 7_241_732_096,
  'mixtral-8x7b': 46_702_792_704,
  'gemma-2b': 2_506_172_416,
  'gemma2-2b': 2_614_341_888,
  'gemma3-1b': 999_885_952,
  'phi3-mini': 3_821_079_552,
  'olmo2-7b': 7_298_617_344,
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
    (lambda: preset('tiny', rope=Rope(fraction=0.2)), 'of which 0.2 are 3 channels'),
    (
      lambda: preset('tiny', rope=Rope(scaling=LongScaling((1.0,), (1.0,), 8))),
      'turns 8 pairs of channels; it has 1 short factors',
    ),
    (
      lambda: preset('tiny', windows=(4, None), local_rope=Rope(fraction=0.5)),
      'turns the same fraction',
    ),
    (lambda: preset('tiny', num_experts=4), r'experts_per_token must be 1 to 4 \(num_experts\)'),
    (
      lambda: preset('tiny', num_experts=4, experts_per_token=1, gated=False),
      'experts are gated and without bias',
    ),
    (lambda: preset('tiny', qk_norm_span='row'), 'qk_norm_span must be one of'),
    (lambda: preset('tiny', windows=(4,)), r'one entry per layer \(2\), got 1'),
    (lambda: preset('tiny', activation='swiglu'), "activation must be one of .* got 'swiglu'"),
    (lambda: preset('tiny', norm='batch'), 'norm must be one of'),
    (lambda: preset('tiny', norm_placement='in'), 'norm_placement must be one of'),
    (lambda: preset('tiny', num_layers=0), 'num_layers must be at least 1'),
    (lambda: Model(preset('tiny'), remat='most'), "remat must be None or one of .* got 'most'"),
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


def test_long_scaling_divides_grows_and_ends():
  scaling = LongScaling((1.0, 2.0, 4.0, 8.0), (9.0,) * 4, 64, amplitude=1.5)
  rope = Rope(100.0, scaling)
  divided = Rope(100.0).frequencies(8) / np.array([1, 2, 4, 8])
  np.testing.assert_allclose(rope.frequencies(8), divided, rtol=1e-6)
  cos, sin = rope.angles(np.arange(66), 8)
  np.testing.assert_allclose(np.hypot(cos, sin)[:64], 1.5, rtol=1e-6)
  assert np.isnan(cos[64:]).all() and np.isnan(sin[64:]).all()
  assert preset('tiny', head_dim=8, rope=rope).position_limit == 64
  assert preset('tiny').position_limit is None and preset('gpt2').position_limit == 1024


def test_flops_count_two_per_weight_and_four_per_key_and_channel():
  model = Model(preset('tiny'))
  # q and out 64x64, k and v 64x32, three MLP matrices 64x176, two layers.
  weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
  assert model.flops_per_token(0) == 2 * weights
  assert model.flops_per_token(10) - model.flops_per_token(0) == 4 * 10 * 64 * 2
  windowed = Model(preset('tiny', windows=(4, None)))
  assert windowed.flops_per_token(10) - windowed.flops_per_token(0) == 4 * (4 + 10) * 64
  assert model.head_flops_per_token == 2 * 64 * 259
  experts = Model(preset('tiny', num_experts=8, experts_per_token=2))
  router_and_one_more_mlp = 2 * (64 * 8 + 3 * 64 * 176)
  assert experts.flops_per_token(0) == 2 * (weights + router_and_one_more_mlp)
