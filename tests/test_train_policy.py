"""What a config or a flag calls a model: presets, Hugging Face folders, runs."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxpref import models
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.train import policy
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.workdir import open_workdir

BYTES = load_tokenizer('byte')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A Hugging Face folder with a model of one layer and the byte tokenizer."""
  path = tmp_path_factory.mktemp('hf')
  model = models.Model(models.preset('tiny', width=16, mlp_width=32, num_layers=1))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4'), model.param_shapes())
  models.save_hf(path, model, jax.tree.map(jax.numpy.asarray, params), BYTES)
  return str(path)


def test_a_preset_takes_the_vocabulary_of_its_tokenizer():
  model, params, tokenizer = policy.load_policy('preset:tiny')
  assert model.config == models.preset('tiny', vocab_size=tokenizer.vocab_size)
  assert params['embed']['w'].shape[0] == tokenizer.vocab_size == BYTES.vocab_size


@pytest.mark.parametrize('base', ['preset:tiny', 'folder', 'run'])
def test_a_workdir_gives_its_newest_checkpoint(base, folder, tmp_path):
  spec = {'folder': folder, 'run': str(tmp_path / 'base')}.get(base, base)
  if base == 'run':  # a run that began with another run's model
    other = open_workdir(spec, {'model': folder, 'tokenizer': ''}).path
    Checkpoints(other).close()
  config = {'model': spec, 'tokenizer': ''}
  run_folder = open_workdir(tmp_path / 'run', config).path
  shapes = models.Model(policy.architecture(spec, BYTES)).param_shapes()
  checkpoints = Checkpoints(run_folder)
  for step in (1, 2):
    full = partial(np.full, fill_value=step, dtype='f4')
    checkpoints.save(step, {'params': jax.tree.map(lambda x, full=full: full(x.shape), shapes)})
  checkpoints.close()
  model, params, tokenizer = policy.load_policy(str(run_folder))
  assert tokenizer.fingerprint == BYTES.fingerprint
  assert model.config.vocab_size == BYTES.vocab_size
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
  assert all((x == 2).all() for x in jax.tree.leaves(params))
