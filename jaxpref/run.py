"""A config and a folder in, a trained model in the folder out: `train(config, workdir)`.

This is where values become objects. Run it again with the same config and folder and it goes on
from the last checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from ml_collections import ConfigDict

from jaxpref import data, sharding
from jaxpref.data import cache
from jaxpref.data.batches import Batches, Packing
from jaxpref.evals.heldout import heldout
from jaxpref.models import Model
from jaxpref.objectives import (
  Schedule,
  constant,
  parse,
  warmup_cosine,
  warmup_linear,
  wsd,
)
from jaxpref.train import policy, reference
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.loop import Offline, Run, fit
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.progress import open_progress
from jaxpref.train.state import TrainState, init_state
from jaxpref.train.step import Hparams, make_step
from jaxpref.train.throughput import peak_flops, train_flops
from jaxpref.train.workdir import open_workdir
from jaxpref.train.writers import open_writers
from jaxpref.typing import Batch, Params

WSD_DECAY = 0.2  # share of the steps over which 'wsd' falls


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a run ends with; `params` are the last step's (`ema`, if any, in `state`)."""

  model: Model
  params: Params
  tokenizer: data.Tokenizer
  state: TrainState
  metrics: dict[str, float]  # of the held-out split, after the last step


def train(
  config: ConfigDict, workdir: str | Path, *, console: rich.console.Console | None = None
) -> Trained:
  """Runs `config` (see `jaxpref.config`) in `workdir`, or resumes the run that is there.

  Raises:
    ValueError: a value that cannot be, or a workdir with another config; nothing was computed yet.
    NotFinite: too many steps in a row were lost; the last checkpoint stays.
  """
  console = console or rich.console.Console()
  objective = parse(config.objective, imports=tuple(config.imports))
  mesh = sharding.make_mesh(config.mesh.to_dict())
  optimizer = Optimizer(config.optimizer.name, tuple(config.freeze))
  keep_best = parse_keep_best(config.checkpoint.keep_best)

  tokenizer = policy.find_tokenizer(config.model, config.tokenizer)
  train_set, eval_set = load_data(config, tokenizer)
  groups = sharding.groups(mesh)
  packing = Packing(row_lengths=tuple(config.batch.row_lengths))
  size = config.batch.size
  steps = config.steps or max(1, round(config.epochs * len(train_set) / size))
  scalars = optimizer_scalars(config.optimizer, steps)

  model, initial = policy.load(config.model, tokenizer, config.seed)
  model = model.replace(
    dtype=None if config.dtype == 'auto' else config.dtype, remat=config.remat or None
  )
  place_params = functools.partial(_on_mesh, mesh)
  initial = place_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), initial))
  folder = open_workdir(workdir, config)  # claimed only now that data and model are sound
  abstract = _abstract_state(optimizer, scalars, initial, config.ema > 0, mesh)
  checkpoints = Checkpoints(folder.path, keep_last=config.checkpoint.keep_last, keep_best=keep_best)
  describe(console, config, model, initial, train_set, eval_set, mesh, steps)

  # The reference is the model that the run began with, even if its source has changed since.
  attach: Callable[[Batch], Batch] = lambda batch: batch  # noqa: E731
  tables: dict[str, reference.Table] = {}
  eval_tables: dict[str, reference.Table] = {}
  if 'ref_logps' in objective.fields:
    ref_params = remember_reference(checkpoints, initial)
    if config.reference == 'table':
      build = functools.partial(reference_table, console, model, ref_params, mesh)
      tables['ref_logps'] = build(train_set)
      if eval_set is not None:
        eval_tables['ref_logps'] = build(eval_set)
    elif config.reference == 'live':
      attach = functools.partial(jax.jit(reference.attach(model)), ref_params)
    else:
      raise ValueError(f"config.reference must be 'table' or 'live', got {config.reference!r}")

  meta = {'data': train_set.fingerprint}
  if checkpoints.latest_step() is not None:
    state, saved = checkpoints.restore(abstract)
    if saved['data'] != meta['data']:
      raise ValueError(
        f'{folder.path} was trained on other data than {config.data.train} holds now; '
        'restore the file, or choose another workdir'
      )
    console.print(f'resuming after step {int(state.step)}')
  else:
    make = jax.jit(
      lambda params: init_state(params, optimizer.init(scalars, params), ema=config.ema > 0),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    )
    state = make(initial)
  del initial

  place = lambda batch: attach(jax.device_put(batch, sharding.batch_sharding(mesh)))  # noqa: E731
  batches = Batches(
    train_set, size, config.seed, config.batch.microbatches, groups, packing, tables
  )
  evaluate = None
  if eval_set is not None:
    eval_size = -(-min(size, len(eval_set)) // groups) * groups
    held = Batches(eval_set, eval_size, None, 1, groups, packing, eval_tables)
    evaluate = heldout(model, objective, held, place=place)
  start = int(state.step)
  writers = open_writers(
    folder,
    start,
    tensorboard=config.log.tensorboard,
    wandb=config.log.wandb,
    config=config.to_dict(),
  )
  progress = open_progress(steps, start, console=console)
  extra = ('entropy',) if config.log.entropy else ()
  seen = _Last(evaluate)
  run = Run(
    step=jax.jit(make_step(model, optimizer, extra=extra), donate_argnums=0),
    source=Offline(batches, steps),
    hparams=Hparams(objective, scalars, config.ema),
    stop=steps,
    writers=writers,
    progress=progress,
    checkpoints=checkpoints,
    meta=meta,
    place=place,
    evaluate=seen if evaluate else None,
    flops=functools.partial(train_flops, model),
    peak=peak_flops(),
    log_every=config.log.every,
    eval_every=config.eval.every,
    save_every=config.checkpoint.every,
    max_nonfinite=config.max_nonfinite,
    origin=train_set.origin,
  )
  try:
    state = fit(run, state)
    if evaluate and not seen.metrics:  # the run had ended before
      seen(state.params)
  finally:
    progress.close()
    writers.close()
    checkpoints.close()
  console.print(f'trained {steps} steps; everything is in {folder.path}')
  return Trained(model, state.params, tokenizer, state, seen.metrics)


def load_data(
  config: ConfigDict, tokenizer: data.Tokenizer
) -> tuple[data.Dataset, data.Dataset | None]:
  """(training set, held-out set or None) of `config.data`."""
  c = config.data
  if not c.train:
    raise ValueError('config.data.train is empty; give a source, such as jsonl:pairs.jsonl')
  load = functools.partial(
    data.load,
    tokenizer=tokenizer,
    kind=c.kind,
    columns=parse_columns(c.columns),
    max_length=c.max_length,
    truncate=c.truncate,
    on_error=c.on_error,
  )
  train_set = load(c.train)
  if c.eval:
    return train_set, load(c.eval)
  if not c.eval_fraction:
    return train_set, None
  train_set, eval_set = train_set.split(c.eval_fraction, config.seed)
  if not len(train_set) or not len(eval_set):
    raise ValueError(
      f'config.data.eval_fraction={c.eval_fraction} leaves {len(train_set)} examples to train on '
      f'and {len(eval_set)} to evaluate; give config.data.eval, or another fraction'
    )
  return train_set, eval_set


def parse_columns(text: str) -> dict[str, str]:
  """{'prompt': 'question'} from 'prompt=question,...'."""
  pairs = [item.split('=') for item in text.split(',') if item.strip()]
  if any(len(pair) != 2 for pair in pairs):
    raise ValueError(
      f"config.data.columns must look like 'prompt=question,chosen=good', got {text!r}"
    )
  return {name.strip(): key.strip() for name, key in pairs}


def parse_keep_best(text: str) -> tuple[str, str] | None:
  """('eval/rewards/accuracies', 'max') from 'eval/rewards/accuracies max'."""
  if not text:
    return None
  metric, _, mode = text.partition(' ')
  if mode not in ('max', 'min'):
    raise ValueError(f"config.checkpoint.keep_best must look like 'eval/loss min', got {text!r}")
  return metric, mode


def optimizer_scalars(c: ConfigDict, steps: int) -> dict[str, Any]:
  """The numbers of `config.optimizer`, its learning rate a schedule over `steps`."""
  warmup = float(np.floor(c.warmup * steps))
  peak, final = float(c.learning_rate), float(c.final * c.learning_rate)
  schedules: Mapping[str, Callable[[], Schedule]] = {
    'constant': lambda: constant(peak, warmup),
    'linear': lambda: warmup_linear(peak, warmup, steps, final),
    'cosine': lambda: warmup_cosine(peak, warmup, steps, final),
    'wsd': lambda: wsd(peak, warmup, steps, WSD_DECAY * steps, final),
  }
  if c.schedule not in schedules:
    raise ValueError(
      f'config.optimizer.schedule must be one of {sorted(schedules)}, got {c.schedule!r}'
    )
  return {
    'learning_rate': schedules[c.schedule](),
    'weight_decay': float(c.weight_decay),
    'b1': float(c.b1),
    'b2': float(c.b2),
    'eps': float(c.eps),
    'clip': float(c.clip) if c.clip else np.inf,
  }


def remember_reference(checkpoints: Checkpoints, initial: Params) -> Params:
  """The reference's parameters: saved once, read again by whoever resumes."""
  if checkpoints.has_reference():
    return checkpoints.restore_reference(jax.tree.map(lambda x: x.sharding, initial))
  checkpoints.save_reference(initial)
  return jax.tree.map(jnp.copy, initial)


def describe(console, config, model, params, train_set, eval_set, mesh, steps) -> None:
  """What is about to run, in a few lines."""
  count = sum(x.size for x in jax.tree.leaves(params))
  report = {k: v for k, v in train_set.report.items() if isinstance(v, int)}
  lengths = train_set.lengths.sum(1)
  axes = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1) or '1 device'
  held = f', {len(eval_set):,} held out' if eval_set is not None else ''
  for line in (
    f'objective  {config.objective}',
    f'model      {config.model}: {count / 1e6:,.1f} M parameters, {model.dtype.name} on {axes}',
    f'data       {config.data.train}: {train_set.kind}, {len(train_set):,} examples{held}; '
    f'{lengths.mean():.0f} tokens an example, at most {lengths.max()}',
    f'           {report}',
    f'steps      {steps} of {config.batch.size} examples',
  ):
    console.print(line, soft_wrap=True, markup=False, highlight=False)


