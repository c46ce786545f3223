"""Values of records: numbers, labels, verdicts and lists, checked; errors say what came.

CSV has nothing but text, so numbers, labels and lists may be written out there.
"""

import json
import math
from typing import Any

from jaxpref.data.conversations import described
from jaxpref.data.files import DataError

_LABELS = {'true': 1.0, '1': 1.0, 'false': -1.0, '0': -1.0, '-1': -1.0}
_VERDICTS = {'a': 1.0, 'model_a': 1.0, 'b': 2.0, 'model_b': 2.0}
_VERDICTS |= dict.fromkeys(('tie', 'tie (bothbad)', 'draw'), 1.5)


def number(origin: str, key: str, value: Any) -> float:
  """A finite number."""
  found = math.nan
  if isinstance(value, int | float | str) and not isinstance(value, bool):
    try:
      found = float(value)
    except (ValueError, OverflowError):
      pass
  if not math.isfinite(found):
    raise DataError(
      f'{origin}: {key!r} should be a number, got {described(value)}; '
      f"if it means something else here, columns '{key}=' leaves it out"
    )
  return found


def grade(origin: str, key: str, value: Any) -> float:
  """A number, or true (1) or false (0)."""
  return float(value) if isinstance(value, bool) else number(origin, key, value)


def share(origin: str, key: str, value: Any) -> float:
  """A probability."""
  found = number(origin, key, value)
  if not 0 <= found <= 1:
    raise DataError(
      f'{origin}: {key!r} should be within [0, 1], got {found:g}; a scale from 1 to 2 is a '
      "'verdict' on 'first' and 'second'"
    )
  return found


def label(origin: str, value: Any) -> float:
  """true -> 1, false -> -1; numbers must be 1, 0 or -1, where 0 and -1 both mean undesirable."""
  text = str(value).strip().lower()
  text = text.removesuffix('.0') if isinstance(value, float) else text
  if text not in _LABELS:
    raise DataError(
      f"{origin}: 'label' should be true or false, got {described(value)}; "
      "columns such as 'label=grade==good' say which value is true"
    )
  return _LABELS[text]


def verdict(origin: str, key: str, value: Any) -> float:
  """Within [1, 2]: 1 where the first of two is better, 2 the second, 1.5 for a tie."""
  text = str(value).strip().lower()
  if text in _VERDICTS:
    return _VERDICTS[text]
  found = number(origin, key, value)
  if found == 0:
    return 1.5
  if not 1 <= found <= 2:
    raise DataError(
      f'{origin}: {key!r} should be 1 (the first is better), 2 (the second), between them, or 0 '
      f'for a tie, or one of {", ".join(_VERDICTS)}; got {described(value)}'
    )
  return found


def parsed(value: Any) -> Any:
  """A list that is written as JSON text, as CSV has it, or the value itself."""
  if isinstance(value, str) and value.lstrip().startswith('['):
    try:
      return json.loads(value)
    except (ValueError, RecursionError):
      pass
  return value


def listed(origin: str, key: str, value: Any, *, several: bool = True) -> list:
  """A list of at least two, or, unless `several`, of at least one; a single value is a list too."""
  value = parsed(value)
  if not several and not isinstance(value, list):
    value = [value]
  if not isinstance(value, list) or len(value) < 1 + several:
    least = 'two' if several else 'one'
    raise DataError(
      f'{origin}: {key!r} should be a list of at least {least}, got {described(value)}'
    )
  return value


def tools(origin: str, value: Any) -> list | None:
  """Tools for the chat template: a list of JSON schemas, or that list as JSON text."""
  found = parsed(value) or None
  if found is not None and not (
    isinstance(found, list) and all(isinstance(tool, dict) for tool in found)
  ):
    raise DataError(f"{origin}: 'tools' should be a list of JSON schemas, got {described(value)}")
  return found
