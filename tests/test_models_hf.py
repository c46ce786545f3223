"""Hugging Face folders: transformers' logits, byte-equal round trips, refusals by name.

The folders in testdata/hf are made by tools/make_hf_fixtures.py.
"""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref.models import Model, Rope, load_hf, mask_layout, preset, save_hf
from jaxpref.models.families import FAMILIES, family_of
from jaxpref.models.fields import Fields
from jaxpref.sampling import Sampling, sample
from tests.hf_folders import FIXTURES, FOLDERS, ROOT, copy, fields, weights

EVERY = pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
SLOW = pytest.mark.slow
DECODERS, CLASSIFIERS = (
  pytest.mark.parametrize(
    'folder',
    [folder for folder in FOLDERS if folder.name.endswith('_scores') == scores],
    ids=lambda folder: folder.name,
  )
  for scores in (False, True)
)
SMALL = dict(
  vocab_size=9,
  width=16,
  embed_scale=4.0,
  num_layers=2,
  num_heads=4,
  mlp_width=12,
  windows=(7, None),
)


def assert_bytes_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
    assert a[name].tobytes() == b[name].tobytes(), name


def tolerance(logits):
  return 2e-5 * max(1.0, np.abs(logits).max())


@DECODERS
def test_logits_are_those_of_transformers(folder):
  model, params = load_hf(folder)
  expected = load_file(folder / 'expected.safetensors')
  for side in ('right', 'left'):
    tokens, mask, logits = (expected[f'{x}_{side}'] for x in ('tokens', 'mask', 'logits'))
    got = np.asarray(model.logits(params, jnp.array(tokens), jnp.array(mask)))
    assert np.abs(got - logits)[mask].max() <= tolerance(logits[mask]), side


@pytest.mark.parametrize(
  'folder',
  [
    pytest.param(folder, marks=() if folder.name in ('gpt2', 'gemma3', 'qwen3_moe') else SLOW)
    for folder in FOLDERS
    if not folder.name.endswith('_scores')
  ],
  ids=lambda folder: folder.name,
)
def test_greedy_generation_is_that_of_transformers(folder):
  model, params = load_hf(folder)
  expected = load_file(folder / 'expected.safetensors')
  prompts, mask = jnp.array(expected['prompts']), jnp.array(expected['mask_prompts'])
  greedy = Sampling(temperature=0.0)
  samples = sample(model, params, prompts, mask, seed=0, max_new_tokens=32, sampling=greedy)
  np.testing.assert_array_equal(samples.tokens, expected['generated'])


@CLASSIFIERS
def test_scores_are_those_of_transformers(folder):
  model, params = load_hf(folder)
  expected = load_file(folder / 'expected.safetensors')
  for side in ('right', 'left'):
    tokens, mask, scores = (expected[f'{x}_{side}'] for x in ('tokens', 'mask', 'logits'))
    states = model.hidden(params, jnp.array(tokens), mask_layout(jnp.array(mask)))
    last = tokens.shape[1] - 1 - mask[:, ::-1].argmax(1)
    got = model.scores(params, states[np.arange(len(last)), last])
    assert got.dtype == jnp.float32 and got.shape == (3, params['score']['w'].shape[1])
    assert np.abs(np.asarray(got) - scores).max() <= tolerance(scores), side
  with pytest.raises(ValueError, match=r'no language-model head; model.scores'):
    model.unembed(params, states)


@EVERY
def test_a_folder_comes_out_as_it_went_in(folder, tmp_path):
  save_hf(tmp_path, *load_hf(folder))
  assert_bytes_equal(weights(tmp_path), weights(folder))
  assert fields(tmp_path) == fields(folder)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    ('gpt2', 'bfloat16'),
    ('qwen3', 'float16'),
    ('phi3', 'float16'),
    ('mixtral', 'bfloat16'),
    ('gemma2_scores', 'bfloat16'),
  ],
)
def test_sharded_low_precision_folders_come_out_as_they_went_in(name, dtype, tmp_path):
  folder = FIXTURES[name]
  low = {name: x.astype(jnp.dtype(dtype)) for name, x in weights(folder).items()}
  source = copy(folder, tmp_path / 'source', tensors=low, dtype=dtype)
  model, params = load_hf(source)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
  sharded = tmp_path / 'sharded'
  sharded.mkdir()
  (sharded / 'model.safetensors').write_bytes(b'an older model')
  save_hf(sharded, model, params, shard_bytes=20_000)
  index = json.loads((sharded / 'model.safetensors.index.json').read_text())
  files = {file.name for file in sharded.glob('*.safetensors')}
  assert files == set(index['weight_map'].values()) and len(files) > 2
  assert all(file.stat().st_size < 25_000 for file in sharded.glob('*.safetensors'))
  assert index['metadata']['total_size'] == sum(x.nbytes for x in low.values())
  assert_bytes_equal(weights(sharded), low)
  again = load_hf(sharded)[1]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
  save_hf(sharded, model, again)  # and back to one file, with no shard left behind
  assert [file.name for file in sharded.glob('*.safetensors*')] == ['model.safetensors']
  assert_bytes_equal(weights(sharded), low)
  assert load_hf(sharded, dtype=jnp.float32)[1]['embed']['w'].dtype == jnp.float32


def test_a_tied_folder_may_store_its_head_too(tmp_path):
  folder, tensors = FIXTURES['llama_tied'], weights(FIXTURES['llama_tied'])
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  model, params = load_hf(copy(folder, tmp_path, tensors=tensors))
  assert 'head' not in params and model.config.tied
  tensors['lm_head.weight'] = tensors['lm_head.weight'] + 1
  with pytest.raises(ValueError, match=r'lm_head\.weight differs from model\.embed_tokens\.weight'):
    load_hf(copy(folder, tmp_path, tensors=tensors))


