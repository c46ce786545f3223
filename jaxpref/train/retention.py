"""Which checkpoints stay on disk: the newest ones, to go on from, and the best one, to use."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class Retention:
  """Orbax's preservation policy that keeps the newest `last` and, by `best`, one more.

  `best` is None or (metric, 'max' | 'min').
  """

  def __init__(self, last: int, best: tuple[str, str] | None):
    if last < 1:
      raise ValueError(f'keep_last={last}: a run resumes from its newest checkpoint; keep >= 1')
    if best is not None and (len(best) != 2 or best[1] not in ('max', 'min')):
      raise ValueError(f"keep_best={best!r}: expected (metric, 'max') or (metric, 'min')")
    self._last, self._best = last, best
    self._scores: dict[int, float] = {}

  def note(self, step: int, metrics: Mapping[str, float]) -> None:
    if self._best is not None and self._best[0] in metrics:
      score = metrics[self._best[0]] * (1 if self._best[1] == 'max' else -1)
      if not math.isnan(score):
        self._scores[step] = score

  def forget(self, step: int) -> None:
    self._scores.pop(step, None)

  def best(self, steps: Sequence[int]) -> int | None:
    """Of equal ones the newest."""
    scored = [step for step in steps if step in self._scores]
    return max(scored, key=lambda step: (self._scores[step], step), default=None)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = sorted(one.step for one in checkpoints)
    kept = {*steps[-self._last :], self.best(steps)}
    return [one.step in kept for one in checkpoints]
