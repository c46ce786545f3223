"""A config and a folder in, a trained model in the folder out: `train(config, workdir)`.

This is where values become objects. Run it again with the same config and folder and it goes on
from the last checkpoint.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import rich.console
from ml_collections import ConfigDict

from jaxpref import data, hosts, offline, online, program, roles, sharding
from jaxpref.log_probs import policy_of, policy_params
from jaxpref.models import Model
from jaxpref.objectives import parse
from jaxpref.storage import is_url
from jaxpref.train import anchor, policy
from jaxpref.train import lora as adapters
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.feed import Evaluate, Feed
from jaxpref.train.host_log import HostLog
from jaxpref.train.loop import Run, fit
from jaxpref.train.preemption import Notice
from jaxpref.train.profiler import Profiler
from jaxpref.train.programs import keep_programs
from jaxpref.train.progress import open_progress
from jaxpref.train.state import TrainState
from jaxpref.train.throughput import peak_flops, train_flops
from jaxpref.train.watchdog import Watchdog
from jaxpref.train.workdir import Workdir, open_workdir
from jaxpref.train.writers import open_writers
from jaxpref.typing import Params


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
    Preempted: SIGTERM came; the step that it came in is finished and saved.
  """
  devices = roles.trainers(config, jax.devices())
  keep_programs()
  mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
  console = console or rich.console.Console()
  if jax.process_index() != 0:
    console = rich.console.Console(quiet=True)
  # The mesh is set so that activations stay with their groups (models/placement.py).
  with jax.set_mesh(mesh), Notice() as noticed, HostLog() as log:
    return _train(config, workdir, mesh, console, noticed, log)


