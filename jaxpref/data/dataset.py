"""Data sets: fixed lists of examples that know all their lengths at once, as packing needs it.

`loading.load` makes one from a source, by way of the cache; `from_examples` stays in memory.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data import cache
from jaxpref.data.examples import Example


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Examples by index, stored flat (memory-mapped where they come from a cache).

  `kind` is 'preference' (K = 2), 'ranked' (K = n), 'unpaired' (K = 1 and a label), 'stepwise'
  (K = 1 and labels on tokens), 'sft' (K = 1) or 'prompt' (K = 0). `report` counts what reading and
  truncation did and names the kind of the records; `fingerprint` changes with any token, mask or
  extra.
  """

  arrays: cache.Arrays
  indices: np.ndarray  # int64 [n] into `arrays`
  kind: str
  fingerprint: str
  report: Mapping[str, Any]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, i: int) -> Example:
    if not -len(self) <= i < len(self):
      raise IndexError(f'example {i} of a data set of {len(self)}')
    row = int(self.indices[i])
    lengths = self.arrays.lengths[row]
    count = int(np.count_nonzero(lengths[1:]))
    ends = self._starts[row] + np.cumsum(lengths[: 1 + count], dtype=np.int64)
    tokens = np.array(self.arrays.tokens[self._starts[row] : ends[-1]])
    scored = np.array(self.arrays.scored[self._starts[row] : ends[-1]])
    cuts = ends[:-1] - self._starts[row]
    prompt, *candidates = np.split(tokens, cuts)
    meta = self.arrays.meta
    extras: dict[str, Any] = {
      name: float(value)
      for name, value in zip(meta['extras'], self.arrays.extras[row], strict=True)
    }
    for y, name in enumerate(meta['of_candidates']):
      extras[name] = np.array(self.arrays.of_candidates[row, :count, y])
    for z, name in enumerate(meta['of_tokens']):
      values = np.array(self.arrays.of_tokens[self._starts[row] : ends[-1], z])
      extras[name] = tuple(np.split(values, cuts)[1:])
    return Example(prompt, tuple(candidates), tuple(np.split(scored, cuts)[1:]), extras)

  def __iter__(self) -> Iterator[Example]:
    return (self[i] for i in range(len(self)))

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    ends = np.cumsum(self.arrays.lengths.sum(1, dtype=np.int64))
    return np.concatenate([[0], ends])

  @property
  def extras(self) -> tuple[str, ...]:
    """The names of the numbers that come with every example."""
    return tuple(name for group in cache.EXTRAS for name in self.arrays.meta[group])

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """int32 [n, 1+K]: tokens of the prompt and of each candidate (0: no such candidate)."""
    return np.asarray(self.arrays.lengths)[self.indices]

  @functools.cached_property
  def prompts(self) -> np.ndarray:
    """uint64 [n]: hash of each prompt as its record gave it, before any truncation."""
    return np.asarray(self.arrays.prompts)[self.indices]

  def origin(self, i: int) -> str:
    """Where example i came from, such as 'pairs.jsonl:17'."""
    return self.arrays.origins[self.indices[i]].decode()

  def select(self, indices: Sequence[int] | np.ndarray) -> 'Dataset':
    """The examples at `indices`, in that order."""
    chosen = self.indices[np.asarray(indices, np.int64)]
    digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()
    return dataclasses.replace(self, indices=chosen, fingerprint=digest)

  def split(self, fraction: float, seed: int = 0) -> tuple['Dataset', 'Dataset']:
    """(train, held-out): about `fraction` of the prompts are held out, with all their examples.

    Which ones follows from a hash of the prompt's content and the seed alone, so a prompt stays on
    its side when the data grows, and never stands on both. Examples without a prompt go by their
    first candidate.
    """
    if not 0 <= fraction <= 1:
      raise ValueError(f'split: fraction should be within [0, 1], got {fraction}')
    salt = np.uint64(hash64(f'split {seed}'.encode()))
    held_out = _mix(self.prompts ^ salt) < fraction * 2.0**64
    return self.select(np.flatnonzero(~held_out)), self.select(np.flatnonzero(held_out))


def from_examples(
  items: Sequence[Example], *, kind: str | None = None, origins: Sequence[str] | None = None
) -> Dataset:
  """A data set in memory. Without `kind`, it follows from 'label' and the number of candidates."""
  if not items:
    raise ValueError('from_examples: expected at least one example')
  if kind is None:
    count = len(items[0].candidates)
    kind = {1: 'sft', 2: 'preference'}.get(count, 'ranked')
    kind = 'unpaired' if 'label' in items[0].extras else kind
  digest = hashlib.sha256()
  rows = []
  for number, example in enumerate(items):
    _check_example(number, example)
    if example.extras.keys() != items[0].extras.keys():
      raise ValueError(
        f'example {number} has the extras {sorted(example.extras)}, '
        f'example 0 {sorted(items[0].extras)}'
      )
    for array in (example.prompt, *example.candidates, *example.scored):
      digest.update(len(array).to_bytes(8, 'little') + np.ascontiguousarray(array).tobytes())
    for name, value in sorted(example.extras.items()):
      whole = np.concatenate(value) if isinstance(value, tuple) else np.asarray(value)
      digest.update(name.encode() + whole.astype(np.float32).tobytes())
    prompt = example.prompt if len(example.prompt) > 1 else example.candidates[0]
    origin = origins[number] if origins else f'example {number}'
    rows.append((origin, hash64(np.asarray(prompt, np.int32).tobytes()), example))
  report = {'records': len(rows), 'examples': len(rows)}
  return from_arrays(cache.collect(rows, {'kind': kind, 'report': report}), digest.hexdigest())


def from_arrays(arrays: cache.Arrays, fingerprint: str) -> Dataset:
  """All examples of a cache."""
  return Dataset(
    arrays,
    np.arange(len(arrays.lengths)),
    arrays.meta['kind'],
    fingerprint,
    arrays.meta['report'],
  )


def hash64(data: bytes) -> int:
  """A hash that stays the same between runs and machines."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little')


def _mix(x: np.ndarray) -> np.ndarray:
  """splitmix64's finaliser: every input bit reaches every output bit (https://prng.di.unimi.it)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _check_example(number: int, example: Example) -> None:
  if not example.candidates or len(example.candidates) != len(example.scored):
    raise ValueError(
      f'example {number}: expected as many masks as candidates, at least one; got '
      f'{len(example.scored)} and {len(example.candidates)}'
    )
  for k, (tokens, mask) in enumerate(zip(example.candidates, example.scored, strict=True)):
    if len(tokens) != len(mask) or not len(tokens):
      raise ValueError(
        f'example {number}, candidate {k}: expected a mask entry for each of at least one token; '
        f'got {len(mask)} and {len(tokens)}'
      )
    if mask[0] and not len(example.prompt):
      raise ValueError(
        f'example {number}, candidate {k}: its first token is scored, but no token precedes it'
      )
