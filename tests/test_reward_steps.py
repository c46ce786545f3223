"""Process reward models in rollouts: every step's verdict, made one number."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpref import config as configs
from jaxpref import models, rewards, sharding
from jaxpref.rollout.reward_models import RewardModel
from jaxpref.rollout.steps import REDUCTIONS, Steps, last, least, product
from jaxpref.train import policy
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.reward_models import makers, process_reward_model, reward_model
from jaxpref.train.workdir import open_workdir
from tests.test_reward_models import BYTES

MESH = sharding.make_mesh()
SHAPE = models.preset('tiny', width=32, mlp_width=48, num_layers=1)


def judge(steps, heads=1):
  model = models.Model(dataclasses.replace(SHAPE, num_labels=heads))
  _, params = models.init(model.config, jax.random.key(0))
  params = {**params, 'score': {'w': 3 * jax.random.normal(jax.random.key(1), (32, heads))}}
  return RewardModel(model, params, BYTES, MESH, steps=steps)


@functools.partial(jax.jit, static_argnums=0)
def score(model, params, tokens):
  layout = models.mask_layout(jnp.ones(tokens.shape, bool))
  return model.scores(params, model.hidden(params, tokens, layout))


def by_hand(reward, text, ends):
  """σ(score) after each of `ends` characters of `text`, read alone and whole: [ends, heads]."""
  read = [BYTES.bos_id, *BYTES.encode(text)]
  tokens = np.array([read + [0] * (32 - len(read))], np.int32)
  scores = np.asarray(score(reward.model, reward.params, tokens)[0], np.float64)
  return 1 / (1 + np.exp(-scores[ends]))  # the token of character n stands after bos, at n


@pytest.mark.parametrize(('name', 'heads'), [('min', 1), ('product', 2), ('last', 1)])
def test_a_reward_is_the_verdicts_on_the_steps_made_one(name, heads):
  reward = judge(Steps(REDUCTIONS[name]), heads)
  completions = ['ab\nc\n', 'abc', '\n\nx\n \ny', 'one\ntwo\nthree\n', '']
  found = reward(['p:'] * 5, completions, [{}, {'finished': False}, {}, {}, {}])
  ends = [[5, 7], [6], [6, 10], [6, 10, 16]]  # characters of 'p:' + the completion + a last newline
  combine = {
    'min': lambda p: np.min(p, 0),
    'product': lambda p: np.exp(np.log(p).sum(0)),
    'last': lambda p: p[-1],
  }[name]
  for text, where, score in zip(completions, ends, found, strict=False):
    text = text if text.endswith('\n') else text + '\n'
    want = combine(by_hand(reward, f'p:{text}', where))
    np.testing.assert_allclose(score, want if heads > 1 else want[0], rtol=1e-4)
  assert 'there is no step' in str(found[-1]) and isinstance(found[-1], ValueError)


@given(st.lists(st.text('ab ', max_size=4), max_size=5), st.sampled_from(['\n', '\n\n', ';']))
def test_steps_are_what_stands_between_separators(parts, separator):
  text = separator.join(parts)
  whole = [part for part in parts if part.strip()]
  steps = Steps(least, separator)
  if not whole:
    with pytest.raises(ValueError, match='no step'):
      steps.divide(text)
    return
  laid_out, ends = steps.divide(text)
  assert laid_out in (text, text + '\n') and len(ends) == len(whole)
  pieces = [laid_out[a:b] for a, b in zip((0, *ends), ends, strict=False)]
  for piece, part in zip(pieces, whole, strict=True):
    assert piece.replace(separator, '').strip() == part.strip()
  assert laid_out[ends[-1] :].replace(separator, '').strip() == ''


def test_reductions_by_hand():
  p = np.array([[0.5, 0.9], [0.8, 0.1], [0.4, 0.5]])
  np.testing.assert_allclose(least(p), [0.4, 0.1])
  np.testing.assert_allclose(product(p), [0.16, 0.045])
  np.testing.assert_allclose(last(p), [0.4, 0.5])


def test_a_config_names_one(tmp_path):
  trained = judge(None)
  models.save_hf(tmp_path / 'prm', trained.model, trained.params, BYTES)
  text = f"process_reward_model('{tmp_path / 'prm'}', reduce=product, step='b')"
  (term,) = rewards.parse(text, more=makers(MESH, BYTES))
  assert term.name == 'process_reward_model' and term.reward.steps == Steps(product, 'b')
  assert str(term) == f"process_reward_model({str(tmp_path / 'prm')!r}, reduce='product', step='b')"
  asked = ['0:'], ['aabab'], [{}]
  want = dataclasses.replace(trained, steps=Steps(product, 'b'))(*asked)
  np.testing.assert_allclose(term.reward(*asked), want, rtol=1e-5)
  assert 0 < term.reward(*asked)[0] < 1 and math.isfinite(term.reward(*asked)[0])
  with pytest.raises(ValueError, match='reduce is one of min, product, last'):
    rewards.parse(text.replace('product', 'max'), more=makers(MESH, BYTES))


def workdir(folder, model, objective):
  """That of a run with `objective`, which left the parameters of `model`."""
  models.save_hf(folder / 'hf', model.model, model.params, BYTES)
  c = configs.default()
  c.update({'model': str(folder / 'hf'), 'objective': objective})
  open_workdir(folder / 'run', c)
  policy.remember(folder / 'run', c.model, BYTES)
  checkpoints = Checkpoints(folder / 'run')
  checkpoints.save(1, {'params': model.params})
  checkpoints.close()
  return str(folder / 'run')


def test_scores_are_read_where_they_were_learnt(tmp_path):
  """A run says what it was trained to judge; of a loss of one's own nothing is known."""
  model = judge(None)
  whole, steps = reward_model, process_reward_model
  for objective, fit, unfit in (
    ('bradley_terry(centring=0.01)', (whole,), (steps,)),
    ('2.0*process_reward() ', (steps,), (whole,)),
    ('of_my_own()', (whole, steps), ()),
  ):
    path = workdir(tmp_path / objective[:5], model, objective)
    for make in fit:
      assert (make(path).steps is None) == (make is whole)
    for make in unfit:
      with pytest.raises(ValueError, match=f'learnt to judge .*; use {fit[0].__name__}\\('):
        make(path)