def test_gpt2_may_lack_its_prefix_and_store_its_masks(tmp_path):
  folder = FIXTURES['gpt2']
  tensors = {n.removeprefix('transformer.'): x for n, x in weights(folder).items()}
  for layer in range(2):
    tensors[f'h.{layer}.attn.bias'] = np.tril(np.ones((1, 1, 40, 40), np.float32))
    tensors[f'h.{layer}.attn.masked_bias'] = np.array(-1e4, np.float32)
  params = load_hf(copy(folder, tmp_path, tensors=tensors))[1]
  expected = load_hf(folder)[1]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected))


def test_a_changed_model_keeps_what_still_holds_of_its_config_json(tmp_path):
  model, params = load_hf(FIXTURES['llama'])
  rope = dataclasses.replace(model.config.rope, theta=9.0)
  config = dataclasses.replace(model.config, rope=rope, max_positions=80)
  save_hf(tmp_path, model.replace(config=config), params)
  after, before = fields(tmp_path), fields(FIXTURES['llama'])
  assert (after['rope_theta'], after['max_position_embeddings']) == (9.0, 80)
  assert 'rope_parameters' not in after and after['eos_token_id'] == before['eos_token_id']
  assert load_hf(tmp_path)[0].config == config


@pytest.mark.parametrize(
  ('config', 'family'),
  [
    (preset('tiny', windows=None), 'llama'),
    (preset('tiny', qkv_bias=True, windows=(None, 7)), 'qwen2'),
    (preset('tiny', qk_norm=True, windows=(7, None)), 'qwen3'),
    (preset('gpt2', width=8, num_heads=2, num_layers=1, mlp_width=12, vocab_size=9), 'gpt2'),
    (preset('tiny', windows=(7, 7)), 'mistral'),
    (preset('tiny', num_experts=3, experts_per_token=2, normalize_experts=True), 'mixtral'),
    (preset('tiny', num_experts=3, experts_per_token=2, qk_norm=True), 'qwen3_moe'),
    (preset('tiny', rope=Rope(fraction=0.5), num_labels=4), 'phi3'),
    (preset('tiny', norm_placement='post', qk_norm=True, qk_norm_span='all'), 'olmo2'),
    (preset('tiny', norm_offset=1.0, embed_scale=8.0), 'gemma'),
    (preset('gemma2-2b', **SMALL), 'gemma2'),
    (preset('gemma3-1b', **SMALL, num_labels=1), 'gemma3_text'),
  ],
)
def test_a_model_from_scratch_is_saved_as_the_family_that_holds_it(config, family, tmp_path):
  class Tokenizer:
    bos_id, eos_id, pad_id = None, 256, 258

    def save(self, folder):
      (folder / 'tokenizer.json').write_text('{}')

  model = Model(config)
  params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), model.param_shapes())
  save_hf(tmp_path / 'new', model, params, Tokenizer())
  again, loaded = load_hf(tmp_path / 'new')
  assert again.config == config and (tmp_path / 'new' / 'tokenizer.json').exists()
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, loaded))
  saved = fields(tmp_path / 'new')
  assert (saved['model_type'], saved['eos_token_id'], saved['bos_token_id']) == (family, 256, None)
  assert saved['torch_dtype'] == 'float32'


@pytest.mark.parametrize('name', FAMILIES)
def test_every_preset_of_a_family_survives_config_json(name):
  for preset_name in ('gpt2', 'llama3-8b', 'llama3.2-1b', 'qwen2.5-0.5b', 'qwen3-8b', 'small'):
    config = preset(preset_name)
    if family_of(config) == name:
      fields = Fields(json.loads(json.dumps(FAMILIES[name].write(config))))
      assert FAMILIES[name].read(fields) == config


SCRIPT = """
import sys, numpy, torch, transformers
from safetensors.torch import load_file
for folder, fixture in zip(sys.argv[1::2], sys.argv[2::2]):
  auto = transformers.AutoModelForCausalLM
  if fixture.endswith('_scores'):
    auto = transformers.AutoModelForSequenceClassification
  model, info = auto.from_pretrained(
    folder, output_loading_info=True, dtype=torch.float32, attn_implementation='eager')
  assert not info['missing_keys'] and not info['unexpected_keys'], (folder, info)
  model.config.pad_token_id = 0  # a tokenizer's to say, and there is none
  expected = load_file(fixture + '/expected.safetensors')
  mask = expected['mask_right']
  with torch.no_grad():
    output = model.eval()(expected['tokens_right'].long(), attention_mask=mask.long())
  error = (output.logits - expected['logits_right']).abs()
  print(folder, error[mask].max().item() if error.ndim == 3 else error.max().item())
"""


@pytest.mark.slow
def test_transformers_opens_what_we_save(tmp_path):
  python = ROOT.parent / '.venv-fixtures' / 'bin' / 'python'
  if not python.exists():
    pytest.skip('no transformers: tools/make_hf_fixtures.py makes .venv-fixtures')
  arguments = []
  for folder in FOLDERS:
    model, params = load_hf(folder)
    plain = model.replace(config=dataclasses.replace(model.config, source=''))
    for name, saved, size in (('kept', model, 10**9), ('new', plain, 40_000)):
      target = tmp_path / f'{folder.name}_{name}'
      save_hf(target, saved, params, shard_bytes=size)
      arguments += [str(target), str(folder)]
  run = subprocess.run([python, '-c', SCRIPT, *arguments], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  errors = [float(line.split()[-1]) for line in run.stdout.splitlines()]
  assert len(errors) == 2 * len(FOLDERS) and max(errors) < 1e-5
