"""Small made-up data for tests: ragged pairs of random tokens."""

from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
  prompt: np.ndarray
  candidates: tuple[np.ndarray, ...]
  scored: tuple[np.ndarray, ...]
  extras: dict[str, float]


class PairData:
  """A data set as `Batches` wants it."""

  def __init__(self, examples: list[Pair]):
    self.examples = examples
    self.lengths = np.array(
      [[len(e.prompt), *map(len, e.candidates)] for e in examples], np.int32
    ).reshape(len(examples), -1 if examples else 3)

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, i):
    return self.examples[i]


def random_pairs(
  n: int, *, seed: int, candidates: int = 2, longest: int = 24, vocab: int = 50
) -> PairData:
  rng = np.random.default_rng(seed)

  def tokens(low):
    return rng.integers(1, vocab, rng.integers(low, longest // 2)).astype(np.int32)

  examples = []
  for _ in range(n):
    completions = tuple(tokens(1) for _ in range(candidates))
    examples.append(
      Pair(tokens(1), completions, tuple(np.ones(len(c), bool) for c in completions), {})
    )
  return PairData(examples)
