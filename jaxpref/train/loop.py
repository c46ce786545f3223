"""The one loop: dispatch a step, then read the metrics of the one before it.

A source says where batches come from: `next(step, params, carry) -> (batch, carry)`. An offline
source ignores params and carry; an online one samples with the parameters, and its carry, a
pytree, is checkpointed with the state.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from jaxpref.data.batches import Batches, stream
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.preemption import Preempted
from jaxpref.train.profiler import Profiler
from jaxpref.train.progress import Bar, Lines
from jaxpref.train.state import TrainState
from jaxpref.train.step import Hparams
from jaxpref.train.throughput import Work, work
from jaxpref.train.writers import Writers
from jaxpref.typing import Batch, Params

Step = Callable[[TrainState, Batch, Hparams], tuple[TrainState, dict[str, Any]]]


class Source(Protocol):
  def next(self, step: int, params: Params, carry: Any) -> tuple[Batch, Any]: ...

  def report(self) -> dict[str, float]:
    """Metrics of what `next` did beside reading, such as sampling; each is given once."""
    ...


class Offline:
  """Batches of a data set, read ahead; `step` may start anywhere."""

  def __init__(self, batches: Batches, stop: int):
    self._batches, self._stop = batches, stop
    self._stream: Iterator[tuple[int, Batch]] = iter(())
    self._at = -1

  def next(self, step: int, params: Params, carry: Any) -> tuple[Batch, Any]:
    if step != self._at:
      self._stream = stream(self._batches, step, self._stop)
    _, batch = next(self._stream)
    self._at = step + 1
    return batch, carry

  def report(self) -> dict[str, float]:
    return {}


class NotFinite(FloatingPointError):
  """Too many steps in a row whose loss or gradient was not finite."""


@dataclasses.dataclass
class Run:
  """What the loop needs beside the state; every callable may be replaced.

  Attributes:
    step: the compiled train step; donates its state.
    place: puts a host batch on the devices.
    whole: state -> the parameters that the source samples with.
    evaluate: state -> metrics of the held-out split, or None.
    persist: state -> what of it a checkpoint holds; the source's carry is in it.
    noticed: step -> whether to save after it and stop, see `preemption`.
    flops: model FLOPs of a batch's useful work, forward and backward.
    peak: the devices' peak FLOP/s, where known, for `mfu`.
    log_every, eval_every, save_every: in steps; 0 is never (the last step is always logged and
    saved).
    max_nonfinite: steps in a row that may fail before the run stops.
    origin: names an example of the data set by its index, for error messages.
    profiler: traces some of the steps.
    watch: is told of each part of a step as it begins, see `watchdog`.
  """

  step: Step
  source: Source
  hparams: Hparams
  stop: int
  writers: Writers
  progress: Bar | Lines
  checkpoints: Checkpoints | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  place: Callable[[Batch], Batch] = lambda batch: batch
  whole: Callable[[TrainState], Params] = lambda state: state.params
  evaluate: Callable[[TrainState], dict[str, float]] | None = None
  persist: Callable[[TrainState], TrainState] = lambda state: state
  noticed: Callable[[int], bool] = lambda step: False
  flops: Callable[[Work], float] | None = None
  peak: float | None = None
  log_every: int = 1
  eval_every: int = 0
  save_every: int = 0
  max_nonfinite: int = 3
  origin: Callable[[int], str] = '#{}'.format
  profiler: Profiler | None = None
  watch: Callable[[str, int], None] = lambda part, step: None


def fit(run: Run, state: TrainState) -> TrainState:
  """Trains from `state.step` to `run.stop`; returns the last state, with the source's last carry.

  Raises:
    NotFinite: after `max_nonfinite` failed steps in a row; checkpoints and metrics stay.
    Preempted: asked to stop; what was done is saved.
  """
  start, carry = int(state.step), state.carry
  state = state._replace(carry=None)  # the step neither reads nor donates it
  shapes: set[tuple] = set()
  pending: tuple | None = None
  evaluated: dict[str, float] = {}
  clock = _Clock()
  for n in range(start, run.stop):
    run.watch('data', n + 1)
    batch, carry = run.source.next(n, run.whole(state), carry)
    todo, said = work(batch), run.source.report()
    clock.waited()
    run.watch('compilation' if _announce(run, batch, shapes) else 'step', n + 1)
    if run.profiler:
      run.profiler.before(n + 1)
    with jax.profiler.StepTraceAnnotation('step', step_num=n + 1):
      state, metrics = run.step(state, run.place(batch), run.hparams)
    if run.profiler:
      run.profiler.after(n + 1, metrics)
    if pending is not None:
      _report(run, clock, *pending)
    pending = (n + 1, metrics, todo, said)
    last = n + 1 == run.stop
    if run.evaluate and (last or _due(n + 1, run.eval_every)):
      _report(run, clock, *pending)
      pending = None
      run.watch('evaluation', n + 1)
      evaluated = run.evaluate(state)
      run.writers.write(n + 1, evaluated)
      run.progress.print(f'step {n + 1}  ' + _line(evaluated))
      clock.restart()
    stopped = not last and run.noticed(n + 1)
    if run.checkpoints and (last or stopped or _due(n + 1, run.save_every)):
      if pending is not None:
        _report(run, clock, *pending)
        pending = None
      run.watch('checkpoint', n + 1)
      run.writers.flush()
      run.checkpoints.save(n + 1, run.persist(state._replace(carry=carry)), run.meta, evaluated)
    if stopped:
      if run.checkpoints:
        run.checkpoints.wait()
      raise Preempted(n + 1)
  if pending is not None:
    _report(run, clock, *pending)
  if run.checkpoints:
    run.checkpoints.wait()
  run.watch('', run.stop)
  return state._replace(carry=carry)


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _report(
  run: Run,
  clock: '_Clock',
  step: int,
  metrics: dict[str, Any],
  todo: Work,
  said: dict[str, float],
) -> None:
  """Waits for a step's metrics, shows and writes them, and judges them."""
  metrics = jax.device_get(metrics)
  worst = metrics.pop('worst')
  values = {name: float(value) for name, value in metrics.items()}
  values |= said | clock.lap(todo)
  if run.flops and run.peak and 'step_seconds' in values:
    values['mfu'] = run.flops(todo) / values['step_seconds'] / run.peak
  run.progress.write(step, values)
  if step == run.stop or _due(step, run.log_every) or values['skipped']:
    run.writers.write(step, values)
  if values['skipped']:
    bad = [
      int(i) for i, loss in zip(worst['ids'], worst['loss'], strict=True) if not np.isfinite(loss)
    ]
    shown = bad or [int(i) for i in worst['ids'][:3]]
    names = ', '.join(run.origin(i) for i in shown if i >= 0)
    why = 'loss not finite on' if bad else 'gradient not finite; highest losses on'
    logging.error('step %d was not applied: %s %s', step, why, names)
    if values['skipped'] >= run.max_nonfinite:
      raise NotFinite(
        f'{values["skipped"]:.0f} steps in a row were not finite, the last one step {step}: {why} '
        f'{names}. Parameters are those of the last good step. Lower optimizer.learning_rate, look '
        'at these examples with `jaxpref data inspect`, or raise max_nonfinite.'
      )


