"""Columns: which keys of a source's records stand for the names that jaxpref knows.

`{'prompt': 'question', 'completions': 'a|b'}`, in text 'prompt=question,completions=a|b'. A value:

  KEY            what stands under that key; a path goes down: 'gpt4.solution', 'turns.0.text',
                 'answers.*.text' (of every item of a list), 'wrong answers.;.0' (text cut at ;)
  A|B|C          the list of several
  'Q: {A} {B}'   text with braces: what stands there is put in, a list one a line;
                 \\n and \\t are newline and tab
  A==TEXT        true where A holds TEXT, else false
  (nothing)      leave a key of that name out
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from jaxpref.data.files import DataError, short

NAMES = (
  'prompt',
  'chosen',
  'rejected',
  'completion',
  'completions',
  'first',
  'second',
  'verdict',
  'verdicts',
  'label',
  'labels',
  'messages',
  'conversations',
  'text',
  'tools',
  'weight',
  'margin',
  'preference',
  'scores',
  'ranks',
)
_ITEM = re.compile(r',\s*(?=[a-z_]+\s*=(?!=))')  # a comma that begins the next NAME=
_FIELD = re.compile(r'\{([^{}]+)\}')


def parse(text: str) -> dict[str, str]:
  """{'prompt': 'question'} from 'prompt=question,...'; commas inside a template may stand."""
  found: dict[str, str] = {}
  for item in _ITEM.split(text) if text.strip() else []:
    name, equals, value = item.partition('=')
    if not equals or name.strip() in found:
      raise DataError(f"columns must look like 'prompt=question,chosen=good', got {text!r}")
    found[name.strip()] = value if '{' in value else value.strip()
  return check(found)


def check(columns: Mapping[str, str] | str | None) -> dict[str, str]:
  """`columns` as a dict; raises DataError where a name is none of jaxpref's."""
  if isinstance(columns, str):
    return parse(columns)
  for name in columns or {}:
    if name not in NAMES:
      near = difflib.get_close_matches(name, NAMES, 1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise DataError(f'columns: unknown name {name!r}; known: {", ".join(NAMES)}{hint}')
  return dict(columns or {})


def rename(origin: str, value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
  """The record with its keys as jaxpref calls them; keys that were used go."""
  used: set[str] = set()
  try:
    given = {name: _value(value, text, used) for name, text in columns.items() if text}
  except LookupError as error:
    key, among = error.args
    name = next(name for name, text in columns.items() if key in text)
    near = difflib.get_close_matches(key, among, 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise DataError(
      f'{origin}: no key {key!r} (columns: {name!r}); it has {sorted(among)}{hint}'
    ) from None
  return {key: x for key, x in value.items() if key not in used and key not in columns} | given


def _value(record: Mapping[str, Any], text: str, used: set[str]) -> Any:
  if text in record:
    used.add(text)
    return record[text]
  if _FIELD.search(text):
    text = text.replace('\\n', '\n').replace('\\t', '\t')
    return _FIELD.sub(lambda field: _written(_value(record, field[1], used)), text)
  if '|' in text:
    return [_value(record, key.strip(), used) for key in text.split('|')]
  key, equals, wanted = text.partition('==')
  if equals:
    return _written(_value(record, key.strip(), used)) == wanted.strip()
  return _walk(record, text, used)


def _walk(record: Mapping[str, Any], path: str, used: set[str]) -> Any:
  """Goes down `path` from the longest key that it begins with, since keys may hold dots."""
  steps = path.split('.')
  for count in range(len(steps) - 1, 0, -1):
    if (key := '.'.join(steps[:count])) in record:
      used.add(key)
      return _down(record[key], steps[count:], path)
  raise LookupError(path, [str(key) for key in record])


def _down(value: Any, steps: list[str], path: str) -> Any:
  if not steps:
    return value
  step, *rest = steps
  if isinstance(value, str) and step == ';':
    return _down([piece.strip() for piece in value.split(';')], rest, path)
  if isinstance(value, list) and step == '*':
    return [_down(item, rest, path) for item in value]
  if isinstance(value, list) and step.isdigit() and int(step) < len(value):
    return _down(value[int(step)], rest, path)
  if isinstance(value, Mapping) and step in value:
    return _down(value[step], rest, path)
  found = value if isinstance(value, Mapping) else [short(value)]
  raise LookupError(path, [str(key) for key in found])


def _written(value: Any) -> str:
  if isinstance(value, bool) or value is None:
    return {True: 'true', False: 'false', None: ''}[value]
  if isinstance(value, list):
    return '\n'.join(map(_written, value))
  return f'{value:g}' if isinstance(value, float) and value == round(value) else str(value)