def _train(
  config: ConfigDict,
  workdir: str | Path,
  mesh: jax.sharding.Mesh,
  console: rich.console.Console,
  noticed: Notice,
  log: HostLog,
) -> Trained:
  objective = parse(config.objective, imports=tuple(config.imports))
  keep_best = parse_keep_best(config.checkpoint.keep_best)
  profiler = open_profiler(config, workdir)
  sync, watchdog = anchor.reference_sync(config), Watchdog(config.log.stuck)
  anchor.memory_kind(config)  # a mistake in it comes before the data is read
  lora, whole = adapters.chosen(config), adapters.whole_of(config)
  tokenizer = policy.find_tokenizer(config.model, config.tokenizer)
  prepare = online.prepare if config.rewards else offline.prepare
  feed = hosts.together(lambda: prepare(config, objective, tokenizer, mesh, console))
  hosts.check_same({'data': feed.fingerprint, **config.to_dict()})
  steps, model = feed.steps, feed.model
  made = program.assemble(config, objective, model, steps, mesh, live=feed.live)
  abstract = made.state

  def claim() -> Workdir:
    folder = open_workdir(workdir, config)
    if jax.process_index() == 0:
      policy.remember(folder.path, config.model, tokenizer, heads=model.config.num_labels)
    return folder

  folder = hosts.in_turn(claim)  # only now that data and model are sound
  log.open(folder.path)
  checkpoints = Checkpoints(folder.path, keep_last=config.checkpoint.keep_last, keep_best=keep_best)
  shapes = model.param_shapes()
  summarise(console, config, feed, shapes, mesh)
  if lora:
    line = adapters.summary(lora, abstract.params, shapes)
    console.print(line, soft_wrap=True, markup=False, highlight=False)

  meta = {'data': feed.fingerprint}
  base: Params = {}
  if checkpoints.latest_step() is not None:
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    carry = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=everywhere),
      feed.carry,
    )
    state, saved = checkpoints.restore(abstract._replace(carry=carry))
    if saved['data'] != meta['data']:
      raise ValueError(
        f'{folder.path} was trained on other data than {config.data.train} holds now; '
        'restore the file, or choose another workdir'
      )
    state = state._replace(carry=jax.device_get(state.carry))
    console.print(f'resuming after step {int(state.step)}')
  else:
    make = jax.jit(made.begin, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
    base, trained = adapters.split(lora, feed.load(), config.seed, policy_of(model).dtype)
    places = jax.tree.map(lambda x: x.sharding, abstract.params)
    state = make(hosts.place(trained, places))._replace(carry=feed.carry)
    del trained

  reference = None
  if feed.needs_reference or sync or lora:
    first = base if lora else policy_params(state.params)
    own = jax.tree.map(lambda x: x.sharding, made.reference)
    reference = anchor.standing_reference(state, first, own, checkpoints)
    del first
  del base
  if lora:
    state = state._replace(reference=reference)
  state, source, found, finish = feed.open(
    state, reference if feed.needs_reference else None, folder.path
  )
  del reference  # it may have moved to devices of its own
  evaluate = found and _Last(found)
  start = int(state.step)
  writers = open_writers(
    folder,
    start,
    tensorboard=config.log.tensorboard,
    wandb=config.log.wandb,
    config=config.to_dict(),
  )
  progress = open_progress(steps, start, console=console)
  run = Run(
    step=made.step,
    source=source,
    hparams=made.hparams,
    stop=steps,
    writers=writers,
    progress=progress,
    checkpoints=checkpoints,
    meta=meta,
    place=functools.partial(hosts.place, sharding=sharding.batch_sharding(mesh)),
    whole=whole,
    evaluate=evaluate,
    noticed=noticed,
    persist=lambda state: state if sync else state._replace(reference=None),  # saved once, apart
    flops=functools.partial(train_flops, policy_of(model), frozen=lora is not None),
    peak=peak_flops(),
    log_every=config.log.every,
    eval_every=config.eval.every,
    save_every=config.checkpoint.every,
    max_nonfinite=config.max_nonfinite,
    origin=feed.origin,
    profiler=profiler,
  )
  try:
    with watchdog as watch:
      state = fit(dataclasses.replace(run, watch=watch), state)
    if evaluate and not evaluate.metrics:  # the run had ended before
      evaluate(state)
    if finish:
      finish(state, folder.path)
  finally:
    if profiler:
      profiler.close()
    progress.close()
    writers.close()
    checkpoints.close()
  console.print(f'trained {steps} steps; everything is in {folder.path}')
  metrics = evaluate.metrics if evaluate else {}
  return Trained(policy_of(model), policy_params(whole(state)), tokenizer, state, metrics)


def open_profiler(config: ConfigDict, workdir: str | Path) -> Profiler | None:
  """The profiler that `config.profile` asks for."""
  if not config.profile:
    return None
  if len(config.profile) != 2:
    raise ValueError(f'config.profile must be (first step, how many), got {config.profile}')
  if is_url(workdir):
    raise ValueError(
      f'config.profile={config.profile}: traces are written to a folder, and the workdir is at '
      f'{workdir}; profile a run with a workdir on a disk'
    )
  return Profiler(Path(workdir) / 'profile', *map(int, config.profile))


def parse_keep_best(text: str) -> tuple[str, str] | None:
  """('eval/rewards/accuracies', 'max') from 'eval/rewards/accuracies max'."""
  if not text:
    return None
  metric, _, mode = text.partition(' ')
  if mode not in ('max', 'min'):
    raise ValueError(f"config.checkpoint.keep_best must look like 'eval/loss min', got {text!r}")
  return metric, mode


def summarise(console, config, feed: Feed, shapes: Params, mesh) -> None:
  """What is about to run, in a few lines."""
  count = sum(x.size for x in jax.tree.leaves(shapes))
  axes = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1) or '1 device'
  model = policy_of(feed.model)
  dtype = np.dtype(model.dtype).name
  for line in (
    f'objective  {config.objective}',
    f'model      {config.model}: {count / 1e6:,.1f} M parameters, {dtype} on {axes}, '
    f'{"divided" if mesh.shape["context"] > 1 else model.attention_name} attention',
    *feed.summary,
  ):
    console.print(line, soft_wrap=True, markup=False, highlight=False)


class _Last:
  """An evaluation that remembers what it found."""

  def __init__(self, evaluate: Evaluate):
    self._evaluate = evaluate
    self.metrics: dict[str, float] = {}

  def __call__(self, state: TrainState) -> dict[str, float]:
    self.metrics = self._evaluate(state)
    return self.metrics
