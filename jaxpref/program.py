"""What a run computes over and over: its train step, and the state that the step takes.

`run` makes it to train with, `plan` to look at what it would cost.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxpref import sharding
from jaxpref.log_probs import CHUNK, ActorCritic, policy_of, policy_params
from jaxpref.models import Model
from jaxpref.objectives import Objective, Schedule, constant, warmup_cosine, warmup_linear, wsd
from jaxpref.train import anchor
from jaxpref.train import lora as adapters
from jaxpref.train.anchor import Sync
from jaxpref.train.optimizer import Optimizer, Scalars
from jaxpref.train.state import TrainState, init_state
from jaxpref.train.step import Hparams, make_step, reported
from jaxpref.typing import Params

WSD_DECAY = 0.2  # share of the steps over which 'wsd' falls
SHARED_CHUNK = 1024  # of a head in shards: what gathering it costs is then little beside its use


class Program(NamedTuple):
  """Attributes:
  begin: what trains of the parameters (`lora.split`) -> the state before the first step.
  state: its shapes, with where each array lives.
  reference: likewise of a reference that stands still and is live, or of what adapters adapt: a
    part of the state then.
  step: jitted, its state donated; `hparams` is its last argument.
  """

  begin: Callable[[Params], TrainState]
  state: TrainState
  reference: Params
  step: Any
  hparams: Hparams
  chunk: int


def assemble(
  config: ConfigDict,
  objective: Objective,
  model: Model | ActorCritic,
  steps: int,
  mesh: jax.sharding.Mesh,
  *,
  live: bool = False,
) -> Program:
  """The program of `config` on `mesh`; nothing is computed or compiled.

  Args:
    steps: of the run, for its schedules.
    live: the state will hold a reference that stands still.
  """
  optimizer = Optimizer(config.optimizer.name, tuple(config.freeze), config.optimizer.dtype)
  scalars = optimizer_scalars(config.optimizer, steps)
  sync = anchor.reference_sync(config)
  begin = functools.partial(_begin, optimizer, scalars, objective, config.ema > 0, sync)
  lora = adapters.chosen(config)
  split = functools.partial(adapters.split, lora, seed=0, dtype=policy_of(model).dtype)
  base, trained = jax.eval_shape(split, model.param_shapes())
  state = placed(mesh, jax.eval_shape(begin, trained))
  kind = anchor.memory_kind(config)
  still = placed(mesh, base) if lora else policy_params(state.params)
  reference = jax.tree.map(lambda x: _kept_in(x, kind), still)
  if sync:
    state = state._replace(reference=reference)
  whole = state._replace(reference=reference) if live or lora else state
  extra = reported(model) if config.log.entropy else ()
  chunk = config.batch.chunk or (SHARED_CHUNK if mesh.shape['fsdp'] > 1 else CHUNK)
  step = jax.jit(
    make_step(model, optimizer, extra=extra, chunk=chunk, lora=lora),
    donate_argnums=0,
    # Every process reads all metrics, so all of them are everywhere; the state stays where it is.
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, whole),
      jax.sharding.NamedSharding(mesh, jax.P()),
    ),
  )
  hparams = Hparams(objective, scalars, config.ema, sync)
  return Program(begin, state, reference, step, hparams, chunk)


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


def placed(mesh: jax.sharding.Mesh, shapes: Any) -> Any:
  """Shapes with where each array lives."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.params_sharding(mesh, shapes),
  )


def _kept_in(x: jax.ShapeDtypeStruct, kind: str | None) -> jax.ShapeDtypeStruct:
  if kind is None:
    return x
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(kind))


def _begin(
  optimizer: Optimizer,
  scalars: Scalars,
  objective: Objective,
  ema: bool,
  sync: Sync | None,
  params: Params,
) -> TrainState:
  masters = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  moving = jax.tree.map(jnp.copy, policy_params(masters)) if sync else None
  opt_state = optimizer.init(scalars, masters)
  return init_state(masters, opt_state, ema=ema, reference=moving, objective=objective)
