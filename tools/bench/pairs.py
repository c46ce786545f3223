"""The pairs that every worker gets, as token ids: from a file, or made up from a seed."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxpref import data

# Lengths in tokens of the made-up pairs: log-normal, with the means that chats of HH-RLHF have.
PROMPT, COMPLETION = (150, 0.8), (60, 0.8)  # (mean, standard deviation of the logarithm)
SPECIAL = 3  # ids below it are never drawn: padding and ends

Pair = dict[str, list[int]]


def made_up(count: int, vocab_size: int, max_length: int, seed: int = 0) -> list[Pair]:
  """`count` pairs of random tokens, prompt + completion at most `max_length`."""
  rng = np.random.default_rng(seed)

  def length(mean: float, spread: float, limit: int) -> int:
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread)
    return int(np.clip(drawn, 2, limit))

  pairs = []
  scale = min(1.0, max_length / 512)
  for _ in range(count):
    prompt = length(PROMPT[0] * scale, PROMPT[1], max_length // 2)
    sizes = (
      prompt,
      *(length(COMPLETION[0] * scale, COMPLETION[1], max_length - prompt) for _ in range(2)),
    )
    parts = (rng.integers(SPECIAL, vocab_size, size).tolist() for size in sizes)
    pairs.append(dict(zip(('prompt', 'chosen', 'rejected'), parts, strict=True)))
  return pairs


def from_file(source: str, tokenizer: str, count: int, max_length: int) -> list[Pair]:
  """The first `count` pairs of a source of preferences, over again where it has fewer."""
  if '://' not in source and ':' not in source:
    source = f'jsonl:{Path(source).expanduser()}'
  dataset = data.load(
    source, data.load_tokenizer(tokenizer), kind='preference', max_length=max_length
  )
  pairs = []
  for i in range(count):
    example: Any = dataset[i % len(dataset)]
    parts = (example.prompt, *example.candidates)
    named = zip(('prompt', 'chosen', 'rejected'), parts, strict=True)
    pairs.append({name: part.tolist() for name, part in named})
  return pairs


def labelled(pairs: list[Pair], batch: int, max_length: int) -> list[dict[str, Any]]:
  """Chosen and rejected completions in turn, as KTO reads them, `batch` at a time.

  `other` is the completion of the example before, of the batch's last for its first, cut where with
  the prompt it would be longer than `max_length`: TRL's way to mismatch them.
  """
  kinds = ('chosen', 'rejected')
  own = [pair[kinds[i % 2]] for i, pair in enumerate(pairs)]
  examples = []
  for i, pair in enumerate(pairs):
    start = i - i % batch
    lender = i - 1 if i > start else min(start + batch, len(pairs)) - 1
    other = own[lender][: max_length - len(pair['prompt'])]
    label = kinds[i % 2] == 'chosen'
    examples.append(
      {'prompt': pair['prompt'], 'completion': own[i], 'other': other, 'label': label}
    )
  return examples
