"""Plans: arithmetic on shapes against numbers by hand; what is compiled against the arithmetic."""

import dataclasses
import json

import jax
import pytest

from jaxpref import models
from jaxpref.cli import configs
from jaxpref.cli import main as cli
from jaxpref.data import load_tokenizer
from jaxpref.plan import batch, chips, planned, report
from tests.plans import LENGTHS, TINY


def plan(topology='v5e:2x4', lengths=LENGTHS, analytic=True, **values):
  config = planned.with_values(configs.load('dpo'), TINY | values)
  return planned.make(config, chips.parse(topology), lengths, analytic=analytic)


def test_state_is_counted_to_the_byte():
  """Llama-3-8B in 64 shards: 4 bytes a master weight, 8 for Adam's moments, or 4 in bfloat16."""
  count = 8_030_261_248
  norms = 32 * 2 * 4096 + 4096  # not divided
  share = (count - norms) / 64 + norms
  found = plan('v5e:8x8', model='preset:llama3-8b', **{'batch.size': 64})
  assert found.parameters == count
  assert found.memory['parameters'] == 4 * share
  assert found.memory['optimizer'] == pytest.approx(8 * share, abs=64)  # and its counters
  found = plan(
    'v5e:8x8', model='preset:llama3-8b', **{'batch.size': 64, 'optimizer.dtype': 'bfloat16'}
  )
  assert found.memory['optimizer'] == pytest.approx(4 * share, abs=64)


def test_a_live_reference_is_a_part_and_on_the_host_is_none():
  table, live = plan(), plan(reference='live')
  assert 'reference' not in table.memory and table.host == 0
  assert live.memory['reference'] == live.memory['parameters']
  host = plan(reference='live', reference_memory='host')
  assert 'reference' not in host.memory and host.host == host.memory['parameters']


@pytest.mark.parametrize('remat', ['', 'dots', 'full', 'offload'])
def test_remat_trades_memory_for_arithmetic(remat):
  order = ['', 'dots', 'full', 'offload']
  less = plan(remat=order[max(0, order.index(remat) - 1)])
  this = plan(remat=remat)
  assert this.memory['activations'] <= less.memory['activations']
  assert this.flops >= less.flops
  assert this.useful == less.useful


def test_tokens_are_counted_once_and_cost_follows_the_price():
  found = plan()
  assert found.tokens == 16 * 96 and found.examples == 16
  config = planned.with_values(configs.load('dpo'), TINY)
  priced = planned.make(config, chips.parse('v5e:2x4'), LENGTHS, analytic=True, price=2.0)
  dollars = 2.0 * 8 * priced.seconds / 3600  # for 16 pairs
  assert priced.cost_per_million == pytest.approx(dollars / 16 * 1e6)
  assert found.cost_per_million is None


def test_the_step_is_compiled_and_counted(monkeypatch):
  """The same path as for two slices of TPUs, with this machine's devices in their place."""
  monkeypatch.setattr(chips, 'devices', lambda topology, slices: jax.devices()[:8])
  monkeypatch.setattr(chips, 'versions', dict)
  estimated, found = (
    plan('v5e:2x2', analytic=analytic, **{'mesh.slices': 2}) for analytic in (True, False)
  )
  assert found.source == 'compiled'
  assert found.useful == estimated.useful
  assert found.useful < found.flops < 2 * estimated.flops
  state = found.memory['parameters'] + found.memory['optimizer']
  assert state == estimated.memory['parameters'] + estimated.memory['optimizer']
  assert state <= found.donated < 1.01 * state + 1000  # and not held twice
  assert found.memory['batch and outputs'] < state
  assert found.messages['all-gather'][1] > 0
  assert found.wire > 0 and found.traffic > 0
  # Here gradients are summed in float32, those of the embedding and the norms whole.
  assert found.messages['all-reduce between slices'][1] > 0
  assert estimated.far < found.far < 4 * estimated.far


@pytest.mark.slow
def test_an_online_run_is_compiled_with_its_sampler(monkeypatch):
  monkeypatch.setattr(chips, 'devices', lambda topology, slices: jax.devices()[:8])
  monkeypatch.setattr(chips, 'versions', dict)
  values = {'rollout.prompts': 16, 'rollout.minibatches': 2, 'batch.row_lengths': ()}
  config = planned.with_values(configs.load('ppo:tiny'), TINY | values | {'rollout.kl': 0.1})
  found = planned.make(config, chips.parse('v5e:2x4'), LENGTHS)
  assert found.examples == 8  # a minibatch
  assert found.memory['reference'] == pytest.approx(found.memory['parameters'] / 2, rel=0.1)
  prefill, token = found.sampler['prefill'], found.sampler['token']
  # 16 prompts of 32 tokens, of which the last is read again; 64 samples read one token each.
  assert prefill['flops'] / token['flops'] == pytest.approx(16 * 32 / 64, rel=0.5)
  assert any('sampler' in line for line in report.lines(found))


