"""What a loss function returns: terms left unreduced, and diagnostics left per example."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from jaxpref import masked
from jaxpref.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metric:
  """A diagnostic before it is reduced, so that any split of the batch gives the same number.

  `values` and `weights` have one shape, [B] as a rule; `reduce(values, weights) -> scalar` is a
  named function of `jaxpref.masked`, applied once to the whole batch, with or without leading
  microbatch axes.
  """

  values: Array
  weights: Array
  reduce: Callable[[Array, Array], Array] = field(default=masked.mean, metadata={'static': True})


class Loss(NamedTuple):
  """An unreduced loss: Σ terms * weights / norm.

  `terms` and `weights` share a shape [B], [B, K] or [B, K, T]; `norm` is a scalar that adds over
  microbatches and need not be Σ weights. Unless the objective is coupled, `weights` and `norm`
  depend on the batch alone, never on what the model computes.
  """

  terms: Array
  weights: Array
  norm: Array
  metrics: Mapping[str, Metric] = {}


def per_example(loss: Loss, norm: Array) -> Array:
  """Each example's share of the loss, [B]."""
  axes = tuple(range(1, loss.terms.ndim))
  return masked.sum(loss.terms, loss.weights, axes) / masked.at_least_tiny(norm)


def reduce_metrics(metrics: Mapping[str, Metric]) -> dict[str, Array]:
  """Every metric as a scalar; values may have leading microbatch axes."""
  return {name: metric.reduce(metric.values, metric.weights) for name, metric in metrics.items()}
