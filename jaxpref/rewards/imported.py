"""Rewards of one's own, by import path: `user('my_rewards:polite', tone='calm')`."""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpref.rewards.base import Record, Reward, Score, traits_of


@dataclass(frozen=True, repr=False)
class Imported:
  """A function of another module, with its keyword arguments."""

  path: str
  keywords: tuple[tuple[str, Any], ...]
  function: Reward = field(compare=False)

  @property
  def __name__(self) -> str:
    return self.path.rpartition(':')[2]

  @property
  def members(self) -> tuple[Reward]:
    return (self.function,)

  @property
  def heads(self) -> int:
    return traits_of(self.function).heads

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> Sequence[Score]:
    return self.function(prompts, completions, records, **dict(self.keywords))

  def __repr__(self) -> str:
    inside = ''.join(f', {key}={value!r}' for key, value in self.keywords)
    return f'user({self.path!r}{inside})'


def user(path: str, **keywords: Any) -> Imported:
  """The reward at 'module:function', called with these keyword arguments besides.

  Raises:
    ImportError: the module cannot be imported.
    ValueError: `path` has another form, names nothing that can be called, or the function does not
      take (prompts, completions, records) and the keywords.
  """
  module, _, name = path.partition(':') if isinstance(path, str) else ('', '', '')
  if not module or not name.isidentifier():
    raise ValueError(f"a reward of one's own is named 'module:function', got {path!r}")
  try:
    found = importlib.import_module(module)
  except Exception as error:
    raise ImportError(
      f'cannot import {module!r}, of the reward {path!r}: {type(error).__name__}: {error}; its '
      'folder must be the working directory or on PYTHONPATH'
    ) from error
  function = getattr(found, name, None)
  if not callable(function):
    named = [
      key for key, value in vars(found).items() if callable(value) and not inspect.isclass(value)
    ]
    raise ValueError(f'{module!r} has no function {name!r}; it has {", ".join(named) or "none"}')
  try:
    inspect.signature(function).bind([], [], [], **keywords)
  except TypeError as error:
    raise ValueError(
      f'{path} is called as {name}(prompts, completions, records'
      f'{"".join(f", {key}=..." for key in keywords)}), but {error}'
    ) from error
  return Imported(path, tuple(keywords.items()), function)
