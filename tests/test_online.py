"""`run.train` with rewards: it learns, resumes in the middle of a rollout, and says what it did."""

import dataclasses
import io
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import rich.console
from ml_collections import ConfigDict

from jaxpref import config, online, rewards, run, sharding
from jaxpref.data import load_tokenizer
from jaxpref.objectives import parse
from jaxpref.rollout.tables import Tables
from jaxpref.train.loop import fit
from jaxpref.train.writers import read_metrics

GPT2 = str(pathlib.Path(__file__).parent / 'testdata' / 'hf' / 'gpt2')  # of 96 tokens
QUIET = rich.console.Console(quiet=True)


def digits(prompts, completions, records):
  """The share of a completion that is digits."""
  return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def longer(prompts, firsts, seconds):
  return [(1 + np.sign(len(a) - len(b))) / 2 for a, b in zip(firsts, seconds, strict=True)]


longest = rewards.win_rate(longer)
JUDGE = "user('tests.test_online:longest')"


@pytest.fixture
def data(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps({'prompt': f'{n} is'}) + '\n' for n in range(40)))
  return path


def tiny(data, **changes) -> ConfigDict:
  c = config.default()
  c.objective = 'grpo()'
  c.rewards = "user('tests.test_online:digits')"
  c.data.train = f'jsonl:{data}'
  c.data.max_length = 16
  c.steps = 2
  c.optimizer.learning_rate = 1e-2
  c.optimizer.schedule = 'constant'
  c.rollout.prompts = 16  # of two minibatches on eight devices
  c.rollout.samples = 4
  c.rollout.max_new_tokens = 4
  c.rollout.show = 0
  c.log.tensorboard = False
  c.update_from_flattened_dict(changes)
  return c


def test_a_reward_that_is_easily_had_is_learnt(tmp_path, data):
  c = tiny(data, steps=40, **{'rollout.samples': 16, 'data.eval_fraction': 0.2})
  trained = run.train(c, tmp_path / 'w', console=QUIET)
  lines = [line for line in read_metrics(tmp_path / 'w' / 'metrics.jsonl') if 'loss' in line]
  assert lines[0]['reward/mean'] < 0.1 and lines[-1]['reward/mean'] > 0.5
  assert all(0 < line['sampling/logp_difference/max'] < 1e-3 for line in lines)
  assert trained.metrics['eval/reward/mean'] > 0.5
  assert 'eval/win_rate' not in trained.metrics  # there is no reference


@pytest.mark.parametrize(
  'changes',
  [
    {'objective': 'ppo_clip() + 0.1*value_loss()', 'rollout.advantages': 'gae()'},
    {'rollout.ahead': 1, 'rollout.epochs': 1},
    {'rollout.tries': 2, 'rollout.target_kl': 1e-4},
  ],
)
@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_a_rollout(tmp_path, data, changes, monkeypatch):
  """Seven steps are three, which end inside the passes over a rollout, and four."""
  base = {'rollout.epochs': 2, 'rollout.minibatches': 2}
  base |= {'rollout.kl': 0.1, 'rollout.kl_target': 1.0, 'steps': 7}
  c = tiny(data, **{**base, **changes})
  whole = run.train(c, tmp_path / 'whole', console=QUIET)
  with monkeypatch.context() as patch:
    patch.setattr(run, 'fit', lambda r, state: fit(dataclasses.replace(r, stop=3), state))
    assert run.train(c, tmp_path / 'parts', console=QUIET).state.step == 3
  parts = run.train(c, tmp_path / 'parts', console=QUIET)
  assert parts.state.step == 7
  jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
  measured = [
    [
      {name: value for name, value in line.items() if 'second' not in name and name != 'data_wait'}
      for line in read_metrics(tmp_path / name / 'metrics.jsonl')
    ]
    for name in ('whole', 'parts')
  ]
  assert measured[0] == measured[1]


def test_divergences_over_the_vocabulary_have_their_reference(tmp_path, data):
  c = tiny(data, objective='grpo() + 0.5*full_kl(name="all") + 0.5*kl(name="drawn")')
  run.train(c, tmp_path / 'w', console=QUIET)
  first, second = (
    line for line in read_metrics(tmp_path / 'w' / 'metrics.jsonl') if 'loss' in line
  )
  assert (
    abs(first['loss/all']) < 1e-6 and abs(first['loss/drawn']) < 1e-6
  )  # the policy is the reference
  assert second['loss/all'] > 1e-5


