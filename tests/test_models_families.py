"""config.json of every family: both spellings, defaults, and no field overlooked."""

import json
import pathlib

import pytest

from jaxpref.models import PRESETS, LongScaling, hf, preset
from jaxpref.models.families import FAMILIES, family_of
from jaxpref.models.fields import Fields

HF = pathlib.Path(__file__).parent / 'testdata' / 'hf'
NAMES = sorted(folder.name for folder in HF.iterdir())


def source(name):
  return json.loads((HF / name / 'config.json').read_text())


def read(name, tmp_path, drop=(), **changes):
  """The config of a fixture's config.json with fields changed."""
  fields = {k: v for k, v in (source(name) | changes).items() if k not in drop}
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  return hf.read_config(tmp_path)[0]


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_has_a_family_that_holds_it(name):
  config = preset(name)
  family = FAMILIES[family_of(config)]
  assert family.read(Fields(json.loads(json.dumps(family.write(config))))) == config


def test_the_presets_are_of_every_family():
  found = {family_of(preset(name)) for name in PRESETS}
  assert found == set(FAMILIES) - {'phi3'}  # whose plain models are Mistral's too


@pytest.mark.parametrize('name', NAMES)
def test_an_unknown_field_is_refused_and_a_harmless_one_is_not(name, tmp_path):
  plain = hf.read_config(HF / name)[0]
  harmless = dict(use_cache=False, attention_dropout=0.1, transformers_version='4.0', odd=None)
  assert read(name, tmp_path, **harmless) == plain
  with pytest.raises(ValueError, match=r'unknown to this family: residual_multiplier = 0\.22;'):
    read(name, tmp_path, residual_multiplier=0.22)


@pytest.mark.parametrize('name', NAMES)
def test_what_a_family_writes_is_read_back_as_the_fixture(name):
  config = hf.read_config(HF / name)[0]
  family = FAMILIES[source(name)['model_type']]
  again = family.read(Fields(json.loads(json.dumps(family.write(config)))))
  assert again == type(config)(**{**vars(config), 'num_labels': 0})


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('llama', dict(num_hidden_layers=10**9), 'num_hidden_layers = 1000000000 is not a whole numb'),
    ('llama', dict(hidden_size=32.5), 'hidden_size = 32.5 is not a whole number'),
    ('llama', dict(vocab_size=True), 'vocab_size = True is not a whole number'),
    ('llama', dict(is_decoder=True), 'is_decoder = True is not supported here; only off is'),
    ('llama', dict(use_bidirectional_attention=True), 'use_bidirectional_attention = True'),
    ('mistral', dict(attention_bias=True), 'attention_bias = True is not supported here'),
    ('mistral', dict(layer_types=['full_attention']), 'unknown to this family: layer_types'),
    ('mixtral', dict(mlp_bias=True), 'mlp_bias = True is not supported'),
    ('mixtral', dict(num_experts_per_tok=9), r'experts_per_token must be 1 to 5'),
    ('qwen2', dict(layer_types=['chunked_attention'] * 2), "layer_types = 'chunked_attention'"),
    ('qwen3_moe', dict(decoder_sparse_step=2), 'decoder_sparse_step = 2 is not supported'),
    ('qwen3_moe', dict(mlp_only_layers=[0]), r'mlp_only_layers = \[0\] is not supported'),
    ('qwen3_moe', dict(max_window_layers=1), 'max_window_layers = 1 is not supported'),
    ('gemma', dict(hidden_activation='tanh'), "hidden_activation = 'tanh' is not supported"),
    ('gemma2', dict(use_bidirectional_attention=True), 'use_bidirectional_attention = True'),
    ('gemma2', dict(sliding_window_size=9), 'sliding_window_size = 9 is not supported; .* be 6'),
    ('gemma3', dict(attn_logit_softcapping=5.0), 'attn_logit_softcapping = 5.0 is not supported'),
    ('gemma3', dict(rope_parameters={'factor': 2}), 'rope_parameters has no factor'),
    ('phi3', dict(lm_head_bias=True), 'lm_head_bias = True is not supported'),
    ('phi3_long', dict(rope_scaling={'rope_type': 'longrope'}), "'short_factor' is missing"),
    ('phi3_long', dict(partial_rotary_factor=0.5), 'turns 2 pairs of channels; it has 3 short'),
    ('phi3_long', dict(partial_rotary_factor=1.5), 'rope needs an even head_dim'),
    ('olmo2', dict(clip_qkv=8.0), 'unknown to this family: clip_qkv = 8.0'),
    ('olmo2', dict(partial_rotary_factor=0.5), 'partial_rotary_factor = 0.5 is not supported'),
    ('gpt2_scores', dict(architectures=['GPT2DoubleHeads']), 'GPT2DoubleHeads.*and their ...ForS'),
  ],
)
def test_a_switch_that_the_decoder_lacks_is_refused(name, changes, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    read(name, tmp_path, **changes)
  assert str(tmp_path) in str(error.value)


def test_both_spellings_are_the_same_config(tmp_path):
  older = dict(
    rope_theta=500.0,
    rope_scaling={'type': 'linear', 'factor': 2.0},
    torch_dtype='float32',
  )
  newer = dict(
    rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 500.0}, dtype='float32'
  )
  for name in ('llama', 'mistral', 'gemma2', 'olmo2', 'mixtral'):
    drop = ('rope_parameters', 'dtype')
    bare = {k: v for k, v in source(name).items() if k not in drop}
    (tmp_path / 'config.json').write_text(json.dumps(bare | older))
    config = hf.read_config(tmp_path)[0]
    assert config == read(name, tmp_path, **newer) and config.rope.theta == 500.0


