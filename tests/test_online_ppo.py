"""Runs with PPO: a critic from a reward model's folder, resumed in the middle, and the config."""

import json
import shutil

import jax
import numpy as np
import pytest
import rich.console

from configs import ppo
from jaxpref import config, models, online, program, run, sharding
from jaxpref.objectives import parse
from jaxpref.rollout import estimators
from jaxpref.train import critics, policy
from tests.test_rollout_ppo import OBJECTIVE, PARAMS, POLICY, TOKENIZER, T
from tests.vocabularies import merging

QUIET = rich.console.Console(quiet=True)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A tiny Hugging Face model, a reward model trained from it for a step, and prompts."""
  path = tmp_path_factory.mktemp('stages')
  models.save_hf(path / 'hf', POLICY, PARAMS, TOKENIZER)
  pairs = [{'prompt': f'{n} is', 'chosen': ' a', 'rejected': ' b'} for n in range(40)]
  (path / 'pairs.jsonl').write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
  c = settings(path, objective='bradley_terry()', model=str(path / 'hf'), steps=2)
  c.update({'rewards': '', 'data': {'kind': 'preference'}, 'batch': {'size': 8}})
  run.train(c, path / 'rm', console=QUIET)
  return path


def settings(path, **changes):
  c = config.default()
  c.objective = OBJECTIVE
  c.rewards = 'length_penalty(target=3)'
  c.data.train = f'jsonl:{path / "pairs.jsonl"}'
  c.data.max_length = 32
  c.optimizer.learning_rate = 1e-2
  c.optimizer.eps = 1e-5
  c.log.tensorboard = False
  c.rollout.update(dict(prompts=16, samples=2, max_new_tokens=T, epochs=2, minibatches=2, show=0))
  c.rollout.advantages = 'gae()'
  c.update(changes)
  return c


@pytest.mark.parametrize('critic', ['rm', pytest.param('shared', marks=pytest.mark.slow)])
def test_a_run_resumes_in_the_middle_of_a_rollouts_passes(folders, tmp_path, critic):
  c = settings(folders, model=str(folders / 'hf'), steps=6)
  c.rollout.critic = str(folders / 'rm') if critic == 'rm' else critic
  c.rollout.kl, c.rollout.kl_target = 0.1, 0.5
  c.log.entropy = True
  c.checkpoint.every, c.checkpoint.keep_last = 3, 9  # a rollout is 4 steps
  whole = run.train(c, tmp_path / 'whole', console=QUIET)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'killed')
  shutil.rmtree(tmp_path / 'killed' / 'checkpoints' / '6')
  resumed = run.train(c, tmp_path / 'killed', console=QUIET)
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (whole.state, resumed.state)))
  ours, theirs = (
    [json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
    for name in ('whole', 'killed')
  )
  assert [line['step'] for line in ours] == [line['step'] for line in theirs] == [*range(1, 7)]
  timed = ('second', 'data_wait', 'mfu')
  for one, other in zip(ours, theirs, strict=True):
    assert {'entropy', 'value/explained_variance'} <= one.keys()
    for name in one:
      assert one[name] == other[name] or any(word in name for word in timed), name
  assert 'sampling/logp_difference/max' in ours[0] and 'kl_coef' in ours[4]


def test_a_critic_begins_as_a_reward_model(folders):
  c = settings(folders, model=str(folders / 'hf'), steps=1)
  c.rollout.critic = str(folders / 'rm')
  mesh = sharding.make_mesh({'fsdp': -1})
  feed = online.prepare(c, parse(c.objective), TOKENIZER, mesh, QUIET)
  params = feed.load()
  _, rewards = policy.load(str(folders / 'rm'), TOKENIZER)
  jax.tree.map(np.testing.assert_array_equal, params['critic'], rewards)
  assert np.abs(params['critic']['score']['w']).max() > 0
  jax.tree.map(np.testing.assert_allclose, params['policy'], PARAMS)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'objective': 'ppo_clip()'}, r'nothing in objective=ppo_clip\(.*add 0.1\*value_loss'),
    ({'rollout': {'advantages': 'group_baseline()'}}, 'has no returns'),
    (
      {'objective': 'grpo()', 'rollout': {'advantages': 'group_baseline()', 'critic': 'shared'}},
      'nothing reads values',
    ),
    ({'rollout': {'importance_cap': 0.5}}, 'give 1 or more'),
  ],
)
def test_what_does_not_go_together_is_said(folders, tmp_path, changes, message):
  c = settings(folders, model=str(folders / 'hf'))
  c.update(changes)
  with pytest.raises(ValueError, match=message):
    run.train(c, tmp_path / 'w', console=QUIET)


@pytest.mark.parametrize('kind', ['workdir', 'folder'])
def test_a_critic_with_another_tokenizer_is_refused_wherever_it_comes_from(folders, tmp_path, kind):
  theirs = merging(tmp_path / 'tokenizer')  # 'ab' is one of its tokens
  spec = folders / 'rm'
  if kind == 'folder':
    spec = tmp_path / 'hf'
    model, params = policy.load_scored(str(folders / 'rm'), TOKENIZER)
    models.save_hf(spec, model, params, TOKENIZER)
  critics.check(str(spec), TOKENIZER)
  with pytest.raises(ValueError, match=r'another tokenizer .* a critic reads token ids'):
    critics.check(str(spec), theirs)
  critics.check('preset:tiny', theirs)  # a preset takes the policy's


@pytest.mark.parametrize('arg', ['', 'tiny'])
def test_the_config_is_ppo_as_recommended(arg):
  c = ppo.get_config(arg)
  objective, estimator = parse(c.objective), estimators.parse(c.rollout.advantages)
  assert {'old_logps', 'advantages', 'values', 'returns'} <= objective.fields
  assert (estimator.gamma, estimator.lam) == (1.0, 0.95)
  assert program.optimizer_scalars(c.optimizer, 10)['eps'] == 1e-5
  policy_term, value_term = objective.parts
  warm = [n for n in range(30) if policy_term.scale(n) == 0]
  assert warm == [*range(len(warm))] and 0 < len(warm) < 30
  assert value_term.scale == 0.1
  critics.check_values(c.rollout, objective, estimator)
  online.check_rewards(c.rollout, estimator)
  with pytest.raises(ValueError, match="knows the arguments '' and 'tiny', not '8b'"):
    ppo.get_config('8b')


@pytest.mark.slow
def test_the_tiny_config_learns_from_scratch(tmp_path):
  c = ppo.get_config('tiny')
  c.log.tensorboard = False
  trained = run.train(c, tmp_path / 'w', console=QUIET)
  first = json.loads((tmp_path / 'w' / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['reward/mean'] < 0.25 < 0.4 < trained.metrics['eval/reward/mean/low']
  assert trained.metrics['eval/win_rate/low'] > 0.6
