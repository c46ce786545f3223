"""Judges compare two completions; here their verdicts become scores.

A judge may be a person, a program, an API or a model: `compare(prompts, firsts, seconds)` gives for
each pair the probability that the first completion is better, or None where it has no verdict.

    judge = win_rate(both_orders(compare))  # in my_judges.py; a config says user('my_judges:judge')
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from jaxpref.rewards.base import Record, Score, each

log = logging.getLogger(__name__)


class Judge(Protocol):
  """Says how likely the first completion is the better answer; one verdict in [0, 1] a pair."""

  def __call__(
    self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], /
  ) -> Sequence[float | None]: ...


@dataclass(frozen=True)
class both_orders:
  """p = ½ (p(first, second) + 1 − p(second, first)): a judge without its bias for a position.

  Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena (Zheng et al. 2023), section 3.4, swaps
  positions likewise, https://arxiv.org/abs/2306.05685. None if either order has no verdict.
  """

  judge: Judge

  @property
  def members(self) -> tuple[Judge]:
    return (self.judge,)

  def __call__(
    self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
  ) -> list[float | None]:
    count = len(prompts)
    verdicts = _verdicts(self.judge, [*prompts, *prompts], [*firsts, *seconds], [*seconds, *firsts])
    pairs = zip(verdicts[:count], verdicts[count:], strict=True)
    return [None if p is None or q is None else (p + 1 - q) / 2 for p, q in pairs]


@dataclass(frozen=True)
class win_rate:
  """A reward: each completion's mean probability of beating the other samples of its prompt.

    r_i = 1/(K−1) Σ_{j≠i} p(y_i better than y_j)

  Every pair is judged once, the earlier sample first; wrap the judge in `both_orders` if positions
  sway it. Pairs without a verdict are left out; a sample with none gets None.

  Where the judge raises on the pairs of one prompt it is asked pair by pair. Those that fail are
  left out too, and a sample of which all do has the error in place of its score: one text that the
  judge refuses fails alone, among three samples or more.

  Raises:
    ValueError: a prompt has a single sample, or a verdict is outside [0, 1].
    Exception: what the judge raises on several prompts, of which `evaluate` then asks one by one.
  """

  judge: Judge
  by_prompt: ClassVar[bool] = True  # `evaluate` keeps samples of a prompt together

  @property
  def members(self) -> tuple[Judge]:
    return (self.judge,)

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> list[Score]:
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
      groups.setdefault(prompt, []).append(i)
    for prompt, group in groups.items():
      if len(group) < 2:
        raise ValueError(f'a win rate needs 2 or more samples of a prompt; {prompt[-80:]!r} has 1')
    pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]

    def ask(*some: tuple[int, int]) -> list[Score]:
      return _verdicts(
        self.judge,
        [prompts[i] for i, _ in some],
        [completions[i] for i, _ in some],
        [completions[j] for _, j in some],
      )

    try:
      verdicts = ask(*pairs)
    except Exception:
      if len(groups) > 1 or len(pairs) == 1:
        raise
      verdicts = each(lambda pair: ask(pair)[0], pairs)
    wins: list[list[float]] = [[] for _ in prompts]
    errors: dict[int, Exception] = {}
    for (i, j), p in zip(pairs, verdicts, strict=True):
      if isinstance(p, Exception):
        errors |= {i: p, j: p}
      elif p is not None:
        wins[i].append(p)
        wins[j].append(1 - p)
    if errors and all(wins):  # else a sample's failure tells of them
      error = next(iter(errors.values()))
      log.warning('a judge failed on pairs of %r, left out: %s', prompts[0][-80:], error)
    return [sum(won) / len(won) if won else errors.get(i) for i, won in enumerate(wins)]


def _verdicts(
  judge: Judge, prompts: list[str], firsts: list[str], seconds: list[str]
) -> list[float | None]:
  verdicts = list(judge(prompts, firsts, seconds))
  if len(verdicts) != len(prompts):
    raise ValueError(f'the judge gave {len(verdicts)} verdicts on {len(prompts)} pairs')
  for p in verdicts:
    if p is not None and not 0 <= p <= 1:
      raise ValueError(f'a verdict is a probability in [0, 1] or None, got {p!r}')
  return verdicts
