"""References that stand still or follow the policy, and objectives that remember."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxpref import config as configs
from jaxpref import run
from jaxpref.cli.configs import folder
from jaxpref.data.batches import Batches
from jaxpref.models import init, preset
from jaxpref.objectives import Loss, Metric, dpo, objective, tdpo2
from jaxpref.objectives.candidates import complete_pairs, log_ratios
from jaxpref.train import reference
from jaxpref.train.anchor import Sync
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from tests.steps import scalars
from tests.worlds import random_pairs

QUIET = rich.console.Console(quiet=True)
SCALARS = scalars(0.1)


def follow(memory, metrics, numbers):
  share = 1 - numbers['momentum']
  return {'average': memory['average'] + share * (metrics['gap'] - memory['average'])}


@objective(memory={'average': 0.5}, update=follow)
def above_average(logps, ref_logps, mask, average, *, momentum=0.75):
  """Asks of every pair a margin of one more than past steps had: reads what it remembers."""
  ratios, pairs = log_ratios(logps, ref_logps, mask), complete_pairs(mask)
  gap = ratios[:, 0] - ratios[:, 1]
  terms = jnp.square(gap - average - 1)
  return Loss(terms, pairs, jnp.sum(pairs), {'gap': Metric(gap, pairs)})


@pytest.fixture(scope='module')
def tiny():
  return init(preset('tiny', vocab_size=50, width=32, num_layers=1), jax.random.key(0))


@pytest.fixture(scope='module')
def data():
  return random_pairs(8, seed=4)


@functools.cache
def compiled(model):
  return jax.jit(make_step(model, Optimizer('sgd'), chunk=24))


def begin(tiny, objective, live=True):
  _, params = tiny
  moments = Optimizer('sgd').init(SCALARS, params)
  anchor = jax.tree.map(jnp.copy, params) if live else None
  return init_state(params, moments, reference=anchor, objective=objective)


def walk(tiny, data, objective, steps, *, sync=None, live=True, change=lambda i, b: b, **options):
  """[(state, metrics)] after every step."""
  state, batch = begin(tiny, objective, live), Batches(data, 8, seed=0, **options)[0]
  hparams, past = Hparams(objective, SCALARS, sync=sync), []
  for i in range(steps):
    state, metrics = compiled(tiny[0])(state, change(i, batch), hparams)
    past.append((state, metrics))
  return past


def assert_close(left, right, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def assert_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def differ(left, right):
  return any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True))


def spoil(step):
  """A change of batches: the losses of one step's examples are not numbers."""

  def change(i, batch):
    weight = np.full(batch.fields['ids'].shape, np.nan if i == step else 1, np.float32)
    return batch._replace(fields=batch.fields | {'weight': weight})

  return change


def test_a_live_reference_equals_the_table_step_by_step(tiny, data, tmp_path):
  table = reference.build(*tiny, data, tmp_path)
  stored = walk(tiny, data, dpo(beta=0.3), 3, live=False, tables={'ref_logps': table})
  live = walk(tiny, data, dpo(beta=0.3), 3)
  for (left, ours), (right, theirs) in zip(stored, live, strict=True):
    assert_close(left.params, right.params, rtol=0, atol=1e-6)
    for name in ('loss', 'rewards/margins', 'grad_norm'):
      np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
  assert_equal(live[-1][0].reference, tiny[1])  # nothing moves it
  assert differ(live[-1][0].params, tiny[1])


def test_a_hard_update_takes_the_policy_and_then_stands(tiny, data):
  past = walk(tiny, data, dpo(beta=0.3), 5, sync=Sync(1.0, 2))
  anchor = tiny[1]
  for step, (state, metrics) in enumerate(past):
    if step in (2, 4):  # the first step after an update: policy and reference are one
      np.testing.assert_allclose(metrics['loss'], np.log(2), rtol=1e-6)
    elif step:
      assert abs(metrics['rewards/margins']) > 1e-4
    anchor = state.params if step in (1, 3) else anchor
    assert_equal(state.reference, anchor)


def test_a_soft_update_is_the_mean_and_costs_no_other_program(tiny, data):
  before = compiled(tiny[0])._cache_size()
  past = walk(tiny, data, dpo(beta=0.3), 3, sync=Sync(0.25, 1))
  anchor = tiny[1]
  for state, _ in past:
    anchor = jax.tree.map(lambda p, r: 0.25 * np.asarray(p) + 0.75 * r, state.params, anchor)
    assert_close(state.reference, anchor, rtol=1e-6, atol=1e-7)
    anchor = state.reference
  walk(tiny, data, dpo(beta=0.3), 1, sync=Sync(1.0, 3))
  assert compiled(tiny[0])._cache_size() <= before + 1


def test_memory_follows_the_metrics_of_the_whole_batch(tiny, data):
  whole = walk(tiny, data, above_average(), 3)
  average = 0.5
  for state, metrics in whole:
    average += 0.25 * (float(metrics['gap']) - average)
    np.testing.assert_allclose(state.memory['above_average']['average'], average, rtol=1e-6)
  # The first loss has the first value of the memory, and gaps of 0: (0 - 0.5 - 1)².
  np.testing.assert_allclose(whole[0][1]['loss'], 2.25, rtol=1e-5)
  cut = walk(tiny, data, above_average(), 3, microbatches=2, groups=2)
  for (left, ours), (right, theirs) in zip(whole, cut, strict=True):
    assert_close(left.memory, right.memory, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=1e-5)


