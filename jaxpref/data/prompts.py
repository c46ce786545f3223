"""Prompts: where a record's prompt ends and its completions begin."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.chat import Message
from jaxpref.data.conversations import ASSISTANT, HUMAN, Text, check_text, described
from jaxpref.data.files import DataError

Parts = tuple[Text, tuple[Text, ...]]  # prompt, completions


def explicit(origin: str, value: Mapping[str, Any], keys: Sequence[str]) -> Parts:
  """An explicit prompt and the completions under `keys`.

  A completion that repeats the conversation so far loses that part; a bare string beside a
  conversational prompt is one assistant turn, a string prompt beside messages one user turn.
  """
  prompt = check_text(origin, 'prompt', value['prompt'])
  completions = [check_text(origin, key, value[key]) for key in keys]
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


def shared(origin: str, chosen: Any, rejected: Any) -> Parts:
  """The prompt that two whole texts, transcripts or conversations both begin with."""
  chosen, rejected = check_text(origin, 'chosen', chosen), check_text(origin, 'rejected', rejected)
  if isinstance(chosen, str) and isinstance(rejected, str):
    if chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
      split = _transcript_prompt(origin, chosen, rejected)
    else:
      split = _common_words(chosen, rejected)
    return chosen[:split], (chosen[split:], rejected[split:])
  if isinstance(chosen, str) or isinstance(rejected, str):
    raise DataError(
      f"{origin}: expected all strings or all lists of messages; 'chosen' is {described(chosen)}, "
      f"'rejected' is {described(rejected)}"
    )
  prompt = _common_messages(chosen, rejected)
  completions = chosen[len(prompt) :], rejected[len(prompt) :]
  for key, completion in zip(('chosen', 'rejected'), completions, strict=True):
    _check_turn(origin, key, completion)
  return prompt, completions


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


def _said(message: Message) -> tuple:
  return message['role'], message.get('content'), message.get('tool_calls')


def _check_turn(origin: str, key: str, completion: list[Message]) -> None:
  roles = [message['role'] for message in completion]
  if 'assistant' not in roles[:1]:
    raise DataError(
      f"{origin}: after the prompt, {key!r} should go on with an 'assistant' message, "
      f'got roles {roles}'
    )
