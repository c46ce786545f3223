"""Evaluates weighted rewards on samples; what fails is named and masked, what is done is kept."""

import logging
import math
import numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpref.rewards.base import Sample, Score, Term, check
from jaxpref.rewards.calls import limited

log = logging.getLogger(__name__)

EXCERPT = 80  # characters of a prompt in a message


@dataclass(frozen=True)
class Failure:
  """A sample that a reward could not score, and why."""

  reward: str
  sample: int
  prompt: str  # an excerpt
  error: str

  def __str__(self) -> str:
    return f'reward {self.reward!r} failed on sample {self.sample} ({self.prompt!r}): {self.error}'


@dataclass(frozen=True, eq=False)
class Scores:
  """What N samples got from J rewards."""

  names: tuple[str, ...]  # [J]
  weights: np.ndarray  # [J] float32
  values: np.ndarray  # [N, J] float32; NaN where a reward does not apply or failed
  combined: np.ndarray  # [N] float32, the weighted sum of what applies; NaN where not valid
  valid: np.ndarray  # [N] bool; a reward with a weight applies, and none with a weight failed
  failures: tuple[Failure, ...]

  def metrics(self) -> dict[str, float]:
    """Each reward's mean, std and share of samples it scored, and the sum's, over what counts.

    Means and stds over no sample at all are left out.
    """
    columns = {f'rewards/{name}': self.values[:, j] for j, name in enumerate(self.names)}
    result = {}
    for name, column in {**columns, 'reward': self.combined}.items():
      counted = column[~np.isnan(column)].astype(np.float64)
      if len(counted):
        result[f'{name}/mean'] = float(np.mean(counted))
        result[f'{name}/std'] = float(np.std(counted))
      if len(column):
        result[f'{name}/scored'] = len(counted) / len(column)
    return result


def evaluate(
  terms: Sequence[Term], samples: Sequence[Sample], timeout: float | None = 60.0
) -> Scores:
  """The scores of every sample by every reward, and their weighted sum.

  A reward is called once for all samples. If that raises or takes too long, it is called again for
  each sample alone (for all samples of a prompt, if the reward has `by_prompt`), so that only those
  fail that have to. The second round takes `timeout` in all, too: a sample gets twice its equal
  share of what is left. A failed sample is not valid unless the reward's weight is 0; a score that
  is NaN, infinite or an exception fails too. A call that runs out of time goes on in the background
  (see `calls`), possibly beside the second round's. A reward that says `untimed` of itself, such as
  a model on a mesh, has no limit and runs on the caller's thread.

  Args:
    terms: rewards with weights, as `parse` gives them.
    samples: N completions; samples of a prompt stand together.
    timeout: seconds for a reward's call on all samples, above 0; None is no limit.

  Raises:
    TypeError: a reward returned something that is not a sequence of scores.
    ValueError: a reward returned another number of scores than samples; two rewards share a name;
      all weights are 0; or `timeout` is not above 0.
  """
  check(terms)
  if timeout is not None and not timeout > 0:
    raise ValueError(f'timeout={timeout}: seconds that a reward may take, above 0, or None')
  values = np.full((len(samples), len(terms)), np.nan, np.float32)
  failed = np.zeros(values.shape, bool)
  failures = []
  for j, term in enumerate(terms):
    for i, score in enumerate(_scores(term, samples, timeout) if samples else ()):
      if isinstance(score, Exception):
        failed[i, j] = True
        failures.append(_failure(term, i, samples[i], score))
      elif score is not None:
        values[i, j] = score
    _report(term, samples, values[:, j], failures)
  weights = np.array([term.weight for term in terms], np.float32)
  counted = weights != 0
  applies = ~np.isnan(values)
  valid = np.any(applies & counted, axis=1) & ~np.any(failed & counted, axis=1)
  total = np.sum(np.where(applies & counted, values.astype(np.float64) * weights, 0), axis=1)
  combined = np.where(valid, total, np.nan).astype(np.float32)
  names = tuple(term.name for term in terms)
  return Scores(names, weights, values, combined, valid, tuple(failures))


