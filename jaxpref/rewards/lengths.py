"""Rules on length and repetition. Lengths are tokens, the stop token included."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpref.rewards.base import Record, Reward, Score, check_single, each, token_count


@dataclass(frozen=True)
class length_penalty:
  """r = −|n − target|, n the completion's tokens; with target 0 simply the length's negative.

  The weight is L1-Exact's α, as in `numeric_answer() + 0.0003*length_penalty(target=512)`.
  L1: Controlling How Long A Reasoning Model Thinks With RL (Aggarwal and Welleck 2025), eq. 1,
  https://arxiv.org/abs/2503.04697
  """

  target: int = 0

  def __post_init__(self):
    _at_least('length_penalty(target)', self.target, 0)

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> list[Score]:
    return each(lambda record: -float(abs(token_count(record) - self.target)), records)


@dataclass(frozen=True)
class soft_overlong:
  """0 up to `limit − buffer` tokens, then down in a line to −1 at `limit`, and −1 beyond.

    r = 0                                    n ≤ L_max − L_cache
    r = ((L_max − L_cache) − n) / L_cache    L_max − L_cache < n ≤ L_max
    r = −1                                   n > L_max

  DAPO: An Open-Source LLM Reinforcement Learning System at Scale (Yu et al. 2025), eq. 13,
  https://arxiv.org/abs/2503.14476

  Args:
    limit: L_max, tokens.
    buffer: L_cache, tokens; at most `limit`.
  """

  limit: int
  buffer: int

  def __post_init__(self):
    _at_least('soft_overlong(limit)', self.limit, 1)
    _at_least('soft_overlong(buffer)', self.buffer, 1)
    if self.buffer > self.limit:
      raise ValueError(f'soft_overlong: buffer={self.buffer} is more than limit={self.limit}')

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> list[Score]:
    return each(self._score, records)

  def _score(self, record: Record) -> float:
    over = token_count(record) - (self.limit - self.buffer)
    return -min(max(over, 0) / self.buffer, 1.0)


@dataclass(frozen=True)
class repetition_penalty:
  """r = −(1 − distinct n-grams / n-grams) over lower-case words; 0 for fewer than n words.

  Demystifying Long Chain-of-Thought Reasoning in LLMs (Yeo et al. 2025), https://arxiv.org/abs/2502.03373,
  penalises repeated n-grams token by token; like TRL's reward this is one score a completion.
  """

  ngram: int = 3

  def __post_init__(self):
    _at_least('repetition_penalty(ngram)', self.ngram, 1)

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> list[Score]:
    return each(self._score, completions)

  def _score(self, completion: str) -> float:
    words = completion.lower().split()
    grams = list(zip(*(words[start:] for start in range(self.ngram)), strict=False))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


@dataclass(frozen=True)
class cosine_length:
  """The score of a right-or-wrong reward, scaled by length along half a cosine.

    r = r_L + ½ (r_0 − r_L) (1 + cos(π n / L_max))    n < L_max
    r = exceeded                                     n ≥ L_max

  from r_0 at length 0 to r_L at L_max, one pair for right completions and one for wrong ones.
  Demystifying Long Chain-of-Thought Reasoning in LLMs (Yeo et al. 2025), https://arxiv.org/abs/2502.03373

  Args:
    reward: scores above 0 are right; where it does not apply, neither does this.
    limit: L_max, tokens.
    right, wrong: (r_0, r_L).
    exceeded: the score at the limit and beyond.
  """

  reward: Reward
  limit: int
  right: tuple[float, float] = (2.0, 1.0)
  wrong: tuple[float, float] = (-10.0, 0.0)
  exceeded: float = -10.0

  def __post_init__(self):
    _at_least('cosine_length(limit)', self.limit, 1)
    if not callable(self.reward):
      raise ValueError(f'cosine_length(reward) must be a reward, got {self.reward!r}')
    check_single(self.reward)

  @property
  def members(self) -> tuple[Reward]:
    return (self.reward,)

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> list[Score]:
    return each(self._score, self.reward(prompts, completions, records), records)

  def _score(self, score: Score, record: Record) -> Score:
    if score is None or isinstance(score, Exception):
      return score
    tokens = token_count(record)
    first, last = self.right if score > 0 else self.wrong
    cosine = last + (first - last) * (1 + math.cos(math.pi * tokens / self.limit)) / 2
    return cosine if tokens < self.limit else self.exceeded


def _at_least(name: str, value: int, least: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(f'{name} must be an int of at least {least}, got {value!r}')
