"""What a policy is held to: a stored table, a live model that stands still, or one that follows."""

from typing import Any, NamedTuple

import jax
import rich.progress
from ml_collections import ConfigDict

from jaxpref import data
from jaxpref.data import cache
from jaxpref.log_probs import CHUNK, DIVERGENCES, ActorCritic, policy_of, stacked
from jaxpref.models import Model
from jaxpref.objectives import Objective
from jaxpref.train import reference
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.state import TrainState
from jaxpref.typing import Array, Batch, Params

HOST = 'pinned_host'  # memory of the host that devices read without its help


class Sync(NamedTuple):
  """How a reference follows the policy: π_ref ← α π + (1 - α) π_ref after every n-th step.

  α = 1 is the hard update, a smaller one the soft update. See "Learn Your Reference Model for Real
  Good Alignment" (TR-DPO), Gorbatovski et al., eqs. 6 and 7: https://arxiv.org/abs/2404.09656.
  """

  mixup: Any  # α
  every: Any  # n, in steps

  def __call__(
    self, step: Array | int, applied: Array, params: Params, reference: Params
  ) -> Params:
    """The reference after a step, which counts where it was `applied`."""

    def mix(params: Params, reference: Params) -> Params:
      mean = lambda p, r: (self.mixup * p + (1 - self.mixup) * r).astype(r.dtype)  # noqa: E731
      return jax.tree.map(mean, params, reference)

    # Behind a branch the compiler cannot compute the policy again, rounded otherwise, to copy it.
    due = applied & ((step + 1) % self.every == 0)
    return jax.lax.cond(due, mix, lambda params, reference: reference, params, reference)


def attach(model: Model | ActorCritic, params: Params, batch: Batch, chunk: int = CHUNK) -> Batch:
  """The batch with `ref_logps` of a live reference, [M, G, B, K, T]."""
  # Ahead of the step's own pass: weights and norms may read them, as they may those of a table.
  found = stacked(policy_of(model), params, batch, chunk=chunk)
  return batch._replace(fields=batch.fields | {'ref_logps': found['logps']})


def reference_sync(config: ConfigDict) -> Sync | None:
  """How `config` moves the reference, or None where it stands still."""
  c = config.reference_sync
  if config.reference not in ('table', 'live'):
    raise ValueError(f"config.reference must be 'table' or 'live', got {config.reference!r}")
  if not c.every:
    return None
  if config.reference == 'table':
    raise ValueError(
      f'config.reference_sync.every={c.every} moves the reference, but its log-probs are a table; '
      'set config.reference=live'
    )
  if c.every < 1 or not 0 < c.mixup <= 1:
    raise ValueError(
      f'config.reference_sync needs every >= 1 and 0 < mixup <= 1, got {c.every} and {c.mixup}'
    )
  return Sync(float(c.mixup), int(c.every))


def memory_kind(config: ConfigDict) -> str | None:
  """The kind of memory that a live reference waits in; None: the devices' own.

  Raises:
    ValueError: no such memory, or there is no live reference.
  """
  if config.reference_memory == 'device':
    return None
  if config.reference_memory != 'host':
    raise ValueError(
      f"config.reference_memory must be 'device' or 'host', got {config.reference_memory!r}"
    )
  if config.reference != 'live' and not config.rewards:
    raise ValueError(
      "config.reference_memory='host' moves a live reference out of the way, and there is a table; "
      "set config.reference='live' or leave reference_memory at 'device'"
    )
  return HOST


def is_read(objective: Objective) -> bool:
  """Whether the loss reads a reference."""
  return bool(objective.fields & {'ref_logps', *DIVERGENCES})


def in_state(config: ConfigDict, objective: Objective) -> bool:
  """Whether the state holds a reference that stands still, which the step reads."""
  if config.rewards:  # samples bring its log-probs along
    return bool(objective.fields & DIVERGENCES.keys())
  live = config.reference == 'live' and not config.reference_sync.every
  return live and is_read(objective)


def check_read(config: ConfigDict, objective: Objective) -> None:
  """Raises ValueError where the objective cannot use the reference that `config` describes."""
  divergences = sorted(objective.fields & DIVERGENCES.keys())
  if divergences and config.reference == 'table':
    raise ValueError(
      f'config.objective={objective} needs {divergences}, over the whole vocabulary: set '
      "config.reference='live', as a table holds the log-probs of the data's tokens alone"
    )
  if config.reference_sync.every and not is_read(objective):
    raise ValueError(
      f'config.reference_sync.every={config.reference_sync.every} moves a reference, but nothing '
      f'reads a reference in config.objective={objective}; set it to 0'
    )


def standing_reference(
  state: TrainState, first: Params, shardings: Params, checkpoints: Checkpoints
) -> Params | None:
  """The parameters of a reference that stands still: the policy that the run began with.

  They are saved once, so whoever resumes has the same even if the folder that they came from has
  changed since. None where the reference moves: it is then a part of the state.

  Args:
    state: of the run, before its first step or as resumed.
    first: the parameters to save if none are.
    shardings: of these parameters.
    checkpoints: of the run.
  """
  if not checkpoints.has_reference():
    if int(state.step):
      raise ValueError(f'the run resumes at step {int(state.step)}, but its reference/ is gone')
    checkpoints.save_reference(first)
  if state.reference is not None:
    return None
  # Read onto the devices first, which orbax knows how to do, and then moved to where they wait.
  near = jax.tree.map(lambda s: s.with_memory_kind('device'), shardings)
  return jax.device_put(checkpoints.restore_reference(near), shardings)


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
