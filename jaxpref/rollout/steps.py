"""Steps of a completion, as process reward models judge them, and one number of their verdicts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxpref.data.records import STEP

Reduce = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Steps:
  """How a completion is judged by its steps.

  Attributes:
    reduce: probabilities [steps, heads] -> [heads], such as `least`.
    separator: what stands between steps; each ends with its own.
  """

  reduce: Reduce
  separator: str = STEP

  def __post_init__(self):
    if not isinstance(self.separator, str) or not self.separator:
      raise ValueError(f'steps are told apart by a text that is not empty, got {self.separator!r}')

  def divide(self, text: str) -> tuple[str, tuple[int, ...]]:
    """(the text, where its steps end), laid out as the steps of training data are.

    Blank steps are none. The last need not be complete: what the length limit cut off counts.

    Raises:
      ValueError: there is no step.
    """
    ends, at = [], 0
    for part in text.split(self.separator):
      at = min(at + len(part) + len(self.separator), len(text))
      if part.strip():
        ends.append(at)
    if not ends:
      raise ValueError(f'there is no step in the completion {text[:80]!r}')
    if ends[-1] == len(text) and not text[-1].isspace():
      text, ends[-1] = text + STEP, len(text) + len(STEP)
    return text, tuple(ends)


def least(probabilities: np.ndarray) -> np.ndarray:
  """minₜ pₜ, the worst step's: [steps, ...] -> [...].

  "Math-Shepherd", Wang et al., section 3.4: https://arxiv.org/abs/2312.08935.
  """
  return probabilities.min(axis=0)


def product(probabilities: np.ndarray) -> np.ndarray:
  """Πₜ pₜ, that every step is right: [steps, ...] -> [...].

  "Let's Verify Step by Step", Lightman et al., section 2.6: https://arxiv.org/abs/2305.20050.
  """
  return probabilities.prod(axis=0)


def last(probabilities: np.ndarray) -> np.ndarray:
  """The last step's, of models whose verdict is on all so far: [steps, ...] -> [...].

  "Scaling LLM Test-Time Compute", Snell et al., section 5.1: https://arxiv.org/abs/2408.03314.
  """
  return probabilities[-1]


REDUCTIONS: Mapping[str, Reduce] = {'min': least, 'product': product, 'last': last}