def test_gemma3s_local_rope_has_both_spellings(tmp_path):
  linear = {'rope_type': 'linear', 'factor': 8.0}
  full, local = dict(linear, rope_theta=7e5), dict(rope_type='default', rope_theta=30.0)
  newer = dict(rope_parameters={'full_attention': full, 'sliding_attention': local})
  older = dict(rope_theta=7e5, rope_local_base_freq=30.0, rope_scaling=linear)
  drop = ('rope_theta', 'rope_local_base_freq', 'rope_scaling')
  config = read('gemma3_pattern', tmp_path, drop, **newer)
  assert config == read('gemma3_pattern', tmp_path, **older)
  assert (config.rope.theta, config.local_rope.theta) == (7e5, 30.0)
  assert config.rope.scaling.factor == 8.0 and config.local_rope.scaling is None


def test_defaults_are_those_of_transformers(tmp_path):
  assert read('llama', tmp_path, ['head_dim']).head_dim == 8  # hidden_size / heads
  assert read('qwen3', tmp_path, ['head_dim']).head_dim == 128
  assert read('gemma', tmp_path, ['head_dim']).head_dim == 256
  assert read('mistral', tmp_path, ['sliding_window']).windows == (4096, 4096)
  assert read('mistral', tmp_path, sliding_window=None).windows is None
  assert read('gemma3', tmp_path, ['layer_types']).windows == (5, 5, 5)  # the sixth is full
  assert read('gemma', tmp_path, ['tie_word_embeddings']).tied
  assert not read('llama', tmp_path, ['tie_word_embeddings']).tied
  assert read('gemma2', tmp_path, ['attn_logit_softcapping']).attention_cap == 50.0
  assert read('gemma2', tmp_path, attn_logit_softcapping=None).attention_cap is None
  assert read('gpt2_scores', tmp_path, ['id2label', 'label2id']).num_labels == 2


def test_longrope_has_an_amplitude_of_its_own_or_by_its_lengths(tmp_path):
  scaling = read('phi3_long', tmp_path).rope.scaling
  assert isinstance(scaling, LongScaling)
  assert scaling.amplitude == pytest.approx(1.2247449)  # √(1 + ln(512 / 64) / ln 64) = √1.5
  given = source('phi3_long')['rope_scaling'] | {'attention_factor': 1.1}
  assert read('phi3_long', tmp_path, rope_scaling=given).rope.scaling.amplitude == 1.1
  assert read('phi3_long', tmp_path, max_position_embeddings=64).rope.scaling.amplitude == 1.0
  su = {k: v for k, v in source('phi3_long')['rope_scaling'].items() if k != 'rope_type'}
  assert read('phi3_long', tmp_path, rope_scaling=su | {'type': 'su'}).rope.scaling == scaling