def _announce(run: Run, batch: Batch, shapes: set[tuple]) -> bool:
  """Says when a batch's shape is new, for it will be compiled; whether it is."""
  rows = tuple(rows.tokens.shape for rows in batch.rows)
  shape = (rows, batch.scored.at.shape)
  if shape in shapes:
    return False
  shapes.add(shape)
  sizes = ' + '.join(f'{r[2]} x {r[3]}' for r in rows)
  run.progress.print(
    f'compiling shape {len(shapes)}: rows {sizes}, {shape[1][2]} scored slots, '
    f'{rows[0][0]} microbatches, {rows[0][1]} data groups'
  )
  return True


def _line(metrics: dict[str, float]) -> str:
  shown = ('/loss', 'rewards/accuracies', 'rewards/margins', '/reward/mean', '/win_rate')
  return '  '.join(f'{k} {v:.4f}' for k, v in metrics.items() if k.endswith(shown))


class _Clock:
  """Seconds a step, and the share of them spent waiting for data."""

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    """After an evaluation: the next lap begins now."""
    self._lap = self._mark = time.monotonic()
    self._waiting = 0.0

  def waited(self) -> None:
    self._waiting = time.monotonic() - self._mark

  def lap(self, todo: Work) -> dict[str, float]:
    now = time.monotonic()
    seconds = max(now - self._lap, 1e-9)
    values = {
      'step_seconds': seconds,
      'tokens_per_second': todo.scored / seconds,
      'examples_per_second': todo.examples / seconds,
      'data_wait': min(1.0, self._waiting / seconds),
    }
    self._lap = self._mark = now
    return values
