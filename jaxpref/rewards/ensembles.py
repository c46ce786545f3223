"""Rewards of several rewards: ensembles, whose disagreement warns of what a policy may exploit.

minimum(reward_model('runs/rm0'), reward_model('runs/rm1'), reward_model('runs/rm2'))
minimum(reward_model('runs/rm'))   where that has several heads
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpref.rewards.base import Record, Reward, Score, each, traits_of


@dataclass(frozen=True, repr=False)
class Ensemble:
  """Scores a sample by what `aggregate` makes of its members' scores.

  A sample that a member could not score has no score, nor has one to which a member does not apply.

  Attributes:
    members: rewards on one scale that give two or more scores in all, such as reward models of
      different seeds, or one with several heads.
    aggregate: scores [N, members] -> [N].
    text: what it is called in text, with the keywords.
  """

  members: tuple[Reward, ...]
  aggregate: Callable[[np.ndarray], np.ndarray]
  text: tuple[str, str]

  def __post_init__(self):
    scores = sum(traits_of(member).heads for member in self.members)
    if scores < 2 or not all(callable(member) for member in self.members):
      raise ValueError(
        f'{self.text[0]}() takes two or more rewards, or a reward model of several heads, got '
        f'{self.members!r:.200}'
      )

  @property
  def __name__(self) -> str:
    return self.text[0]

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> list[Score]:
    found = [member(prompts, completions, records) for member in self.members]
    return each(self._one, *found)

  def _one(self, *scores: Score) -> Score:
    for score in scores:
      if isinstance(score, Exception):
        return score
    if any(score is None for score in scores):
      return None
    return float(self.aggregate(np.hstack(scores, dtype=np.float64)[None])[0])

  def __repr__(self) -> str:
    name, keywords = self.text
    return f'{name}({", ".join([*map(repr, self.members), *([keywords] if keywords else [])])})'


def mean(*rewards: Reward) -> Ensemble:
  """r = 1/M Σᵢ rᵢ, the members' mean."""
  return Ensemble(rewards, _mean, ('mean', ''))


def minimum(*rewards: Reward) -> Ensemble:
  """r = minᵢ rᵢ, the least of the members' scores ("worst-case optimization").

  Reward Model Ensembles Help Mitigate Overoptimization (Coste et al. 2023), section 3.2,
  https://arxiv.org/abs/2310.02743.
  """
  return Ensemble(rewards, _minimum, ('minimum', ''))


def penalised(*rewards: Reward, k: float = 1.0) -> Ensemble:
  """r = mean − k · std, less where the members disagree.

  The std is over the members, 1/M Σᵢ (rᵢ − mean)² under the root. Coste et al. take k times the
  variance off instead ("uncertainty-weighted optimization"); the std has the unit of the rewards,
  so k does not depend on it. https://arxiv.org/abs/2310.02743.

  Args:
    k: stds that are taken off; k >= 0.
  """
  return Ensemble(rewards, less_spread(k), ('penalised', f'k={k!r}'))


@dataclass(frozen=True)
class less_spread:
  """mean − k · std over the members, [N, M] -> [N]."""

  k: float

  def __post_init__(self):
    if not isinstance(self.k, int | float) or not 0 <= self.k < np.inf:
      raise ValueError(f'penalised(k) must be a number of at least 0, got {self.k!r}')

  def __call__(self, scores: np.ndarray) -> np.ndarray:
    return scores.mean(axis=1) - self.k * scores.std(axis=1)


def _mean(scores: np.ndarray) -> np.ndarray:
  return scores.mean(axis=1)


def _minimum(scores: np.ndarray) -> np.ndarray:
  return scores.min(axis=1)
