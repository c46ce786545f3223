"""Numbers with their uncertainty: means, paired differences, win rates, KL from samples.

The unit of resampling is the prompt: samples of one prompt share its difficulty, so arrays
[prompts, samples] are averaged over samples first, and only the spread between prompts counts.
Plain numpy on the host.
"""

import dataclasses
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value with its interval [low, high], from n independent units (prompts)."""

  value: float
  low: float
  high: float
  n: int

  def __format__(self, spec: str) -> str:
    """'0.123 [0.100, 0.150]' with the given number format for all three (default '.3f')."""
    spec = spec or '.3f'
    return f'{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]'

  def __str__(self) -> str:
    return format(self)


def mean(values, level: float = LEVEL) -> Estimate:
  """Mean of values [n] or [n, samples] with the normal interval, mean ± z·s/√n.

  Good from about 30 units on, whatever their distribution. A single unit has no spread to measure,
  so its interval is infinite.
  """
  values = _units('values', values)
  n = len(values)
  error = values.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
  half = _z(level) * error
  return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half), n)


def difference(after, before, level: float = LEVEL) -> Estimate:
  """Mean of `after - before` over the same prompts, each [n] or [n, samples].

  Paired: what makes a prompt easy or hard cancels, so the interval is narrower than that of two
  separate means.
  """
  after, before = _pair('after', after, 'before', before)
  return mean(after - before, level)


def win_rate(ours, theirs, level: float = LEVEL) -> Estimate:
  """How often `ours` scores above `theirs`, [n] or [n, samples]; a tie counts one half.

  Wilson's score interval (https://doi.org/10.2307/2276774), not a bootstrap: at 0 or 1 wins of n a
  bootstrap's interval has no width, and Wilson's is right there. It assumes the variance p(1 - p);
  ties and averages over samples have less, so it is then a little wide, never too narrow.
  Samples of one prompt are compared one to one before averaging.
  """
  ours, theirs = _same_shape('ours', ours, 'theirs', theirs)
  wins = _units('wins', (ours > theirs) + 0.5 * (ours == theirs))
  n, p, z = len(wins), float(wins.mean()), _z(level)
  centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  return Estimate(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)), n)


def bootstrap(
  statistic: Callable[..., float],
  *arrays,
  seed: int = 0,
  resamples: int = 2000,
  level: float = LEVEL,
) -> Estimate:
  """`statistic(*arrays)` with a percentile bootstrap over the first axis, which all arrays share.

  For what has no interval in closed form: ratios, quantiles, correlations. The arrays are resampled
  together, so pairs stay pairs.
  """
  values = [np.asarray(array) for array in arrays]
  sizes = {len(value) for value in values}
  if len(sizes) != 1 or sizes == {0}:
    raise ValueError(f'bootstrap: expected arrays of one length > 0, got {sorted(sizes)}')
  (n,) = sizes
  rows = np.random.Generator(np.random.Philox(seed)).integers(n, size=(resamples, n))
  drawn = [statistic(*(value[row] for value in values)) for row in rows]
  low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
  return Estimate(float(statistic(*values)), float(low), float(high), n)


@dataclasses.dataclass(frozen=True)
class KL:
  """KL(policy ‖ reference) in nats per sequence, by two estimators on the same samples."""

  k1: Estimate
  k3: Estimate


def kl(logps, ref_logps, mask, level: float = LEVEL) -> KL:
  """Sequence KL from completions sampled from the policy itself at temperature 1, untruncated.

  logps, ref_logps: per-token log-probabilities [n, T] or [n, samples, T]; mask: bool, the same
  shape, True on completion tokens (the end token included).

    k1 = Σₜ (logpₜ - ref_logpₜ)           unbiased, may be negative
    k3 = Σₜ (exp(-dₜ) - 1 + dₜ), dₜ the same differences; never negative, less spread near 0

  Names from http://joschu.net/blog/kl-approx.html. Both are unbiased for the sequence: its KL is
  the expected sum of the per-token KLs, and each term estimates one of them. Where the policy has
  moved far, k3's exponential is rare and huge, so prefer k1 there. The exponent is clamped at 50.
  """
  logps, ref_logps = _same_shape('logps', logps, 'ref_logps', ref_logps)
  mask, _ = _same_shape('mask', mask, 'logps', logps)
  d = np.subtract(logps, ref_logps, out=np.zeros_like(logps), where=mask > 0)
  k3 = np.expm1(np.minimum(-d, 50.0)) + d
  return KL(k1=mean(d.sum(-1), level), k3=mean(k3.sum(-1), level))


def _z(level: float) -> float:
  if not 0 < level < 1:
    raise ValueError(f'level: expected a number in (0, 1), got {level}')
  return NormalDist().inv_cdf((1 + level) / 2)


def _units(name: str, values) -> np.ndarray:
  """float64 [n], samples of a unit averaged."""
  values = np.asarray(values, np.float64)
  if values.ndim not in (1, 2) or not values.size:
    raise ValueError(f'{name}: expected shape [n] or [n, samples], n > 0, got {list(values.shape)}')
  return values if values.ndim == 1 else values.mean(1)


def _pair(name_a: str, a, name_b: str, b) -> tuple[np.ndarray, np.ndarray]:
  a, b = _units(name_a, a), _units(name_b, b)
  if len(a) != len(b):
    raise ValueError(f'{name_a}, {name_b}: expected the same prompts, got {len(a)} and {len(b)}')
  return a, b


def _same_shape(name_a: str, a, name_b: str, b) -> tuple[np.ndarray, np.ndarray]:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape:
    raise ValueError(
      f'{name_a}, {name_b}: expected equal shapes, got {list(a.shape)} and {list(b.shape)}'
    )
  return a, b
