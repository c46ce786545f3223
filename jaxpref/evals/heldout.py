"""An objective's metrics on a whole held-out set, reduced once.

Fields [B, K, T] of all batches are joined before the objective sees them, so means, stds and
objectives that mix examples are those of the set, not means over batches.
"""

from collections.abc import Callable

import jax
import numpy as np

from jaxpref.data.batches import Batches
from jaxpref.models import Model
from jaxpref.objectives import Objective
from jaxpref.train.step import make_fields, model_fields
from jaxpref.typing import Array, Batch, Params


def heldout(
  model: Model,
  objective: Objective,
  batches: Batches,
  *,
  extra: tuple[str, ...] = ('entropy',),
  place: Callable[[Batch], Batch] = lambda batch: batch,
  prefix: str = 'eval/',
) -> Callable[[Params], dict[str, float]]:
  """evaluate(params) -> metrics of the objective over one pass of `batches`, and means of `extra`.

  Args:
    batches: unshuffled (seed None).
    extra: model fields whose mean over scored tokens is reported.
    place: puts a host batch on the devices.
  """
  supplied = tuple(place(batches[0]).fields)
  names = tuple(dict.fromkeys((*model_fields(objective, supplied), *extra)))
  compute = jax.jit(make_fields(model, names))
  reduce = jax.jit(lambda fields: objective(fields))

  def evaluate(params: Params) -> dict[str, float]:
    fields = collect(compute, params, batches, place)
    loss, metrics = reduce({k: v for k, v in fields.items() if k != 'ids'})
    count = max(int(fields['mask'].sum()), 1)
    means = {name: float(fields[name].sum()) / count for name in extra}
    values = {name: float(value) for name, value in metrics.items()} | means | {'loss': float(loss)}
    return {prefix + name: value for name, value in sorted(values.items())}

  return evaluate


def collect(
  compute: Callable[[Params, Batch], dict[str, Array]],
  params: Params,
  batches: Batches,
  place: Callable[[Batch], Batch] = lambda batch: batch,
) -> dict[str, np.ndarray]:
  """Fields of every example in the data set's order, [n, ...]."""
  parts = []
  for step in range(len(batches)):
    parts.append(jax.device_get(compute(params, place(batches[step]))))
  joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  order = np.argsort(joined['ids'], kind='stable')
  order = order[joined['ids'][order] >= 0]
  return {name: values[order] for name, values in joined.items()}
