"""Records: what a data source may hold, brought to one form, `Record(prompt, completions, extras)`.

  preference   chosen, rejected, and prompt unless it is what both begin with
               (strings; message lists; HH-RLHF transcripts)
  completion   prompt, completion
  unpaired     prompt, completion, label (true: desirable), or
               messages, label           the label is on the last turn
  text         text                      all of it is scored
  messages     messages                  the assistant's turns are scored

Every record of a source has the same kind. `columns` says which key of the source stands for which
of these names: {'prompt': 'question', 'weight': 'label_confidence'}.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpref.data.chat import Message
from jaxpref.data.sources import DataError

KINDS = {
  'preference': ('chosen', 'rejected'),
  'unpaired': ('prompt', 'completion', 'label'),
  'unpaired messages': ('messages', 'label'),
  'completion': ('prompt', 'completion'),
  'messages': ('messages',),
  'text': ('text',),
}
HUMAN, ASSISTANT = '\n\nHuman:', '\n\nAssistant:'  # how HH-RLHF transcripts mark turns
_NAMES = ('prompt', 'chosen', 'rejected', 'completion', 'label', 'messages', 'text', 'weight')

Text = str | list[Message]


class Record(NamedTuple):
  """A prompt and its completions, best first: all strings, or all lists of messages.

  A conversational completion holds the messages after the prompt's.
  """

  prompt: Text
  completions: tuple[Text, ...]
  extras: dict[str, float]


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
  """`columns` as a dict; raises DataError where a name is none of jaxpref's."""
  for name in columns or {}:
    if name not in _NAMES:
      near = difflib.get_close_matches(name, _NAMES, 1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise DataError(f'columns: unknown name {name!r}; known: {", ".join(_NAMES)}{hint}')
  return dict(columns or {})


def rename(origin: str, value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
  """The record with its keys as jaxpref calls them."""
  for name, key in columns.items():
    if key not in value:
      raise DataError(f'{origin}: no key {key!r} (columns: {name!r}); it has {sorted(value)}')
  kept = {key: item for key, item in value.items() if key not in columns.values()}
  return kept | {name: value[key] for name, key in columns.items()}


def infer_kind(origin: str, value: Mapping[str, Any], among: Sequence[str]) -> str:
  """The first kind among these whose keys a record has."""
  for kind in among:
    if all(key in value for key in KINDS[kind]):
      return kind
  kinds = '; '.join(f'{kind}: {", ".join(KINDS[kind])}' for kind in among)
  raise DataError(
    f'{origin}: cannot use a record with the keys {sorted(value)}. What would do: '
    f"{kinds}. Keys of other names are mapped with columns, such as {{'prompt': 'question'}}"
  )


def read_record(origin: str, value: Mapping[str, Any], kind: str) -> Record:
  """Reads one record of a kind from `KINDS`, its keys already renamed.

  Raises DataError naming the origin, the key, what was expected and what came.
  """
  for key in KINDS[kind]:
    if key not in value:
      near = difflib.get_close_matches(key, value, 1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise DataError(f'{origin}: no key {key!r} ({kind} record); it has {sorted(value)}{hint}')
  extras = {'weight': _number(origin, 'weight', value['weight'])} if 'weight' in value else {}
  if kind == 'preference':
    prompt, completions = _preference(origin, value)
  elif kind in ('messages', 'unpaired messages'):
    messages = _messages(origin, 'messages', value['messages'])
    split = _turn_to_learn(origin, messages, last=kind != 'messages')
    prompt, completions = messages[:split], (messages[split:],)
  elif kind == 'text':
    if not isinstance(value['text'], str) or not value['text']:
      raise DataError(
        f"{origin}: 'text' should be a non-empty string, got {_described(value['text'])}"
      )
    prompt, completions = '', (value['text'],)
  else:
    prompt, (completion,) = _with_prompt(origin, value, ('completion',))
    completions = (completion,)
  if kind.startswith('unpaired'):
    extras['label'] = _label(origin, value['label'])
  return Record(prompt, completions, extras)


def _preference(origin: str, value: Mapping[str, Any]) -> tuple[Text, tuple[Text, ...]]:
  if value.get('prompt') is not None:
    return _with_prompt(origin, value, ('chosen', 'rejected'))
  chosen, rejected = (_text(origin, key, value[key]) for key in ('chosen', 'rejected'))
  if isinstance(chosen, str) and isinstance(rejected, str):
    if chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
      split = _transcript_prompt(origin, chosen, rejected)
    else:
      split = _common_words(chosen, rejected)
    return chosen[:split], (chosen[split:], rejected[split:])
  if isinstance(chosen, str) or isinstance(rejected, str):
    raise _mixed(origin, chosen=chosen, rejected=rejected)
  prompt = _common_messages(chosen, rejected)
  completions = chosen[len(prompt) :], rejected[len(prompt) :]
  for key, completion in zip(('chosen', 'rejected'), completions, strict=True):
    _check_turn(origin, key, completion)
  return prompt, completions


def _with_prompt(origin, value, keys) -> tuple[Text, tuple[Text, ...]]:
  """An explicit prompt and the completions under `keys`.

  A completion that repeats the conversation so far loses that part; a bare string beside a
  conversational prompt is one assistant turn, a string prompt beside messages one user turn.
  """
  prompt = _text(origin, 'prompt', value['prompt'])
  completions = [_text(origin, key, value[key]) for key in keys]
  if isinstance(prompt, str) and all(isinstance(c, str) for c in completions):
    return prompt, tuple(completions)
  if isinstance(prompt, str):
    prompt = [{'role': 'user', 'content': prompt}]
  whole = []
  for key, completion in zip(keys, completions, strict=True):
    if isinstance(completion, str):
      completion = [{'role': 'assistant', 'content': completion}]
    if [_said(m) for m in completion[: len(prompt)]] == [_said(m) for m in prompt]:
      completion = completion[len(prompt) :]
    _check_turn(origin, key, completion)
    whole.append(completion)
  return prompt, tuple(whole)


def _transcript_prompt(origin: str, chosen: str, rejected: str) -> int:
  """Length of an HH-RLHF prompt: all through the last '\\n\\nAssistant:' that both share."""
  common = _common_prefix(chosen, rejected)
  marker = common.rfind(ASSISTANT)
  if marker < 0:
    raise DataError(
      f"{origin}: 'chosen' and 'rejected' share no {ASSISTANT!r}, so there is no prompt; "
      f'they differ from character {len(common)} on'
    )
  return marker + len(ASSISTANT)


def _common_words(chosen: str, rejected: str) -> int:
  """Length of the common prefix, ending before the whitespace of the first word that differs."""
  common = _common_prefix(chosen, rejected)
  words = common.rstrip()
  if len(words) == len(common):  # maybe within a word: go back to its start
    words = words[: len(words) - len((words.split() or [''])[-1])].rstrip()
  return len(words)


def _common_prefix(a: str, b: str) -> str:
  length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
  return a[: min(len(a), len(b)) if length is None else length]


def _common_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
  count = 0
  while count < min(len(chosen), len(rejected)) - 1 and _said(chosen[count]) == _said(
    rejected[count]
  ):
    count += 1
  return chosen[:count]


def _turn_to_learn(origin: str, messages: list[Message], last: bool) -> int:
  """Index of the assistant's last turn, which must end the conversation, or of its first."""
  roles = [message['role'] for message in messages]
  if last and roles[-1] == 'assistant':
    return len(roles) - 1
  if last or 'assistant' not in roles:
    where = 'at the end' if last else 'to learn from'
    raise DataError(f"{origin}: 'messages' has no 'assistant' turn {where}, roles are {roles}")
  return roles.index('assistant')


def _said(message: Message) -> tuple:
  return message['role'], message.get('content'), message.get('tool_calls')


def _check_turn(origin: str, key: str, completion: list[Message]) -> None:
  roles = [message['role'] for message in completion]
  if 'assistant' not in roles[:1]:
    raise DataError(
      f"{origin}: after the prompt, {key!r} should go on with an 'assistant' message, "
      f'got roles {roles}'
    )


def _text(origin: str, key: str, value: Any) -> Text:
  if isinstance(value, list):
    return _messages(origin, key, value)
  if not isinstance(value, str):
    raise DataError(
      f'{origin}: {key!r} should be a string or a list of messages, got {_described(value)}'
      f'{_sharegpt_hint(value)}'
    )
  return value


def _messages(origin: str, key: str, value: Any) -> list[Message]:
  if not isinstance(value, list) or not value:
    raise DataError(
      f"{origin}: {key!r} should be a non-empty list of {{'role', 'content'}} messages, "
      f'got {_described(value)}'
    )
  for number, message in enumerate(value):
    where = f'{origin}: {key}[{number}]'
    if not isinstance(message, dict) or not isinstance(message.get('role'), str):
      raise DataError(
        f"{where} should have a string 'role' and 'content', got {_described(message)}"
        f'{_sharegpt_hint(message)}'
      )
    if not isinstance(message.get('content'), str) and not message.get('tool_calls'):
      raise DataError(
        f"{where}: 'content' should be a string, got {_described(message.get('content'))}"
      )
  return value


def _sharegpt_hint(value: Any) -> str:
  if not isinstance(value, dict) or 'from' not in value:
    return ''
  return (
    "; this looks like ShareGPT, which is not read: write {'from': 'gpt', 'value': ...} as "
    "[{'role': 'assistant', 'content': ...}], and 'human' as 'user'"
  )


def _mixed(origin: str, **texts) -> DataError:
  found = ', '.join(f'{key!r} is {_described(value)}' for key, value in texts.items())
  return DataError(f'{origin}: expected all strings or all lists of messages; {found}')


def _label(origin: str, value: Any) -> float:
  """true -> 1, false -> -1; numbers must be 1, 0 or -1, where 0 and -1 both mean undesirable."""
  if value not in (True, False, -1):
    raise DataError(f"{origin}: 'label' should be true or false, got {_described(value)}")
  return 1.0 if value == 1 else -1.0


def _number(origin: str, key: str, value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
    raise DataError(f'{origin}: {key!r} should be a number, got {_described(value)}')
  return float(value)


def _described(value: Any) -> str:
  text = repr(value)
  return f'{type(value).__name__} {text if len(text) <= 60 else text[:57] + "..."}'