def test_metrics_of_a_rollout_come_with_its_first_step(tmp_path, data):
  more = {'rollout.minibatches': 2, 'steps': 4, 'data.eval_fraction': 0.2, 'eval.every': 2}
  c = tiny(data, objective='grpo() + 0.1*kl()', rewards="user('tests.rollouts:digest')", **more)
  trained = run.train(c, tmp_path / 'w', console=QUIET)
  lines = [line for line in read_metrics(tmp_path / 'w' / 'metrics.jsonl') if 'loss' in line]
  of_rollouts = {
    'reward/mean',
    'reward/std',
    'rewards/digest/mean',
    'completions/mean_length',
    'completions/clipped_ratio',
    'frac_reward_zero_std',
    'kl',
    'rollout/seconds',
  }
  assert [of_rollouts <= line.keys() for line in lines] == [True, False, True, False]
  assert lines[0]['kl'] == pytest.approx(0, abs=1e-4) and lines[2]['kl'] != 0
  assert all(line['policy/ratio'] == pytest.approx(1, abs=1e-4) for line in lines[::2])
  assert lines[1]['policy/ratio'] != 1
  found = trained.metrics
  assert found['eval/win_rate/low'] <= found['eval/win_rate'] <= found['eval/win_rate/high']
  assert (
    found['eval/reward/mean/low'] <= found['eval/reward/mean'] <= found['eval/reward/mean/high']
  )
  lines = [
    line for line in read_metrics(tmp_path / 'w' / 'metrics.jsonl') if 'eval/win_rate' in line
  ]
  assert [line['step'] for line in lines] == [2, 4]


@pytest.mark.slow
def test_a_judge_scores_samples_in_training_and_held_out_ones(tmp_path, data):
  """Of every pair one side wins, so the mean win rate of a group is 1/2."""
  changes = {'data.eval_fraction': 0.2, 'eval.samples': 3, 'steps': 1}
  trained = run.train(tiny(data, rewards=JUDGE, **changes), tmp_path / 'w', console=QUIET)
  first = read_metrics(tmp_path / 'w' / 'metrics.jsonl')[0]
  assert first['rewards/longest/scored'] == 1 and first['frac_reward_zero_std'] < 1
  assert first['reward/mean'] == pytest.approx(0.5)
  assert trained.metrics['eval/reward/mean'] == pytest.approx(0.5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rewards': 'exact()'}, 'exact_match'),
    ({'rewards': "user('tests.test_online:letters')"}, 'letters'),
    ({'rollout.advantages': 'gea()'}, "'gae'"),
    ({'rollout.samples': 1}, 'take at least 2'),
    ({'rewards': JUDGE, 'data.eval_fraction': 0.2}, 'eval.samples=1: take at least 2'),
    ({'rewards': JUDGE, 'rollout.advantages': 'remax()'}, 'scores one greedy completion alone'),
    (
      {'rewards': JUDGE, 'rollout.samples': 1, 'rollout.advantages': 'whitened_returns()'},
      'longest.* compares .* rollout.samples=1',
    ),
    ({'rollout.kl_target': 3.0}, 'give it a first value'),
    ({'rollout.prompts': 24, 'rollout.minibatches': 2}, 'multiple of minibatches'),
    ({'rollout.temperature': -1.0}, r'rollout\.temperature must be'),
    ({'eval.temperature': -1.0}, r'eval\.temperature must be'),
    ({'eval.samples': 0}, r'eval\.samples must be a number at least 1, got 0'),
    ({'rollout.slots': -3}, r'rollout\.slots must be a number at least 0, got -3'),
    ({'rollout.max_new_tokens': 0}, r'rollout\.max_new_tokens must be'),
    ({'rollout.minibatches': 0}, r'rollout\.minibatches must be'),
    ({'rollout.missing_eos': -3.0}, r'rollout\.missing_eos must be'),
    ({'rollout.timeout': 0.0}, r'rollout\.timeout must be a number above 0'),
    ({'rollout.kl': float('nan')}, r'rollout\.kl must be'),
    ({'rollout.target_kl': 0.1}, 'rollout.epochs=1: take more'),
    ({'rollout.advantages': 'each_reward()', 'rollout.kl': 0.1}, r'come of rollout\.kl=0\.1: set'),
    (
      {'rollout.samples': 1, 'rollout.advantages': 'plain_returns()', 'rollout.tries': 2},
      'looks for prompts whose samples differ',
    ),
    ({'data.train': ''}, 'config.data.train is empty'),
    ({'data.max_length': 2}, r'raise data\.max_length'),
    ({'data.eval_fraction': 1.0}, 'leaves 0 prompts'),
    ({'batch.row_lengths': (8,)}, 'rows of 8 tokens do not hold'),
    ({'reference': 'live', 'reference_sync.every': 2}, 'it stands still'),
    (
      {'model': 'preset:gpt2', 'rollout.max_new_tokens': 2000},
      r'prompts\.jsonl:1: the prompt has 5 tokens and 2000 .* the model knows 1024 positions',
    ),
    ({'model': GPT2, 'tokenizer': 'byte'}, 'tokenizer has 259 tokens, the model .* only 96'),
    ({'rollout.stop': ('',)}, 'stop strings are a list of texts that are not empty'),
    (
      {
        'objective': 'ppo_clip() + value_loss()',
        'rollout.critic': 'preset:tinny',
        'rollout.advantages': 'gae()',
      },
      'tiny',
    ),
  ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, data, changes, message):
  with pytest.raises((ValueError, ImportError), match=message):
    run.train(tiny(data, **changes), tmp_path / 'w', console=QUIET)
  assert not (tmp_path / 'w').exists()


