"""The loop: every batch once, metrics in order, a source with a carry, a stop when all is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxpref.data.batches import Batches
from jaxpref.evals.heldout import heldout
from jaxpref.models import init, preset
from jaxpref.objectives import dpo, sft
from jaxpref.train.loop import NotFinite, Offline, Run, fit
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.progress import open_progress
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from jaxpref.train.throughput import train_flops, work
from tests.steps import scalars
from tests.worlds import random_pairs

SCALARS = scalars(3e-3, b1=0.9, clip=1.0)


class Memory:
  """A writer that remembers."""

  def __init__(self):
    self.lines = []

  def write(self, step, metrics):
    self.lines.append((step, dict(metrics)))

  def flush(self):
    pass

  def close(self):
    pass


@pytest.fixture(scope='module')
def parts():
  model, params = init(preset('tiny', vocab_size=50, width=32, num_layers=1), jax.random.key(0))
  optimizer = Optimizer('adamw')
  step = jax.jit(make_step(model, optimizer), donate_argnums=0)
  return model, params, optimizer, step


def start(parts, stop, **options):
  _, params, optimizer, step = parts
  state = init_state(jax.tree.map(jnp.copy, params), optimizer.init(SCALARS, params))
  run = Run(
    step=step,
    hparams=Hparams(sft(), SCALARS),
    stop=stop,
    writers=Memory(),
    progress=open_progress(stop, console=rich.console.Console(quiet=True)),
    **options,
  )
  return run, state


def test_offline_run_reports_every_step_and_evaluates(parts):
  data = random_pairs(20, seed=1)
  batches = Batches(data, 8, seed=0)
  measure = heldout(parts[0], sft(), Batches(data, 8, seed=None))
  run, state = start(
    parts,
    6,
    source=Offline(batches, 6),
    evaluate=lambda state: measure(state.params),
    eval_every=2,
    flops=lambda todo: train_flops(parts[0], todo),
    peak=1e12,
  )
  state = fit(run, state)
  assert state.step == 6
  steps = [step for step, line in run.writers.lines if 'eval/loss' not in line]
  assert steps == [1, 2, 3, 4, 5, 6]
  evals = [line['eval/loss'] for _, line in run.writers.lines if 'eval/loss' in line]
  assert len(evals) == 3 and evals[-1] < evals[0]
  line = run.writers.lines[0][1]
  assert {'loss', 'grad_norm', 'learning_rate', 'tokens_per_second', 'mfu', 'data_wait'} <= set(
    line
  )


def test_a_source_may_use_params_and_carry(parts):
  data = random_pairs(20, seed=1)
  batches = Batches(data, 8, seed=0)

  class Counting:
    def next(self, step, params, carry):
      assert params['norm']['scale'].shape == (32,)  # alive: not yet donated
      seen.append(carry)
      return batches[step], carry + 1

    def report(self):
      return {'drawn': float(len(seen))}

  seen = []
  run, state = start(parts, 4, source=Counting())
  state = fit(run, state._replace(carry=10))
  assert seen == [10, 11, 12, 13]
  assert state.carry == 14
  assert [values['drawn'] for _, values in run.writers.lines] == [1, 2, 3, 4]


def test_heldout_metrics_are_those_of_the_whole_set(parts):
  model, params, *_ = parts
  data = random_pairs(11, seed=3)
  one = heldout(model, sft(), Batches(data, 11, seed=None))(params)
  many = heldout(model, sft(), Batches(data, 4, seed=None))(params)
  assert set(one) == set(many)
  for name, value in one.items():
    np.testing.assert_allclose(value, many[name], rtol=1e-5, err_msg=name)


def test_stops_after_too_many_failures_and_names_examples(parts):
  data = random_pairs(8, seed=1)
  for i in (2, 5):
    pair = data.examples[i]
    bad = np.full_like(pair.candidates[0], 10**6)  # ids beyond the vocabulary
    data.examples[i] = pair._replace(candidates=(bad, pair.candidates[1]))
  run, state = start(
    parts,
    9,
    source=Offline(Batches(data, 8, seed=0), 9),
    max_nonfinite=2,
    origin='pairs:{}'.format,
  )
  with pytest.raises(NotFinite, match=r'2 steps in a row.*pairs:[25], pairs:[25]'):
    fit(run, state)
  assert [step for step, _ in run.writers.lines] == [1, 2]


def test_work_counts_no_padding_and_each_prompt_once():
  data = random_pairs(8, seed=1)
  todo = work(Batches(data, 8, seed=0)[0])
  assert todo.examples == 8
  assert todo.tokens == data.lengths.sum()
  assert todo.scored == data.lengths[:, 1:].sum()
  assert todo.computed >= todo.tokens
  lengths = data.lengths.astype(float)
  prompt, rest = lengths[:, :1], lengths[:, 1:]
  keys = (prompt * (prompt + 1) / 2).sum() + (rest * prompt + rest * (rest + 1) / 2).sum()
  np.testing.assert_allclose(todo.context, keys / lengths.sum())


def test_a_loss_that_wants_pairs_says_so(parts):
  data = random_pairs(8, seed=1, candidates=1)
  run, state = start(parts, 1, source=Offline(Batches(data, 8, seed=0), 1))
  run.hparams = Hparams(dpo(), SCALARS)
  with pytest.raises(ValueError, match='ref_logps'):
    fit(run, state)


class Watch:
  """In a profiler's place: which steps it was told of, and whether their results were there."""

  def __init__(self):
    self.told = []

  def before(self, step):
    self.told.append(('before', step))

  def after(self, step, results):
    self.told.append(('after', step, 'loss' in results))


def test_a_profiler_hears_of_every_step_and_changes_none(parts):
  losses = []
  for watch in (None, Watch()):
    batches = Batches(random_pairs(20, seed=1), 8, seed=0)
    run, state = start(parts, 2, source=Offline(batches, 2), profiler=watch)
    fit(run, state)
    losses.append([line['loss'] for _, line in run.writers.lines])
  assert losses[0] == losses[1]
  assert watch.told == [('before', 1), ('after', 1, True), ('before', 2), ('after', 2, True)]