class _Last:
  """An evaluation that remembers what it found."""

  def __init__(self, evaluate: Callable[[Params], dict[str, float]] | None):
    self._evaluate = evaluate
    self.metrics: dict[str, float] = {}

  def __call__(self, params: Params) -> dict[str, float]:
    assert self._evaluate is not None
    self.metrics = self._evaluate(params)
    return self.metrics


def _on_mesh(mesh: jax.sharding.Mesh, params: Params) -> Params:
  return jax.device_put(params, sharding.params_sharding(mesh, params))


def _abstract_state(optimizer, scalars, params: Params, ema: bool, mesh) -> TrainState:
  shapes = jax.eval_shape(lambda p: init_state(p, optimizer.init(scalars, p), ema=ema), params)
  shardings = sharding.params_sharding(mesh, shapes)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def reference_table(
  console, model: Model, params: Params, mesh, dataset: data.Dataset
) -> reference.Table:
  quiet = not console.is_terminal
  with rich.progress.Progress(console=console, transient=True, disable=quiet) as bar:
    task = bar.add_task('reference log-probs', total=None)
    return reference.build(
      model,
      params,
      dataset,
      cache.default_folder() / 'reference',
      mesh=mesh,
      progress=lambda done, total: bar.update(task, completed=done, total=total),
    )