def test_ppo_holds_a_critic_and_a_reference():
  values = {'rollout.prompts': 16, 'rollout.minibatches': 2, 'batch.row_lengths': ()}

  def memory(**more):
    config = planned.with_values(configs.load('ppo:tiny'), TINY | values | more)
    found = planned.make(config, chips.parse('v5e:2x4'), LENGTHS, analytic=True)
    return found.memory | found.sampling

  whole, shared = memory(), memory(**{'rollout.critic': 'shared'})
  assert whole['parameters'] > 1.8 * shared['parameters']
  assert whole['reference'] == shared['reference'] < shared['parameters']
  assert 'reference' not in memory(**{'rollout.kl': 0.0, 'rollout.kl_target': 0.0})
  # Keys and values in bfloat16 and three integers of layout, over 8 chips: 16 prompts of 32 tokens,
  # 64 samples of 12; and how full each of the two caches is.
  token = 2 * 2 * 2 * 16 * 2 + 3 * 4
  assert whole['its cache'] == (token * (16 * 32 + 64 * 12) + 2 * 4) / 8


def online(topology='v5e:2x4', **values):
  changed = TINY | {'rollout.prompts': 16, 'batch.row_lengths': ()} | values
  config = planned.with_values(configs.load('grpo:tiny'), changed)
  return planned.make(config, chips.parse(topology), LENGTHS, analytic=True)


def bytes_of(shapes):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def test_roles_hold_what_is_theirs_on_chips_of_their_own():
  together = online(**{'rollout.kl': 0.1})
  apart = online(
    **{'rollout.kl': 0.1, 'rollout.devices': 2, 'rollout.reference_devices': 2, 'mesh.fsdp': 4}
  )
  assert together.chips == apart.chips == 8
  assert together.mesh['fsdp'] == 8 and apart.mesh['fsdp'] == 4 and not together.roles
  assert {role: count for role, (count, _) in apart.roles.items()} == {'reference': 2, 'sampler': 2}
  assert 'reference' in together.memory and 'reference' not in apart.memory
  assert not apart.sampling and apart.ahead is False
  shapes = models.Model(models.preset('tiny')).param_shapes()
  whole, halves = bytes_of(shapes), apart.roles['reference'][1]['reference']
  assert whole / 2 < halves < 0.51 * whole  # norms are not divided
  sampler = apart.roles['sampler'][1]
  assert sampler['the sampler'] == whole / 2  # all of it, in bfloat16
  assert sampler['its cache'] == 4 * together.sampling['its cache']  # 2 chips in place of 8
  shown = '\n'.join(report.lines(apart))
  assert '8 chips as fsdp=4, 2 for reference, 2 for sampler' in shown
  assert 'memory of each of 2 chips for sampler alone' in shown
  with pytest.raises(ValueError, match='leave at least one to train'):
    online(**{'rollout.devices': 8})
  with pytest.raises(ValueError, match='nothing reads a reference'):
    online(**{'rollout.reference_devices': 4, 'objective': 'grpo()', 'rollout.kl': 0.0})


def test_a_role_that_does_not_fit_is_said():
  found = online(
    **{'rollout.devices': 4, 'model': 'preset:llama3-8b', 'rollout.max_new_tokens': 2048}
  )
  assert not found.fits  # 16 GB of parameters in bfloat16 on each that samples, and its cache
  assert sum(found.roles['sampler'][1].values()) > found.capacity
  assert 'more than 4 chips for sampler' in report.advice(found)


def test_reward_models_are_counted_where_they_live(tmp_path):
  shape = dataclasses.replace(models.preset('tiny', vocab_size=259), num_labels=1)
  models.save_hf(tmp_path / 'rm', *models.init(shape, jax.random.key(0)), load_tokenizer('byte'))
  text = f"minimum(reward_model('{tmp_path / 'rm'}'), reward_model('{tmp_path / 'rm'}'))"
  whole = 2 * bytes_of(models.Model(shape).param_shapes())
  here = online(rewards=text).memory['reward models']
  assert whole / 8 < here < 1.1 * whole / 8
  there = online(**{'rewards': text, 'rollout.reward_devices': 1, 'mesh.fsdp': 1, 'mesh.data': 7,
                    'rollout.prompts': 14})  # fmt: skip
  assert there.roles == {'rewards': (1, {'reward models': whole})}
  assert 'reward models' not in there.memory


def test_a_chip_does_not_sample_and_learn_at_once_unless_ahead():
  after, ahead = online(), online(**{'rollout.ahead': 1})
  step = sum(size for name, size in after.memory.items() if name not in planned.HELD)
  sampling = sum(after.sampling.values())
  assert ahead.total - after.total == pytest.approx(min(step, sampling))


