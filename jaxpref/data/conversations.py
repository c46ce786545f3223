"""Conversations: ShareGPT, Alpaca and transcripts brought to lists of {'role', 'content'} messages.

`canonical` gives a record the names and messages that `records` reads; whatever has them already
passes through.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxpref.data.chat import Message
from jaxpref.data.files import DataError, short

HUMAN, ASSISTANT = '\n\nHuman:', '\n\nAssistant:'  # how HH-RLHF transcripts mark turns
Text = str | list[Message]
_TEXTS = ('prompt', 'chosen', 'rejected', 'completion', 'first', 'second', 'messages')
_ROLES = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'chatgpt': 'assistant',
  'model': 'assistant',
  'bing': 'assistant',
  'system': 'system',
  'function_call': 'assistant',
  'observation': 'tool',
  'tool': 'tool',
}


def canonical(origin: str, value: Mapping[str, Any]) -> dict[str, Any]:
  """The record with ShareGPT's, Alpaca's and LLaMA-Factory's keys replaced by ours.

  `conversations` becomes `messages`, or the prompt where `chosen` or `completion` goes on from it;
  `instruction` (with `input`, `system`, `history`) the prompt, one user turn, and `output` the
  completion; `kto_tag` the label. {'from', 'value'} turns become messages wherever they stand.
  """
  value = dict(value)
  for key in _TEXTS:
    if key in value:
      value[key] = _from_sharegpt(f'{origin}: {key}', value[key])
  if isinstance(value.get('conversations'), list):
    goes_on = 'prompt' not in value and any(key in value for key in ('chosen', 'completion'))
    talk = _from_sharegpt(f'{origin}: conversations', value.pop('conversations'))
    talk = _with_system(value.pop('system', None), talk)
    value.setdefault('prompt' if goes_on else 'messages', talk)
  elif 'prompt' not in value and isinstance(value.get('instruction'), str):
    asked = '\n'.join(part for part in (value['instruction'], value.get('input')) if part)
    past = [turn for pair in value.pop('history', None) or () for turn in _exchange(*pair)]
    talk = [*past, {'role': 'user', 'content': asked}]
    value['prompt'] = _with_system(value.pop('system', None), talk)
    if 'output' in value:
      value.setdefault('completion', value['output'])
  if 'kto_tag' in value:
    value.setdefault('label', value['kto_tag'])
  return value


def _from_sharegpt(where: str, value: Any) -> Any:
  if isinstance(value, dict) and ('from' in value or 'role' in value):
    value = [value]  # chosen and rejected may be one turn
  if not isinstance(value, list):
    return value
  return [
    _turn(f'{where}[{i}]', turn) if isinstance(turn, dict) and 'from' in turn else turn
    for i, turn in enumerate(value)
  ]


def _turn(where: str, turn: Mapping[str, Any]) -> Message:
  role = _ROLES.get(str(turn['from']).lower())
  if role is None:
    raise DataError(f"{where}: 'from' should be one of {', '.join(_ROLES)}, got {turn['from']!r}")
  if turn['from'] != 'function_call':
    return {'role': role, 'content': turn.get('value')}
  try:
    calls = json.loads(turn.get('value', ''))
  except (ValueError, TypeError) as error:
    raise DataError(f'{where}: a function_call should be JSON: {error}') from error
  calls = calls if isinstance(calls, list) else [calls]
  return {
    'role': role,
    'content': '',
    'tool_calls': [{'type': 'function', 'function': call} for call in calls],
  }


def _with_system(system: Any, talk: list[Message]) -> list[Message]:
  if not isinstance(system, str) or not system or (talk and talk[0].get('role') == 'system'):
    return talk
  return [{'role': 'system', 'content': system}, *talk]


def _exchange(asked: str, answered: str) -> list[Message]:
  return [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': answered}]


def from_transcript(text: str) -> list[Message]:
  """The messages of an HH-RLHF transcript; an empty last assistant turn, a prompt's, is left out.

  A text that is no transcript is one user turn.
  """
  if not text.startswith(HUMAN):
    return [{'role': 'user', 'content': text}]
  talk: list[Message] = []
  for human in text.split(HUMAN)[1:]:
    asked, *answers = human.split(ASSISTANT)
    talk.append({'role': 'user', 'content': asked.strip()})
    answered = ASSISTANT.join(answers).strip()
    if answered:
      talk.append({'role': 'assistant', 'content': answered})
  return talk


def check_text(origin: str, key: str, value: Any) -> Text:
  """A string or a list of messages, else DataError."""
  if isinstance(value, list):
    return check_messages(origin, key, value)
  if not isinstance(value, str):
    raise DataError(
      f'{origin}: {key!r} should be a string or a list of messages, got {described(value)}'
      f'{_template_hint(key, value)}'
    )
  return _check_unicode(origin, key, value)


def check_messages(origin: str, key: str, value: Any) -> list[Message]:
  """A list of {'role', 'content'} messages whose contents are strings, else DataError."""
  if not isinstance(value, list) or not value:
    raise DataError(
      f"{origin}: {key!r} should be a non-empty list of {{'role', 'content'}} messages, "
      f'got {described(value)}'
    )
  return [_message(origin, f'{key}[{i}]', message) for i, message in enumerate(value)]


def _message(origin: str, key: str, message: Any) -> Message:
  if not isinstance(message, dict) or not isinstance(message.get('role'), str):
    raise DataError(
      f"{origin}: {key} should have a string 'role' and 'content', got {described(message)}"
    )
  # Parquet gives every message of a table the keys of all, None where there is nothing.
  message = {name: item for name, item in message.items() if item is not None or name == 'content'}
  content = message.get('content')
  if isinstance(content, list) and all(_is_text(part) for part in content):
    content = ''.join(part['text'] for part in content)
    message['content'] = content
  if not isinstance(content, str) and not (content is None and message.get('tool_calls')):
    images = '; only text is read' if isinstance(content, list) else ''
    raise DataError(
      f"{origin}: {key}: 'content' should be a string, got {described(content)}{images}"
    )
  _check_unicode(origin, key, content or '')
  return message


def _is_text(part: Any) -> bool:
  return isinstance(part, dict) and part.get('type') == 'text' and isinstance(part.get('text'), str)


def _check_unicode(origin: str, key: str, text: str) -> str:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise DataError(
      f'{origin}: {key!r} holds half a surrogate pair, {text[error.start]!r} at character '
      f'{error.start}, which no tokenizer reads'
    ) from None
  return text


def _template_hint(key: str, value: Any) -> str:
  if not isinstance(value, int | float):
    return ''
  return f"; columns such as '{key}={{answer}}' write a number out as text"


def described(value: Any) -> str:
  """Type and value, for an error message."""
  return f'{type(value).__name__} {short(repr(value))}'
