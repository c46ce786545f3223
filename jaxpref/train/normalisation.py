"""Where a reward model's scores lie: their mean and std over reference completions.

Bradley-Terry leaves rewards free by a number, so the mean is taken off where they are used
("Learning to summarize from human feedback", Stiennon et al., section 3.4:
https://arxiv.org/abs/2009.01325, sets it to 0 on the reference summaries). It stands beside the
weights, in a run's workdir or an exported folder:

  normalisation.json   {"mean": -0.4, "std": 1.7, "completions": 2048, "step": 400}
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import data, hosts
from jaxpref.data.batches import Batches, Packing
from jaxpref.log_probs import REWARDS, stacked
from jaxpref.models import Model
from jaxpref.objectives.candidates import last_scored
from jaxpref.storage import write_atomically
from jaxpref.typing import Array, Batch, Params

FILE = 'normalisation.json'
EXAMPLES = 2048  # of the training set, evenly spaced, whose completions are the reference


@dataclasses.dataclass(frozen=True)
class Normalisation:
  """Mean and std of a model's scores of reference completions; `step` is the run's.

  Of a model with several heads they are tuples, one number a head.
  """

  mean: float | tuple[float, ...]
  std: float | tuple[float, ...]
  completions: int
  step: int

  def __str__(self) -> str:
    shown = lambda each: ', '.join(f'{x:.3f}' for x in np.atleast_1d(each))  # noqa: E731
    return f'mean {shown(self.mean)} and std {shown(self.std)}'


def measure(
  model: Model,
  params: Params,
  batches: Batches,
  step: int = 0,
  *,
  place: Callable[[Batch], Batch] = lambda batch: batch,
) -> Normalisation:
  """Of all completions of one pass of `batches`, in float64.

  Raises:
    ValueError: they hold no completion with scored tokens, or a score is not finite.
  """
  compute = jax.jit(functools.partial(_finals, model))
  found = [hosts.whole(compute(params, place(batches[i]))) for i in range(len(batches))]
  scores = np.concatenate([final[present] for final, present in found]).astype(np.float64)
  if not len(scores) or not np.isfinite(scores).all():
    raise ValueError(f'no mean of {len(scores)} scores, of which all should be finite')
  mean, std = (_plain(found.tolist()) for found in (scores.mean(0), scores.std(0)))
  return Normalisation(mean, std, len(scores), step)


def _plain(value: Any) -> Any:
  """Lists as tuples, so that they compare and hash."""
  return tuple(value) if isinstance(value, list) else value


def reference_batches(dataset: data.Dataset, size: int, groups: int, packing: Packing) -> Batches:
  """One pass over at most `EXAMPLES` examples of `dataset`."""
  chosen = np.linspace(0, len(dataset) - 1, min(EXAMPLES, len(dataset))).round().astype(int)
  part = dataset.select(chosen)
  return Batches(part, -(-min(size, len(part)) // groups) * groups, None, 1, groups, packing)


def write(folder: Any, found: Normalisation) -> None:
  if jax.process_index() == 0:
    write_atomically(folder / FILE, json.dumps(dataclasses.asdict(found), indent=2) + '\n')


def read(folder: Any) -> Normalisation | None:
  """What stands in `folder`, None where nothing does.

  Raises:
    ValueError: the file is not what `write` writes.
  """
  file = folder / FILE
  if not file.is_file():
    return None
  try:
    written = json.loads(file.read_text(encoding='utf-8'))
    found = Normalisation(**{key: _plain(value) for key, value in written.items()})
    if not np.isfinite([found.mean, found.std]).all() or np.min(found.std) < 0:
      raise ValueError(f'mean {found.mean} and std {found.std}')
  except (ValueError, TypeError) as error:
    raise ValueError(f'{file} should hold mean, std, completions and step: {error}') from error
  return found


def of_step(folder: Any, step: int | None) -> Normalisation | None:
  """What stands in a workdir, if it is of that step's checkpoint."""
  found = read(folder)
  return found if found and found.step == step else None


def _finals(model: Model, params: Params, batch: Batch) -> tuple[Array, Array]:
  """(completions' scores [M*G*B, K], or [M*G*B, K, n] of n heads, and which are there)."""
  scores, mask = stacked(model, params, batch, (REWARDS,))[REWARDS], batch.fields['mask']
  scores, mask = (x.reshape(-1, *x.shape[3:]) for x in (scores, mask))
  finals = last_scored
  if scores.ndim > mask.ndim:
    finals = jax.vmap(last_scored, (-1, None), -1)
  return finals(scores, mask), jnp.any(mask, axis=-1)
