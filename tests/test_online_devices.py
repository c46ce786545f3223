"""Where samples, log-probs and scores are made does not matter: who has devices of its own."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import rich.console

from jaxpref import config, models, online, rewards, roles, run, sharding
from jaxpref.data import load_tokenizer
from jaxpref.objectives import parse
from jaxpref.rollout.reward_models import RewardModel

BYTES = load_tokenizer('byte')
SHAPE = models.preset('tiny', width=32, mlp_width=48, num_layers=1)
QUIET = rich.console.Console(file=io.StringIO())


def settings(tmp_path, **changes):
  data = tmp_path / 'prompts.jsonl'
  data.write_text(''.join(json.dumps({'prompt': f'{n} is'}) + '\n' for n in range(40)))
  c = config.default()
  c.objective = 'grpo()'
  c.rewards = 'length_penalty(target=3)'
  c.data.train = f'jsonl:{data}'
  c.data.eval_fraction = 0.2
  c.data.max_length = 16
  c.steps = 3
  c.optimizer.learning_rate = 1e-2
  c.log.tensorboard = False
  c.update(
    {'rollout': {'prompts': 8, 'samples': 4, 'max_new_tokens': 6, 'show': 0}, 'mesh': {'fsdp': -1}}
  )
  c.update(changes)
  return c


def trained(tmp_path, name, **changes):
  c = settings(tmp_path, **changes)
  return run.train(c, tmp_path / name, console=QUIET)


def lines(tmp_path, name):
  text = (tmp_path / name / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


RUNS = {'whole': 0, 'adapted': 2}  # rank of a reward model's adapters


def learnt(tmp_path, name, rank):
  """The workdir of a reward model's run from tmp_path / 'rm'."""
  file = tmp_path / 'pairs.jsonl'
  pair = {'chosen': 'ab', 'rejected': 'b'}
  file.write_text(''.join(json.dumps({'prompt': f'{n}:', **pair}) + '\n' for n in range(16)))
  c = config.default()
  c.update({'model': str(tmp_path / 'rm'), 'objective': 'bradley_terry()', 'steps': 2})
  c.update({'data': {'train': f'jsonl:{file}'}, 'batch': {'size': 8}, 'lora': {'rank': rank}})
  c.log.tensorboard = False
  run.train(c, tmp_path / name, console=QUIET)
  return tmp_path / name


@pytest.mark.slow
def test_roles_may_have_devices_of_their_own(tmp_path):
  """Reference, reward model and sampler each apart, and all on the devices that train."""
  models.save_hf(tmp_path / 'hf', *models.init(SHAPE, jax.random.key(0)), BYTES)
  scored = dataclasses.replace(SHAPE, num_labels=1)
  models.save_hf(tmp_path / 'rm', *models.init(scored, jax.random.key(1)), BYTES)
  runs = {name: f"reward_model('{learnt(tmp_path, name, rank)}')" for name, rank in RUNS.items()}
  common = {
    'model': str(tmp_path / 'hf'),
    'objective': 'grpo() + 0.1*kl()',
    'rewards': f"reward_model('{tmp_path / 'rm'}') + mean({', '.join(runs.values())})",
  }
  here = trained(tmp_path, 'here', **common, mesh={'data': 4, 'fsdp': 2})
  own = {'devices': 1, 'reference_devices': 2, 'reward_devices': 1}
  there = trained(tmp_path, 'there', **common, mesh={'data': 2, 'fsdp': 2}, rollout=own)
  for name in ('eval/reward/mean', 'eval/win_rate'):
    np.testing.assert_allclose(here.metrics[name], there.metrics[name], rtol=1e-4)
  compared = 0
  for ours, theirs in zip(lines(tmp_path, 'here'), lines(tmp_path, 'there'), strict=True):
    for name in ('loss', 'kl', 'reward/mean', 'completions/mean_length', 'grad_norm'):
      if name in ours:
        compared += 1
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
  assert compared >= 15


def test_every_role_is_where_it_should_be(tmp_path, monkeypatch):
  c = settings(tmp_path, rollout={'devices': 3, 'reference_devices': 2, 'reward_devices': 1})
  devices = roles.trainers(c, jax.devices())
  assert list(devices) == jax.devices()[:2]
  found = roles.divide(c, sharding.make_mesh({'fsdp': -1}, devices))
  assert str(found) == 'training 2, reference 2, rewards 1, sampler 3'
  assert [d for mesh in found for d in mesh.devices.flat] == jax.devices()
  assert sharding.groups(found.sampler) == 3 and found.sampler.shape['data'] == 3
  assert found.reference.shape['fsdp'] == 2
  c.rollout.update({'devices': 0, 'reference_devices': 0, 'reward_devices': 0})
  assert roles.trainers(c, jax.devices()) == jax.devices()
  mesh = sharding.make_mesh()
  assert all(one is mesh for one in roles.divide(c, mesh))
  c.update({'rewards': '', 'rollout': {'devices': 8}})
  assert roles.trainers(c, jax.devices()) == jax.devices()  # without rewards there are no roles


def test_a_reward_model_within_other_rewards_has_work_for_its_devices(tmp_path):
  c = settings(tmp_path, rollout={'reward_devices': 1, 'prompts': 7})
  own = roles.divide(c, sharding.make_mesh({'fsdp': -1}, roles.trainers(c, jax.devices())))
  model, params = models.init(dataclasses.replace(SHAPE, num_labels=2), jax.random.key(0))
  made = {'judge': lambda: RewardModel(model, params, BYTES, own.rewards)}
  checked = (own, online.rounds_of(c, 1), False, parse('grpo()'))
  terms = rewards.parse('length_penalty() + 2*cosine_length(mean(judge()), limit=4)', made)
  online.check_roles(*checked, terms)
  with pytest.raises(ValueError, match='no reward is a model'):
    online.check_roles(*checked, terms[:1])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rollout': {'devices': 8}}, 'leave at least one to train'),
    (
      {'rollout': {'devices': 4, 'reference_devices': 4}},
      'rollout.devices=4 of 8 devices',
    ),
    ({'rollout': {'reference_devices': -1}}, 'leave at least one to train'),
    ({'rollout': {'reward_devices': 4}}, 'no reward is a model'),
    ({'rollout': {'reference_devices': 4}}, 'nothing reads a reference'),
    (
      {'objective': 'grpo() + full_kl()', 'rollout': {'reference_devices': 4}},
      "'reverse_kl'.* compare whole",
    ),
    (
      {'objective': 'grpo() + kl()', 'rollout': {'reference_devices': 3, 'prompts': 10}},
      r'multiple of minibatches \* microbatches \* reference_devices = 1 \* 1 \* 3',
    ),
  ],
)
def test_devices_without_work_are_said(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run.train(settings(tmp_path, **changes), tmp_path / 'w', console=QUIET)
  assert not (tmp_path / 'w').exists()
