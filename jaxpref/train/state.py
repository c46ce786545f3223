"""What a run carries from step to step: one pytree, donated to the step, checkpointed whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.typing import Array, Params


class TrainState(NamedTuple):
  """`params` float32 masters; `ema` None or their running average; scalars are int32 arrays."""

  step: Array  # optimizer steps attempted so far
  params: Params
  opt_state: Any
  ema: Params | None
  skipped: Array  # consecutive steps not applied because loss or gradient was not finite


def init_state(params: Params, opt_state: Any, *, ema: bool = False) -> TrainState:
  zero = jnp.zeros((), jnp.int32)
  copy = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(zero, params, opt_state, copy, jnp.copy(zero))
