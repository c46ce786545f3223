"""Plans: arithmetic on shapes against numbers by hand; what is compiled against the arithmetic."""

import json

import jax
import pytest

from jaxpref.cli import configs
from jaxpref.cli import main as cli
from jaxpref.plan import batch, chips, planned, report, search

TINY = {
  'model': 'preset:tiny',
  'attention': 'blocked',
  'batch.size': 16,
  'batch.row_lengths': (96,),
}
LENGTHS = (32, 32, 32)


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
  """The same path as for a TPU, with this machine's devices in its place."""
  monkeypatch.setattr(chips, 'devices', lambda topology: jax.devices()[:8])
  monkeypatch.setattr(chips, 'versions', dict)
  estimated, found = plan(), plan(analytic=False)
  assert found.source == 'compiled'
  assert found.useful == estimated.useful
  assert found.useful < found.flops < 2 * estimated.flops
  state = found.memory['parameters'] + found.memory['optimizer']
  assert state == estimated.memory['parameters'] + estimated.memory['optimizer']
  assert found.memory['batch and outputs'] < state  # the state is donated, not held twice
  assert found.messages['all-gather'][1] > 0
  assert found.wire > 0 and found.traffic > 0


@pytest.mark.slow
def test_an_online_run_is_compiled_with_its_sampler(monkeypatch):
  monkeypatch.setattr(chips, 'devices', lambda topology: jax.devices()[:8])
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
    return planned.make(config, chips.parse('v5e:2x4'), LENGTHS, analytic=True).memory

  whole, shared = memory(), memory(**{'rollout.critic': 'shared'})
  assert whole['parameters'] > 1.8 * shared['parameters']
  assert whole['reference'] == shared['reference'] < shared['parameters']
  assert 'reference' not in memory(**{'rollout.kl': 0.0, 'rollout.kl_target': 0.0})
  # Keys and values in bfloat16 and three integers of layout, over 8 chips: 16 prompts of 32 tokens,
  # 64 samples of 12; and how full each of the two caches is.
  token = 2 * 2 * 2 * 16 * 2 + 3 * 4
  assert whole['its cache'] == (token * (16 * 32 + 64 * 12) + 2 * 4) / 8


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


def test_a_search_says_what_it_tried_and_ranks_what_fits():
  config = planned.with_values(configs.load('dpo'), TINY)
  found = search.run(config, chips.parse('v5e:2x2'), LENGTHS, compile_best=0)
  plans = [one for _, one in found.ranked]
  assert found.tried == len(plans) + found.too_large + sum(found.refused.values())
  assert all(one.fits for one in plans)
  assert [one.seconds for one in plans] == sorted(one.seconds for one in plans)
  assert len({str(values) for values, _ in found.ranked}) == len(plans)
  assert f'tried {found.tried} settings' in next(search.lines(found))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--topology is missing'),
    (['--topology=v9:2x2'], "expected a TPU slice such as 'v5e:8x8'"),
    (['--topology=gpu:v5e:8'], 'expected a TPU slice'),
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