def test_a_held_out_prompt_that_is_too_long_is_named_too(tmp_path, data):
  held = tmp_path / 'held.jsonl'
  held.write_text(json.dumps({'prompt': 'x' * 1022}) + '\n')  # and one for the bos
  more = {'model': 'preset:gpt2', 'data.eval': f'jsonl:{held}', 'data.max_length': 2000}
  with pytest.raises(ValueError, match=r'held\.jsonl:1: the prompt has 1023 tokens'):
    run.train(tiny(data, **more), tmp_path / 'w', console=QUIET)
  assert not (tmp_path / 'w').exists()


def test_a_critic_stands_in_the_plan_of_memory(data):
  c = tiny(data, objective='ppo_clip() + value_loss()', **{'rollout.advantages': 'gae()'})
  tokenizer, mesh = load_tokenizer('byte'), sharding.make_mesh({'fsdp': -1})
  feed = online.prepare(c, parse(c.objective), tokenizer, mesh, QUIET)
  (line,) = (line for line in feed.summary if 'MiB' in line)
  said = {name: float(mib) for name, mib in re.findall(r'(\w+) ([0-9.]+)[,;]', line)}
  sizes = {
    name: sum(x.size for x in jax.tree.leaves(shapes)) * 4 / 2**20
    for name, shapes in feed.model.param_shapes().items()
  }
  assert said['critic'] == pytest.approx(sizes['critic'], abs=0.05)
  assert said['parameters'] == pytest.approx(sizes['policy'], abs=0.05)
  assert said['optimizer'] == pytest.approx(2 * sum(sizes.values()), abs=0.05)


def test_what_a_person_sees(tmp_path, data):
  told = io.StringIO()
  letters = tuple('abcdefghijklmnopqrstuvwxyz')
  c = tiny(data, **{'rollout.show': 1, 'data.eval_fraction': 0.2, 'rollout.stop': letters})
  run.train(c, tmp_path / 'w', console=rich.console.Console(file=told, width=200))
  text = told.getvalue()
  for part in (
    'held out; at most 6 tokens',
    "rewards    user('tests.test_online:digits'); advantages group_baseline()",
    'rollouts   16 prompts x 4 samples of at most 4 tokens',
    'memory     MiB: parameters',
    'cache of 64 slots',
    'reward 0.',
    'eval/reward/mean 0.',
    " is' -> '",
  ):
    assert part in text, text
  (first, *_) = read_metrics(tmp_path / 'w' / 'metrics.jsonl')
  assert 0.3 < first['completions/clipped_ratio'] < 0.9  # (1 - 29 / 259)⁴ = 0.62 of random bytes
  lines = [json.loads(line) for line in (tmp_path / 'w' / 'samples.jsonl').read_text().splitlines()]
  assert [line['rollout'] for line in lines] == [0] * 12 + [1] * 12  # of 3 prompts, 4 samples each
  for line in lines:
    assert line['prompt'].endswith(' is')
    assert not set(line['completion']) & set(letters)  # stop strings are no part of what is scored
    assert line['reward'] == pytest.approx(digits(None, [line['completion']], None)[0])


def test_samples_that_a_killed_run_had_not_saved_are_written_once(tmp_path):
  tables = Tables(2, QUIET)
  ask = (['p', 'q'], [['é', 'b'], ['c', 'd']], np.array([[0.5, 1.0], [2.0, 3.0]]))
  tables(0, *ask)  # before there is a folder
  tables.open(tmp_path, 0)
  for rollout in (0, 1, 2, 4):
    tables(rollout, *ask)
  file = tmp_path / 'samples.jsonl'
  whole = file.read_text()
  assert [json.loads(line)['rollout'] for line in whole.splitlines()] == [0] * 4 + [2] * 4 + [4] * 4
  assert json.loads(whole.splitlines()[0]) == {
    'rollout': 0, 'prompt': 'p', 'completion': 'é', 'reward': 0.5,
  }  # fmt: skip
  file.write_text(whole + '{"rollout": 6, "pro')
  again = Tables(2, QUIET)
  again.open(tmp_path, 3)
  again(4, *ask)
  assert file.read_text() == whole
