"""Chat templates: messages -> text, rendered the way `transformers` renders them.

Templates come with downloaded tokenizers, so they run in jinja2's immutable sandbox. They see the
messages, the special tokens' text (`bos_token`, `eos_token`, ...), `raise_exception(message)`,
`strftime_now(format)` and a `tojson` that keeps non-ASCII characters.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

Message = Mapping[str, Any]  # {'role': 'user', 'content': 'Hi', ...}

# Unicode noncharacters: never part of interchanged text, so they can mark spans inside a rendering.
_MARKS = ('\ufdd0', '\ufdd1')


class _Generation(ext.Extension):
  """`{% generation %} ... {% endgeneration %}`: what the assistant says, end-of-turn included."""

  def __init__(self, environment: jinja2.Environment):
    super().__init__(environment)
    self.tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

  def _mark(self, caller):
    start, end = self.environment.globals['generation_marks']
    return start + caller() + end


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _compile(template: str, marks: tuple[str, str]) -> jinja2.Template:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
  )
  environment.filters['tojson'] = _tojson
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  environment.globals['generation_marks'] = marks
  return environment.from_string(template)


def _render(template, marks, messages, add_generation_prompt, special) -> str:
  try:
    return _compile(template, marks).render(
      messages=list(messages), add_generation_prompt=add_generation_prompt, **special
    )
  except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
    roles = ', '.join(str(message.get('role')) for message in messages)
    raise ValueError(f'the chat template refuses messages with roles [{roles}]: {error}') from error


def render(
  template: str,
  messages: Sequence[Message],
  *,
  add_generation_prompt: bool = False,
  special: Mapping[str, str] | None = None,
) -> str:
  """The text of a conversation; `special` maps names such as 'eos_token' to the token's text.

  Raises ValueError where the template cannot be parsed, fails or calls `raise_exception`.
  """
  return _render(template, ('', ''), messages, add_generation_prompt, special or {})


def generated_spans(
  template: str, messages: Sequence[Message], special: Mapping[str, str] | None = None
) -> list[tuple[int, int]]:
  """Character spans of `render(template, messages)` inside `{% generation %}`; [] if unmarked."""
  marked = _render(template, _MARKS, messages, False, special or {})
  spans, start, length = [], 0, 0
  for character in marked:
    if character == _MARKS[0]:
      start = length
    elif character == _MARKS[1]:
      spans.append((start, length))
    else:
      length += 1
  if length != len(render(template, messages, special=special)):
    raise ValueError('a message contains U+FDD0 or U+FDD1, which are reserved for marking spans')
  return spans
