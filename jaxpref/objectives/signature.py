"""What a loss function reads: batch fields, and hyper-parameters with their kinds and ranges."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpref.objectives import scalars
from jaxpref.objectives.registry import suggestion
from jaxpref.objectives.schedules import Schedule, levels

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True, eq=False)
class Signature:
  """Fields and hyper-parameters of a loss function.

  A hyper-parameter whose default is a float or None, or that has none, is a number: a float leaf,
  or a schedule. One whose default is an int or a function is static.
  """

  name: str
  fields: tuple[str, ...]
  defaults: Mapping[str, Any]
  ranges: Mapping[str, scalars.Interval]

  @classmethod
  def of(cls, loss: Callable, ranges: Mapping[str, str]) -> 'Signature':
    """Reads a loss function's signature.

    Raises:
      TypeError: its parameters cannot be fields or hyper-parameters.
      ValueError: a range is not written as one.
    """
    fields, defaults = [], {}
    for key, parameter in inspect.signature(loss).parameters.items():
      owner = f'{loss.__name__}({parameter})'
      if key == 'name' or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise TypeError(
          f"{owner}: fields and hyper-parameters are listed one by one, and none is called 'name'"
        )
      if parameter.kind is not parameter.KEYWORD_ONLY:
        fields.append(key)
      elif isinstance(parameter.default, bool | str):
        raise TypeError(
          f'{owner}: a hyper-parameter is a float, an int or a function; instead of a switch of '
          'algorithms, write a second function'
        )
      else:
        defaults[key] = parameter.default
    for key in ranges:
      if key not in defaults:
        hint = suggestion(key, defaults)
        raise TypeError(f'{loss.__name__} has no hyper-parameter {key!r} to range over; {hint}')
    intervals = {key: scalars.Interval.parse(text) for key, text in ranges.items()}
    return cls(loss.__name__, tuple(fields), defaults, intervals)

  def bind(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Checked hyper-parameters, defaults filled in: (numbers, static values).

    Raises:
      TypeError: one is unknown, missing or of the wrong kind.
      ValueError: a concrete number is NaN or out of range.
    """
    for key in given:
      if key not in self.defaults:
        hint = suggestion(key, self.defaults)
        raise TypeError(f'{self.name}() has no hyper-parameter {key!r}; {hint}')
    numbers, static = {}, {}
    for key, default in self.defaults.items():
      value, owner = given.get(key, default), f'{self.name}({key})'
      if value is REQUIRED:
        raise TypeError(f'{owner} has no default and must be given')
      if default is not REQUIRED and (isinstance(default, int) or callable(default)):
        static[key] = _static(value, default, owner)
        continue
      optional = value is None and default is None
      known = optional or isinstance(value, Schedule)
      numbers[key] = value if known else scalars.number(value, owner)
      if key in self.ranges and not optional:
        for level in levels(value):
          self.ranges[key].check(level, owner)
    return numbers, tuple(static.items())


def _static(value: Any, default: Any, owner: str) -> Any:
  if isinstance(default, int):
    if isinstance(value, bool) or not isinstance(value, int):
      raise TypeError(f'{owner} must be an int, got {value!r}')
  elif isinstance(value, Schedule | type) or not callable(value):
    raise TypeError(f'{owner} must be a function like {scalars.name(default)}, got {value!r}')
  elif scalars.name(value) == '<lambda>' or getattr(value, '__closure__', None):
    # A new closure would be a new static value every time, hence a compilation.
    raise TypeError(f'{owner} must be a named function or a frozen dataclass, got a closure')
  hash(value)
  return value
