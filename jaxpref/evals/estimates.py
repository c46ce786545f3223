"""Intervals for an objective's metrics, from what the metrics are per example.

The unit is the prompt: examples that share one are not independent draws.
"""

from collections.abc import Mapping

import numpy as np

from jaxpref import masked
from jaxpref.evals import statistics
from jaxpref.evals.statistics import Estimate
from jaxpref.objectives import Metric


def estimates(metrics: Mapping[str, Metric], prompts: np.ndarray) -> dict[str, Estimate]:
  """A 95 % interval for every metric that is a mean over examples; others have none here.

  Args:
    metrics: per example [n], as `Objective.partial` gives them for the whole set.
    prompts: [n], equal where two examples share their prompt.
  """
  _, units = np.unique(prompts, return_inverse=True)
  found = {}
  for name, metric in metrics.items():
    values, weights = np.asarray(metric.values), np.asarray(metric.weights)
    if metric.reduce is masked.mean and values.shape == units.shape and weights.any():
      found[name] = ratio(np.bincount(units, values * weights), np.bincount(units, weights))
  return found


def ratio(totals: np.ndarray, weights: np.ndarray) -> Estimate:
  """Σ totals / Σ weights, both [prompts], with its interval; prompts of weight 0 do not count.

  Shares of prompts that count once each get Wilson's interval. Else the ratio r is linearised,
  rᵢ = r + (totalᵢ - r·weightᵢ) / mean weight, and gets the interval of the mean of the rᵢ (the
  usual delta method for cluster samples, W. G. Cochran, Sampling Techniques, ch. 6).
  """
  counted = weights > 0
  totals, weights = totals[counted], weights[counted]
  if (weights == 1).all() and np.isin(totals, (0, 1)).all():
    return statistics.win_rate(totals, np.full_like(totals, 0.5))
  r = totals.sum() / weights.sum()
  return statistics.mean(r + (totals - r * weights) / weights.mean())
