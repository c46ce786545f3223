"""Searches among plans: what is tried, how it is ranked, and what is said of the rest."""

import dataclasses

from jaxpref.cli import configs
from jaxpref.plan import chips, planned, search
from tests.plans import LENGTHS, TINY


def test_a_search_says_what_it_tried_and_ranks_what_fits():
  config = planned.with_values(configs.load('dpo'), TINY)
  found = search.run(config, chips.parse('v5e:2x2'), LENGTHS, compile_best=0)
  plans = [one for _, one in found.ranked]
  assert found.tried == len(plans) + len(found.large) + sum(found.refused.values())
  assert all(one.fits for one in plans)
  assert [one.seconds for one in plans] == sorted(one.seconds for one in plans)
  assert len({str(values) for values, _ in found.ranked}) == len(plans)
  first, _, _, *shown = search.lines(found)
  assert f'tried {found.tried} settings' in first
  meshes = {
    tuple(values[f'mesh.{axis}'] for axis in ('data', 'context', 'tensor'))
    for values, _ in found.ranked
  }
  assert {(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)} <= meshes
  table = [line for line in shown if 'estimated' in line or 'microbatches' in line]
  assert len({len(line) for line in table}) == 1  # columns are columns


def test_what_the_compiler_finds_of_one_setting_holds_for_its_likes(monkeypatch):
  """Of the remat that it meets first it finds a step 100000 times as large as was estimated."""
  compiled, make = [], planned.make

  def stand_in(config, topology, lengths, *, analytic=False, price=None):
    found = make(config, topology, lengths, analytic=True, price=price)
    if analytic:
      return found
    compiled.append(config.remat)
    times = 1e5 if config.remat == compiled[0] else 1
    memory = {name: times * size for name, size in found.memory.items()}
    return dataclasses.replace(found, source='compiled', memory=memory)

  monkeypatch.setattr(planned, 'make', stand_in)
  for axis in ('DATA', 'CONTEXT', 'TENSOR'):
    monkeypatch.setattr(search, axis, (1,))
  config = planned.with_values(configs.load('dpo'), TINY)
  found = search.run(config, chips.parse('v5e:2x2'), LENGTHS, compile_best=1)
  bad, good = compiled
  assert bad != good
  assert [one.source for _, one in found.ranked[:2]] == ['compiled', 'estimated']
  assert bad not in {values['remat'] for values, _ in found.ranked}
  assert {values['remat'] for values, _ in found.large} == {bad}
  assert found.large[0][1].source == 'compiled'
  assert len(found.ranked) + len(found.large) + sum(found.refused.values()) == found.tried


def test_a_search_among_rollouts_divides_their_prompts(monkeypatch):
  for axis in ('DATA', 'CONTEXT', 'MICROBATCHES'):
    monkeypatch.setattr(search, axis, (1,))
  values = {'rollout.prompts': 8, 'rollout.minibatches': 2, 'rollout.max_new_tokens': 32}
  config = planned.with_values(configs.load('grpo'), {'model': 'preset:tiny'} | values)
  tried = list(search.candidates(config, chips.parse('v5e:2x4'), (64, 32)))
  assert {values['mesh.tensor'] for values in tried} == {2, 4, 8}  # 8 groups do not divide 4
  assert {values['batch.row_lengths'] for values in tried} == {(96,), (128,), (192,)}


def test_a_search_says_why_what_does_not_fit_does_not(monkeypatch):
  for axis in ('DATA', 'CONTEXT', 'TENSOR'):
    monkeypatch.setattr(search, axis, (1,))
  monkeypatch.setattr(search, 'ROWS', (1,))
  values = {'model': 'preset:llama3-8b', 'batch.size': 64, 'batch.row_lengths': ()}
  config = planned.with_values(configs.load('dpo'), TINY | values)
  found = search.run(config, chips.parse('v5e:4x4'), (512, 512, 512), compile_best=0)
  assert found.ranked and found.large
  totals = [one.total for _, one in found.large]
  assert totals == sorted(totals) and totals[0] > found.large[0][1].capacity
  said = [line for line in search.lines(found) if ' of 15.75; ' in line]
  assert len(said) == min(5, len(found.large)) and all('activations' in line for line in said)
