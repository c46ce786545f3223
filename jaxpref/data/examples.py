"""Examples: token ids of a prompt and its completions, with the exact border between them.

The prompt is what a sampler would be given, the completion what it would have to produce:

  text          The tiger   is      big       eos
  tokenised     [The] [ tig][er]   [ is] ...         prompt + completion as one string
  prompt alone  [The] [ tig][er]                     a prefix: the border is exact

Where the tokenizer merges across the border, the longest common token prefix (of the prompt alone
and of every prompt + completion) is the prompt, and everything after it is scored.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref.data.conversations import ASSISTANT, HUMAN, Text
from jaxpref.data.records import Record
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.data.turns import Span, common_prefix, read_chat

TRUNCATE = ('prompt_left', 'end', 'drop')


class Example(NamedTuple):
  """One prompt and its K candidates, best first.

  `scored` marks the completion tokens that count; the prompt may be empty where the tokenizer has
  no bos, and then the first token of every candidate is unscored, since nothing predicts it.
  """

  prompt: np.ndarray  # int32 [P]
  candidates: tuple[np.ndarray, ...]  # K of int32 [C_k]
  scored: tuple[np.ndarray, ...]  # K of bool [C_k]
  # Each a number, float32 [K] over the candidates, or K of float32 [C_k] over their tokens.
  extras: dict[str, Any]


def prompt_tokens(
  prompt: Text, tokenizer: Tokenizer, tools: Sequence[Mapping] | None = None
) -> list[int]:
  """Tokens of a prompt, string or messages, as training and sampling both see them.

  Messages (and `tools`) go through the chat template up to where the assistant begins. A string
  gets a bos where the tokenizer's own habit adds one, an empty one wherever there is a bos at all.
  """
  if isinstance(prompt, str):
    return _with_bos(tokenizer.encode(prompt), tokenizer, always=not prompt)
  if not prompt:
    return []
  text = tokenizer.apply_chat(prompt, add_generation_prompt=True, **_template_options(tools))
  return tokenizer.encode(text)


def make_example(record: Record, tokenizer: Tokenizer, report: Counter) -> Example:
  """Tokenises a record; counts 'boundary_merges' in `report`.

  Raises ValueError where the chat template refuses the messages or nothing would be scored.
  """
  prompt = prompt_tokens(record.prompt, tokenizer, record.tools)
  whole = [_read(record, completion, tokenizer) for completion in record.completions]
  begins = [common_prefix(prompt, tokens) for tokens, _ in whole]
  border = min(begins, default=len(prompt))
  report['boundary_merges'] += border < len(prompt)
  candidates, scored = [], []
  for begin, (tokens, spans) in zip(begins, whole, strict=True):
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:
      mask[border if start <= begin else start : end] = True
    mask[:border] = False
    mask[:1] = False  # nothing predicts the very first token
    if not mask.any():
      raise ValueError('nothing to score: the completion has no token that another one precedes')
    candidates.append(np.asarray(tokens[border:], np.int32))
    scored.append(mask[border:])
  extras = {
    name: np.asarray(value, np.float32) if isinstance(value, tuple) else value
    for name, value in record.extras.items()
  }
  if record.steps:
    tokens, _ = whole[0]
    extras |= _step_fields(record, tokens, border, tokenizer)
  return Example(np.asarray(prompt[:border], np.int32), tuple(candidates), tuple(scored), extras)


def _step_fields(record: Record, tokens, border: int, tokenizer: Tokenizer) -> dict[str, Any]:
  """'step_ends' and 'step_labels' of a stepwise record's one candidate.

  A step ends with the last token that lies wholly within it.
  """
  prompt, (completion,) = record.prompt, record.completions
  if plain := isinstance(completion, str):
    text, start = f'{prompt}{completion}', len(prompt)
  else:
    text = tokenizer.apply_chat([*prompt, *completion], **_template_options(record.tools))
    steps = completion[-1]['content']
    start = text.rfind(steps.strip())  # some templates strip what they are given
    if start < 0:
      raise ValueError('the chat template rewrites the steps, so their ends cannot be found')
    start -= len(steps) - len(steps.lstrip())
  found, labels = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.float32)
  for end, label in record.steps:
    part = tokenizer.encode(text[: start + end])
    if plain:
      part = _with_bos(part, tokenizer, always=not prompt)
    last = max(common_prefix(part, tokens) - 1, border)
    found[last], labels[last] = 1, label
  return {'step_ends': (found[border:],), 'step_labels': (labels[border:],)}


def truncate(
  example: Example, max_length: int, how: str, bos_id: int | None, report: Counter
) -> Example | None:
  """Shortens an example to prompt + longest candidate <= max_length, or drops it (None).

  'prompt_left' takes tokens off the prompt's left (a bos stays), down to one, then off the
  candidates' ends; 'end' off the candidates' ends; 'drop' drops. Counts what happened in `report`;
  an example whose candidates no longer differ, or that has nothing scored, is dropped too.
  """
  prompt = example.prompt
  longest = max((len(c) for c in example.candidates), default=0)
  if len(prompt) + longest <= max_length:
    return example
  if how == 'drop':
    report['dropped_long'] += 1
    return None
  if how == 'prompt_left':
    keep = min(len(prompt), max(1, max_length - longest))
    report['truncated_prompts'] += keep < len(prompt)
    head = prompt[:1] if prompt[:1] == bos_id else prompt[:0]
    prompt = np.concatenate([head, prompt[len(prompt) - keep + len(head) :]])
  room = max(0, max_length - len(prompt))
  report['truncated_completions'] += longest > room
  candidates = tuple(c[:room] for c in example.candidates)
  scored = tuple(s[:room] for s in example.scored)
  if not all(s.any() for s in scored):
    report['dropped_unscored'] += 1
    return None
  if _all_equal(candidates) and not _all_equal(example.candidates):
    report['dropped_same'] += 1
    return None
  extras = {
    name: tuple(v[:room] for v in value) if isinstance(value, tuple) else value
    for name, value in example.extras.items()
  }
  return Example(prompt, candidates, scored, extras)


def _template_options(tools: Sequence[Mapping] | None) -> dict[str, Any]:
  return {'tools': tools} if tools else {}


def _read(record: Record, completion: Text, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
  """The tokens of prompt + completion, and the spans [start, end) of tokens that the policy wrote.

  A span that starts at or before the prompt's end is meant to start at the border.
  """
  prompt = record.prompt
  if isinstance(prompt, str) and isinstance(completion, str):
    return _read_text(prompt, completion, tokenizer)
  return read_chat([*prompt, *completion], len(prompt), tokenizer, record.tools)


def _read_text(prompt: str, completion: str, tokenizer: Tokenizer):
  text = prompt + completion
  tokens = _with_bos(tokenizer.encode(text), tokenizer, always=not prompt)
  spans, start = [], 0
  if prompt.startswith(HUMAN):  # later human turns of a transcript are not the policy's words
    human = text.find(HUMAN, len(prompt))
    while human >= 0:
      spans.append((start, common_prefix(prompt_tokens(text[:human], tokenizer), tokens)))
      reply = text.find(ASSISTANT, human)
      if reply < 0:
        return tokens, spans
      answer = reply + len(ASSISTANT)
      start = common_prefix(prompt_tokens(text[:answer], tokenizer), tokens)
      human = text.find(HUMAN, answer)
  if tokenizer.eos_id is not None and (not tokens or tokens[-1] not in tokenizer.stop_ids):
    tokens.append(tokenizer.eos_id)
  return tokens, [*spans, (start, len(tokens))]


def _with_bos(tokens: list[int], tokenizer: Tokenizer, always: bool) -> list[int]:
  bos = tokenizer.bos_id
  if bos is None or tokens[:1] == [bos] or not (tokenizer.adds_bos or always):
    return tokens
  return [bos, *tokens]


def _all_equal(arrays: Sequence[np.ndarray]) -> bool:
  return all(np.array_equal(arrays[0], array) for array in arrays[1:])