def _scores(term: Term, samples: Sequence[Sample], timeout: float | None) -> list[Score]:
  """A float, None or an Exception for each sample."""
  try:
    answer = _ask(term, samples, timeout)
  except Exception as error:
    units = _units(term, samples)
    if len(units) == 1:
      return [error] * len(samples)
    if isinstance(error, TimeoutError):
      log.warning('reward %r: %s; now sample by sample', term.name, error)
  else:
    return _checked(term, answer, range(len(samples)))
  scores: list[Score] = [None] * len(samples)
  end = time.monotonic() + timeout if timeout is not None else None
  for done, unit in enumerate(units):
    # Twice the equal share: a slow sample may take more, and no number of them takes all.
    left = len(units) - done
    seconds = None if end is None else max(2 * (end - time.monotonic()) / (left + 1), 1e-3)
    try:
      answer = _ask(term, [samples[i] for i in unit], seconds)
    except Exception as error:
      answer = [error] * len(unit)
    for i, score in zip(unit, _checked(term, answer, unit), strict=True):
      scores[i] = score
  return scores


def _units(term: Term, samples: Sequence[Sample]) -> list[list[int]]:
  """Indices of the samples that a reward has to see together."""
  if not term.traits.by_prompt:
    return [[i] for i in range(len(samples))]
  units: dict[str, list[int]] = {}
  for i, sample in enumerate(samples):
    units.setdefault(sample.prompt, []).append(i)
  return list(units.values())


def _ask(term: Term, samples: Sequence[Sample], seconds: float | None) -> Any:
  def call() -> Any:
    # Lists and records of its own: what a reward does to them is its own affair.
    prompts = [sample.prompt for sample in samples]
    completions = [sample.completion for sample in samples]
    try:
      scores = term.reward(prompts, completions, [sample.columns() for sample in samples])
    except SystemExit as error:
      raise RuntimeError(f'it called exit({error.code})') from error
    # An array on a device is waited for here, inside the limit.
    return np.asarray(scores).tolist() if hasattr(scores, '__array__') else scores

  return limited(call, None if term.traits.untimed else seconds)


def _checked(term: Term, answer: Any, indices: Sequence[int]) -> list[Score]:
  count = len(indices)
  if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
    raise TypeError(
      f'reward {term.name!r} must return a list of {count} scores, one a sample; it returned '
      f'{type(answer).__name__} {answer!r:.80}'
    )
  if len(answer) != count:
    raise ValueError(f'reward {term.name!r} returned {len(answer)} scores for {count} samples')
  return [_score(term, i, score) for i, score in zip(indices, answer, strict=True)]


def _score(term: Term, index: int, score: Any) -> Score:
  if score is None or isinstance(score, Exception):
    return score
  if not isinstance(score, numbers.Real | np.bool_) and getattr(score, 'ndim', None) != 0:
    raise TypeError(
      f'reward {term.name!r}, sample {index}: a score is a number, None (does not apply) or an '
      f'exception (failed), got {type(score).__name__} {score!r:.80}'
    )
  try:
    value = float(score)
    with np.errstate(over='ignore'):
      finite = math.isfinite(np.float32(value))
  except Exception as error:
    return error
  return value if finite else ValueError(f'the score is {value}; None says that none applies')


def _failure(term: Term, index: int, sample: Sample, error: Exception) -> Failure:
  text = f'{type(error).__name__}: {error}'
  return Failure(term.name, index, sample.prompt[-EXCERPT:], text[:400])


def _report(
  term: Term, samples: Sequence[Sample], values: np.ndarray, failures: Sequence[Failure]
) -> None:
  own = [failure for failure in failures if failure.reward == term.name]
  if own:
    log.warning('%s; %d of %d samples failed, masked', own[0], len(own), len(samples))
  elif samples and np.all(np.isnan(values)):
    log.warning(
      'reward %r applies to none of %d samples; the first record has %s',
      term.name,
      len(samples),
      ', '.join(map(str, samples[0].columns())),
    )
