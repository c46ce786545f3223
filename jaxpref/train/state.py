"""What a run carries from step to step: one pytree, donated to the step, checkpointed whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.objectives import Memory, Objective
from jaxpref.typing import Array, Params


class TrainState(NamedTuple):
  """`params` float32 masters; `ema` None or their running average; scalars are int32 arrays.

  `reference` are the parameters of a live reference (None: log-probs come with the batch, or none
  are needed), or what `params` adapt (see `lora`), which is one too; `memory` is what the objective
  remembers (`Objective.init`); `carry` is the source's, between runs of the loop.
  """

  step: Array  # optimizer steps attempted so far
  params: Params
  opt_state: Any
  ema: Params | None
  skipped: Array  # consecutive steps not applied because loss or gradient was not finite
  reference: Params | None
  memory: Memory
  carry: Any = None


def init_state(
  params: Params,
  opt_state: Any,
  *,
  ema: bool = False,
  reference: Params | None = None,
  objective: Objective | None = None,
) -> TrainState:
  """The state before the first step; `objective` is asked for what it remembers."""
  zero = jnp.zeros((), jnp.int32)
  copy = jax.tree.map(jnp.copy, params) if ema else None
  memory = objective.init() if objective else {}
  return TrainState(zero, params, opt_state, copy, jnp.copy(zero), reference, memory)
