"""What a reward is: a function of prompts, completions and records that gives a score a sample.

    def polite(prompts, completions, records):
      return [1.0 if 'please' in completion else 0.0 for completion in completions]

Rules, reward models and judges are all such callables. A score is a number; None where the reward
does not apply to the sample; or an exception, when that one sample could not be scored.
"""

import functools
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Record = Mapping[str, Any]
Score = Any  # a real number, None or an Exception


class Reward(Protocol):
  """Scores samples; the three sequences have one length, and so has the result."""

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record], /
  ) -> Sequence[Score]: ...


class Traits(NamedTuple):
  """What a reward says of itself, in attributes of these names; without them it is as here.

  A reward made of others has them as a tuple `members`, and needs what they need.
  """

  by_prompt: bool = False  # it compares a prompt's samples, so it is shown them together
  untimed: bool = False  # it has no time limit, runs on the caller's thread and in every process
  nbytes: int = 0  # of its parameters on devices
  heads: int = 1  # how many scores it gives a sample, more than one as tuples


def traits_of(reward: Reward) -> Traits:
  """What `reward` says, and of what it does not say what its members do; heads are its own."""
  members = [traits_of(member) for member in getattr(reward, 'members', ())]
  return Traits(
    getattr(reward, 'by_prompt', any(member.by_prompt for member in members)),
    getattr(reward, 'untimed', any(member.untimed for member in members)),
    getattr(reward, 'nbytes', sum(member.nbytes for member in members)),
    getattr(reward, 'heads', 1),
  )


@dataclass(frozen=True)
class Sample:
  """One completion of a prompt, as rewards see it.

  Rewards find `tokens` and `finished` in the record, as 'completion_tokens' and 'finished'; they
  hide columns of the source that have these names.
  """

  prompt: str
  completion: str
  record: Record = field(default_factory=dict)  # the source record of the prompt
  tokens: int | None = None  # length of the completion, its stop token included
  finished: bool = True  # whether it ended by itself, not at the length limit

  def columns(self) -> dict[str, Any]:
    """The record that rewards get, a new one each time."""
    return {**self.record, 'completion_tokens': self.tokens, 'finished': self.finished}


@dataclass(frozen=True)
class Term:
  """A reward with its weight in the sum and the name that it is logged by.

  Weight 0 logs a reward without learning from it. `name` is by default the reward's own.
  """

  reward: Reward
  weight: float = 1.0
  name: str = ''

  def __post_init__(self):
    if not callable(self.reward):
      raise ValueError(
        f'a reward is a callable f(prompts, completions, records), got {self.reward!r}'
      )
    if not math.isfinite(self.weight):
      raise ValueError(f'the weight of {self.name or name_of(self.reward)!r} is {self.weight}')
    object.__setattr__(self, 'name', self.name or name_of(self.reward))

  @functools.cached_property
  def traits(self) -> Traits:
    return traits_of(self.reward)

  def __str__(self) -> str:
    text = repr(self.reward)
    if self.name != name_of(self.reward) and text.endswith(')'):
      text = f'{text[:-1]}{"" if text.endswith("()") else ", "}name={self.name!r})'
    return text if self.weight == 1 else f'{self.weight!r}*{text}'


def name_of(reward: Reward) -> str:
  """The name of a function, or of a rule's class."""
  return getattr(reward, '__name__', type(reward).__name__)


def check(terms: Sequence[Term]) -> None:
  """That a weighted sum of rewards can be evaluated and logged.

  Raises:
    ValueError: two terms have one name, no term has a weight other than 0, or one gives several
      scores.
  """
  names = [term.name for term in terms]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'two rewards are called {name!r}; give one another by name=...')
  for term in terms:
    check_single(term.reward)
  if not any(term.weight for term in terms):
    raise ValueError(f'no reward has a weight other than 0: {", ".join(names) or "there is none"}')


def check_single(reward: Reward) -> None:
  """Raises ValueError where a reward gives several scores and one is read."""
  if (heads := traits_of(reward).heads) > 1:
    raise ValueError(
      f'{reward!r} gives {heads} scores: make them one by mean(...), minimum(...) or penalised(...)'
    )


def each(score: Callable[..., Score], *columns: Iterable[Any]) -> list[Score]:
  """`score` of every row of the columns; what it raises stands in place of that row's score."""

  def one(*row: Any) -> Score:
    try:
      return score(*row)
    except Exception as error:
      return error

  return [one(*row) for row in zip(*columns, strict=True)]


def token_count(record: Record) -> int:
  """The completion's length in tokens.

  Raises:
    ValueError: the record does not have it.
  """
  count = record.get('completion_tokens')
  if count is None:
    raise ValueError(
      "lengths count tokens, and the record has no 'completion_tokens'; give Sample(tokens=...)"
    )
  return count


def plain(text: str) -> str:
  """Unicode NFC, runs of whitespace as one space, none at either end; case matters."""
  return ' '.join(unicodedata.normalize('NFC', text).split())
