"""What a policy's own completions of held-out prompts are worth."""

from collections.abc import Callable

import jax
import numpy as np

from jaxpref import hosts
from jaxpref.evals import statistics
from jaxpref.rollout.samples import Sampler, Scorer
from jaxpref.typing import Params

KEYS = 2**30  # random keys from here on are evaluation's


def sampled(
  sampler: Sampler,
  scorer: Scorer,
  size: int,
  *,
  cast: Callable[[Params], Params] = lambda params: params,
  prefix: str = 'eval/',
) -> Callable[..., dict[str, float]]:
  """evaluate(params, reference=None) -> metrics of completions of all of the sampler's prompts.

  `reference` are the parameters of the policy to compare with, for `win_rate`; None leaves it out.
  It is sampled once, the first time.

  The same keys each time, so evaluations differ by the policy alone. Means have 95 % intervals
  (`.../low`, `.../high`) over prompts.

  Args:
    sampler, scorer: as in training.
    size: prompts sampled at once.
    cast: parameters -> the sampler's copy of them.
  """
  prompts = sampler.prompts

  def scores(params: Params) -> tuple[np.ndarray, dict[str, float]]:
    """Scores [n, K], NaN where not valid, and the means of what was measured of each batch."""
    parts, weights, metrics = [], [], []
    own = cast(params)
    for start in range(0, len(prompts), size):
      ids = np.arange(start, min(start + size, len(prompts)))
      padded = np.resize(ids, size)  # the last batch has the others' shape
      samples = hosts.whole(sampler(own, padded.tolist(), (KEYS + padded).astype(np.int32)))
      count = len(ids)
      real = jax.tree.map(lambda x, count=count: x[:count], samples)
      scored = scorer(prompts, ids.tolist(), real)
      parts.append(np.where(scored.valid, scored.scores, np.nan))
      weights.append(len(ids))
      metrics.append(scored.metrics)
    names = [name for name in metrics[0] if not name.endswith(('/std', 'min_length', 'max_length'))]
    means = {
      name: float(np.average([m.get(name, np.nan) for m in metrics], weights=weights))
      for name in names
    }
    return np.concatenate(parts), means

  theirs: list[np.ndarray] = []

  def evaluate(params: Params, reference: Params | None = None) -> dict[str, float]:
    ours, means = scores(params)
    kept = np.isfinite(ours).all(1)
    values = means
    if reference is not None and not theirs:
      theirs.append(scores(reference)[0])
    if kept.any():
      found = {'reward/mean': statistics.mean(ours[kept])}
      for other in theirs:
        both = kept & np.isfinite(other).all(1)
        found['win_rate'] = statistics.win_rate(ours[both], other[both])
      for name, estimate in found.items():
        values |= {name: estimate.value, f'{name}/low': estimate.low, f'{name}/high': estimate.high}
    return {prefix + name: value for name, value in sorted(values.items())}

  return evaluate