def test_gradients_alone_cross_between_slices():
  """Two slices of 4 chips: a chip's share of bfloat16 gradients goes to its like in the other."""
  one, two = plan('v5e:2x2'), plan('v5e:2x2', **{'mesh.slices': 2})
  assert two.chips == 8 and two.mesh['data'] == 2 and two.mesh['fsdp'] == 4
  assert one.far == 0 and set(one.messages) == {'all-gather', 'all-reduce'}
  assert set(two.messages) == {'all-gather', 'all-reduce between slices'}
  # Of 4 devices a slice each sends a quarter, half of it twice: reduced, then given back.
  assert two.far == 2 * two.parameters / 4
  assert two.bounds['slices'] == two.far / 3.125e9 and 'slices' not in one.bounds
  assert 'sent by a chip to other slices' in '\n'.join(report.lines(two))


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
  found = planned.refused(
    plan(), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out: temporaries (71.17G) exceeds')
  )
  assert not found.fits and found.memory[planned.AT_WORK] == 71.17 * chips.GIB
  shown = '\n'.join(report.lines(found))
  assert 'the compiler refuses it: Ran out' in shown and 'remat=full' in shown
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    planned.refused(plan(), jax.errors.JaxRuntimeError('INTERNAL: of another kind'))


def test_adapters_train_alone():
  """Tiny, 8 shards, rank 4 on q alone: A [2, 64, 4] is divided, B [2, 4, 64] is not."""
  whole, found = plan(), plan(**{'lora.rank': 4, 'lora.targets': ('q',)})
  adapters = 4 * (2 * 64 * 4 / 8 + 2 * 4 * 64)
  assert found.memory['adapters'] == adapters
  assert found.memory['optimizer'] == pytest.approx(2 * adapters, abs=64)
  assert found.memory['gradients'] == 4 * 2 * (2 * 64 * 4) / 8
  # Masters have gone: weights are bfloat16 and norms, which are not divided, as they were.
  norms = 4 * (2 * 2 * 64 + 64)
  assert found.memory['frozen parameters'] - norms == (whole.memory['parameters'] - norms) / 2
  assert found.parameters == whole.parameters
  # No product for the gradient of a weight: of the three of each, two stay.
  assert 2 / 3 < found.useful / whole.useful < 1 and found.flops < whole.flops
  assert found.wire < whole.wire


def test_scores_take_the_place_of_the_head():
  one, two = (plan(objective='bradley_terry()', heads=n) for n in (1, 2))
  assert two.parameters - one.parameters == 64  # a row of the width
  assert one.memory['the head'] < plan().memory['the head'] / 10
  with pytest.raises(ValueError, match='reads no rewards'):
    plan(heads=2)


def test_gpus_are_estimated_and_said_to_be(capsys):
  arguments = ['--config=dpo', '--config.model=preset:llama3-8b', '--topology=gpu:h100:8']
  assert cli.main(['plan', *arguments, '--config.remat=dots']) == 0
  shown = capsys.readouterr().out
  assert 'estimated from shapes alone' in shown and ': fits' in shown
  assert cli.main(['plan', *arguments, '--config.batch.size=256', '--json']) == 3
  found = json.loads(capsys.readouterr().out)
  assert found['fits'] is False and found['source'] == 'estimated' and found['chips'] == 8
  assert found['examples_per_second'] == pytest.approx(256 / found['seconds'])


def test_what_does_not_fit_says_what_would(capsys):
  arguments = ['--config=dpo', '--config.model=preset:llama3-8b', '--config.batch.size=8']
  assert cli.main(['plan', *arguments, '--topology=v5e:2x2', '--analytic']) == 3
  shown = capsys.readouterr().out
  assert 'DOES NOT FIT' in shown
  for advice in ('remat=full', 'optimizer.dtype=bfloat16', 'more than 4 chips'):
    assert advice in shown


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--topology is missing'),
    (['--topology=v9:2x2'], "expected a TPU slice such as 'v5e:8x8'"),
    (['--topology=gpu:v5e:8'], 'expected a TPU slice'),
    (['--topology=v5e:2x2', '--lengths=0,5,5'], 'the tokens of a prompt and of its completions'),
    (['--topology=v5e:2x2', '--config.objective=ppo_clip()'], 'say in config.rewards what'),
    (
      ['--topology=v5e:2x2', '--config.rewards=length()', '--config.rollout.samples=0'],
      'rollout.samples must be a number at least 1, got 0',
    ),
    (['--topology=v5e:2x2', '--lengths=512'], 'the tokens of a prompt and of its completions'),
    (['--topology=v5e:2x2', '--config.mesh.tensor=3'], '3 must divide 4 devices'),
    (['--topology=v5e:8x8', '--config.batch.size=3'], 'must be a positive multiple'),
    (['--topology=v5e:2x2', '--config.objective=dpoo()'], "did you mean 'dpo'"),
  ],
)
def test_mistakes_are_named(arguments, message, capsys):
  base = ['--config=dpo', '--config.model=preset:tiny', '--analytic']
  assert cli.main(['plan', *base, *arguments]) == 2
  assert message in capsys.readouterr().err


def test_lengths():
  assert batch.parse_lengths('3,4,5') == (3, 4, 5)
  assert all(isinstance(cell, str) for cell in report.row('x', plan()))