def test_a_step_that_is_not_applied_moves_neither_reference_nor_memory(tiny, data):
  past = walk(tiny, data, above_average(), 3, sync=Sync(0.5, 1), change=spoil(1))
  (first, _), (lost, metrics), (third, _) = past
  assert (metrics['skipped'], lost.step, third.skipped) == (1, 2, 0)
  for part in ('params', 'reference', 'memory'):
    assert_equal(getattr(lost, part), getattr(first, part))
    assert differ(getattr(third, part), getattr(first, part))


@pytest.mark.slow
def test_divergences_from_a_live_reference_do_not_depend_on_microbatches(tiny, data):
  objective = tdpo2(beta=0.3)
  whole = walk(tiny, data, objective, 2, sync=Sync(0.5, 1))
  cut = walk(tiny, data, objective, 2, sync=Sync(0.5, 1), microbatches=2, groups=2)
  for (left, ours), (right, theirs) in zip(whole, cut, strict=True):
    assert_close(left.params, right.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=1e-5)
  assert whole[1][1]['kl/rejected'] > 0


def test_divergences_from_a_table_are_refused(tiny, data):
  with pytest.raises(ValueError, match=r"\['forward_kl'\].*set reference='live'"):
    walk(tiny, data, tdpo2(), 1, live=False)


def tiny_run(workdir, **changes):
  """A config whose every batch is the same eight pairs, in one order or another."""
  lines = (folder() / 'tiny_pairs.jsonl').read_text().splitlines(keepends=True)
  (workdir.parent / 'pairs.jsonl').write_text(''.join(lines[:8]))
  c = configs.default()
  c.data.train = f'jsonl:{workdir.parent / "pairs.jsonl"}'
  c.data.kind = 'preference'
  c.data.max_length = 96
  c.objective = 'dpo() + 0.1*above_average()'
  c.reference = 'live'
  c.batch.size = 8
  c.batch.row_lengths = (192,)
  c.steps = 4
  c.checkpoint.every = 2
  c.optimizer.learning_rate = 1e-3
  c.log.tensorboard = False
  c.update_from_flattened_dict(changes)
  return c


@pytest.mark.parametrize(
  'every', [pytest.param(0, id='still', marks=pytest.mark.slow), pytest.param(3, id='following')]
)
def test_a_run_resumes_bit_for_bit(tmp_path, every):
  config = tiny_run(tmp_path / 'w', **{'reference_sync.every': every, 'reference_sync.mixup': 0.5})
  whole = run.train(config, tmp_path / 'w', console=QUIET)
  began = Checkpoints(tmp_path / 'w', read_only=True).restore_reference()
  assert differ(whole.state.params, began)
  assert differ(whole.state.reference, began) == bool(every)

  shutil.rmtree(tmp_path / 'w' / 'checkpoints' / '4')  # as if it had been stopped after step 3
  saved = Checkpoints(tmp_path / 'w', read_only=True)
  if every:
    assert_equal(saved.restore(whole.state)[0].reference, began)  # not due before step 3
  else:
    with pytest.raises(ValueError, match=r'reference/\S+ is asked for but not saved'):
      saved.restore(whole.state)
  saved.close()
  again = run.train(config, tmp_path / 'w', console=QUIET)
  assert_equal(again.state, whole.state)
  assert whole.state.memory['above_average']['average'] != 0.5


@pytest.mark.parametrize('every', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_reference_that_waits_in_the_hosts_memory_is_the_same(tmp_path, every):
  options = {'reference_sync.every': every, 'reference_sync.mixup': 0.5, 'steps': 3}
  near = run.train(tiny_run(tmp_path / 'near', **options), tmp_path / 'near', console=QUIET)
  options['reference_memory'] = 'host'
  far = run.train(tiny_run(tmp_path / 'far', **options), tmp_path / 'far', console=QUIET)
  assert_equal(far.params, near.params)
  kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(far.state.reference)}
  assert kinds == {'pinned_host'}
  assert_equal(far.state.reference, near.state.reference)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'reference_memory': 'disk'}, "'device' or 'host', got 'disk'"),
    ({'reference': 'table', 'reference_memory': 'host'}, 'moves a live reference'),
    ({'reference': 'table', 'reference_sync.every': 2}, r'a table.*set config.reference=live'),
    ({'reference_sync.every': -1}, 'every >= 1'),
    ({'reference_sync.every': 2, 'reference_sync.mixup': 0.0}, '0 < mixup <= 1, got 2 and 0'),
    ({'reference': 'table', 'objective': 'tdpo2()'}, r"\['forward_kl'\].*reference='live'"),
    ({'objective': 'sft()', 'reference_sync.every': 2}, 'nothing reads a reference'),
  ],
)
def test_references_that_cannot_be_are_refused_before_anything_runs(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run.train(tiny_run(tmp_path / 'w', **changes), tmp_path / 'w', console=QUIET)
  assert not (tmp_path / 'w').exists()
