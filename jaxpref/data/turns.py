"""Turns: the token ids of a conversation, and which of them the assistant wrote.

A chat template may mark the assistant's words with {% generation %}. Where it does not, they are
found by token prefixes: a turn begins where the prompt ends that a sampler would be given,

  whole    <user> Hi <end> <assistant> Yo <end> <user> And? <end> <assistant> Ok <end>
  prompt   <user> Hi <end> <assistant>                                        begins after it
  alone    <user> Hi <end> <assistant> Yo <end>                               ends as it does

and ends with its stop token, or where the conversation would have ended with this turn. That holds
only if the template writes a turn the same way whatever follows. One that does not (it drops the
thoughts of earlier turns, or puts the tools before the last question) is refused, because the
tokens would not be those that a sampler writes or sees.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.chat import Message
from jaxpref.data.tokenizer import Tokenizer

Span = tuple[int, int]


def read_chat(
  messages: Sequence[Message],
  first: int,
  tokenizer: Tokenizer,
  tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[Span]]:
  """The tokens of a conversation up to its last stop token, and the assistant's spans [start, end).

  Without marks only the turns from message `first` on are looked for.

  Raises ValueError where the template refuses the messages, or hides where a turn begins or ends.
  """
  options: dict[str, Any] = {'tools': tools} if tools else {}
  tokens, marked = tokenizer.encode_chat(messages, **options)
  stops = [i for i, token in enumerate(tokens) if token in tokenizer.stop_ids]
  if stops and not tokenizer.decode(tokens[stops[-1] + 1 :]).strip():
    # What a template writes after the last end-of-turn (a newline) no sampler gets to.
    del tokens[stops[-1] + 1 :]
  elif tokenizer.eos_id is not None:  # a template that never ends a turn
    tokens.append(tokenizer.eos_id)
  if marked is not None:
    return tokens, _runs(marked[: len(tokens)])
  spans = []
  for number in range(first, len(messages)):
    if messages[number].get('role') == 'assistant':
      start = _start(messages, number, tokens, tokenizer, options)
      spans.append((start, _end(messages, number, start, tokens, tokenizer, options)))
  return tokens, spans


def _start(messages, number, tokens, tokenizer, options) -> int:
  """Where turn `number` begins: after what the whole and the sampler's prompt share."""
  if not number:
    return 0
  context = tokenizer.encode(tokenizer.apply_chat(messages[:number], **options))
  same = common_prefix(context, tokens)
  # One token may merge with what follows, and an end of the conversation may be marked.
  if sum(token not in tokenizer.stop_ids for token in context[same:]) > 1:
    raise _rewritten(f'what comes before message {number}', same, context, tokens, tokenizer)
  prompt = tokenizer.apply_chat(messages[:number], add_generation_prompt=True, **options)
  return common_prefix(tokenizer.encode(prompt), tokens)


def _end(messages, number, start, tokens, tokenizer, options) -> int:
  """Where turn `number` ends, had the conversation ended with it."""
  last = number == len(messages) - 1
  alone = (
    tokens if last else tokenizer.encode(tokenizer.apply_chat(messages[: number + 1], **options))
  )
  stop = next((i for i in range(start, len(alone)) if alone[i] in tokenizer.stop_ids), None)
  same = len(tokens) if last else common_prefix(alone, tokens)
  # Without a stop token between, the turn's last token may merge with what follows.
  if same < (len(alone) - 1 if stop is None else stop + 1):
    raise _rewritten(f'message {number}', same, alone, tokens, tokenizer)
  return same if stop is None else stop + 1


def _rewritten(what, same, alone, tokens, tokenizer) -> ValueError:
  then, now = (tokenizer.decode(ids[same : same + 8]) for ids in (alone, tokens))
  return ValueError(
    f'the chat template writes {what} (assistant) differently once the '
    f'conversation goes on: {then!r} becomes {now!r}, so which tokens a sampler would have written '
    'cannot be told. Mark the turns with {% generation %} in the template, or give each '
    "assistant's turn a record of its own, whose completion it is"
  )


def _runs(marked: Sequence[bool]) -> list[Span]:
  """Maximal runs of True."""
  edges = [
    i for i, (a, b) in enumerate(zip([False, *marked], [*marked, False], strict=True)) if a != b
  ]
  return list(zip(edges[::2], edges[1::2], strict=True))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
  """How many elements both begin with."""
  for count, (x, y) in enumerate(zip(a, b, strict=False)):
    if x != y:
      return count
  return min(len(a), len(b))
