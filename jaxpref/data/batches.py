"""Batches as a pure function of (seed, step, lengths), so that a run resumes from its step alone.

`Batches(...)[step]` is the batch of optimizer step `step`, whatever was read before; `stream`
wraps it in grain, which reads ahead in threads. Shapes come from a ladder of at most `LADDER`
sizes, laid down from the first batches, so that a run compiles a handful of programs.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import grain
import jax
import numpy as np

from jaxpref.data.order import Order
from jaxpref.data.packing import (
  Piece,
  Shape,
  auto_row_lengths,
  divide,
  fill,
  grown,
  pieces,
  place,
  shape_for,
)
from jaxpref.typing import Batch

LADDER = 3  # shapes in the ladder; a batch that none holds brings a fourth
TRIAL_BATCHES = 128  # batches it is laid down from
WORTH = 0.015  # share of tokens that a further shape has to save


class Examples(Protocol):
  """What batches need of a data set; `lengths` is int [n, 1+K]: prompt, then candidates."""

  @property
  def lengths(self) -> np.ndarray: ...

  def __len__(self) -> int: ...
  def __getitem__(self, index: int, /) -> Any: ...


class Table(Protocol):
  """Values per completion token: K float arrays for example `index`."""

  def __getitem__(self, index: int, /) -> Sequence[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Packing:
  """How examples are laid into rows. Results do not depend on it; speed and memory do.

  Attributes:
    row_lengths: ascending; empty means: from the longest example and its halves.
    share_prompts: lay a prompt out once for all its candidates.
    alone: one piece a row, the classic padded layout.
  """

  row_lengths: tuple[int, ...] = ()
  share_prompts: bool = True
  alone: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """Batches of `size` examples over shuffled passes of `dataset`.

  Attributes:
    dataset: see `Examples`.
    size: examples a batch, over all microbatches and groups; a multiple of microbatches * groups.
    seed: of the order. None keeps the data's order and ends after one pass, the last batch filled
      up with empty examples (evaluation).
    microbatches, groups: M and G of the batch's arrays.
    tables: per-example values to attach: name -> table, where `table[i]` holds K float arrays, one
      value per completion token (such as reference log-probs).
  """

  dataset: Examples
  size: int
  seed: int | None = 0
  microbatches: int = 1
  groups: int = 1
  packing: Packing = Packing()
  tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not len(self.dataset):
      raise ValueError('the data set is empty: nothing to batch')
    if self.dataset.lengths.shape[1] < 2:
      raise ValueError('the data set holds prompts alone: there is no completion to learn from')
    cells = self.microbatches * self.groups
    if self.size < 1 or self.size % cells:
      raise ValueError(
        f'batch.size={self.size} must be a positive multiple of microbatches * data groups = '
        f'{self.microbatches} * {self.groups}'
      )

  def __len__(self) -> int:
    """Batches of one pass, the last one counted when it is partial."""
    return -(-len(self.dataset) // self.size)

  def indices(self, step: int) -> np.ndarray:
    """The examples of batch `step`, int64 [<= size]. A pass ends inside a batch, not before it."""
    n, at = len(self.dataset), step * self.size
    if self.seed is None:
      if not 0 <= step < len(self):
        raise IndexError(f'batch {step} of an unshuffled pass of {len(self)}')
      return np.arange(at, min(at + self.size, n))
    return self._order[step]

  @cached_property
  def _order(self) -> Order:
    return Order(self.dataset.lengths, self.size, self.seed or 0)

  @cached_property
  def _extras(self) -> dict[str, int]:
    """Names of the examples' extras, and how many of the axes B, K, T each has."""
    extras = self.dataset[0].extras.items()
    return {name: 3 if isinstance(value, tuple) else 1 + np.ndim(value) for name, value in extras}

  @cached_property
  def completion(self) -> int:
    """T: the longest completion of the data set, rounded up."""
    return -(-max(1, int(self.dataset.lengths[:, 1:].max())) // 16) * 16

  @cached_property
  def row_lengths(self) -> tuple[int, ...]:
    lengths = self.dataset.lengths
    longest = lengths.sum(1)
    if not self.packing.share_prompts:
      longest = (lengths[:, :1] + lengths[:, 1:]).max(1)
    if self.packing.row_lengths:
      return tuple(sorted(self.packing.row_lengths))
    auto = auto_row_lengths(int(longest.max()))
    return auto[-1:] if self.packing.alone else auto

  @cached_property
  def ladder(self) -> tuple[Shape, ...]:
    """At most `LADDER` shapes, ascending, the last of them for the largest trial batch.

    A smaller one is there only if it saves a share `WORTH` of the next one's tokens.
    """
    count = TRIAL_BATCHES if self.seed is not None else min(TRIAL_BATCHES, len(self))
    trials = [self._cells(self.indices(step)) for step in range(count)]
    fullest = np.array([max(sum(p.length for p in parts) for _, parts in t) for t in trials])
    by_size = np.argsort(fullest, kind='stable')
    rungs: list[Shape] = []
    most = LADDER + (self.seed is None and count == len(self))  # no batch is left that none holds
    for share in reversed(divisions(fullest[by_size], most)):
      rung = self._shape([cell for i in by_size[share] for cell in trials[i]])
      if not rungs or rung.tokens < (1 - WORTH) * rungs[-1].tokens:
        rungs.append(rung)
    return tuple(reversed(rungs))

  def _cells(self, indices: np.ndarray) -> list[tuple[np.ndarray, list[Piece]]]:
    """The [M * G] cells of a batch: positions within the batch, and their pieces."""
    short = self.size - len(indices)
    lengths = np.concatenate(
      [self.dataset.lengths[indices], np.zeros((short, self.dataset.lengths.shape[1]), np.int32)]
    )
    hands = divide(lengths.sum(1), self.microbatches * self.groups)
    share = self.packing.share_prompts
    return [(hand, pieces(lengths[hand], share_prompts=share)) for hand in hands]

  def _shape(self, cells: Sequence[tuple[np.ndarray, list[Piece]]]) -> Shape:
    sizes = [[p.length for p in parts] for _, parts in cells]
    scored = max(self._slots(parts) for _, parts in cells)
    return shape_for(sizes, scored, self.row_lengths, alone=self.packing.alone)

  def _slots(self, parts: Sequence[Piece]) -> int:
    return sum(p.completion for p in parts)

  def shape_of(self, step: int) -> Shape:
    """The shape of batch `step`, without filling it."""
    return self.shape(self._cells(self.indices(step)))

  def shape(self, cells: Sequence[tuple[np.ndarray, list[Piece]]]) -> Shape:
    """The first rung that holds every cell; beyond the last one, that with a few more rows."""
    scored = max(self._slots(parts) for _, parts in cells)

    def holds(shape: Shape) -> bool:
      return scored <= shape.scored and all(
        place([p.length for p in parts], shape.rows, alone=self.packing.alone) is not None
        for _, parts in cells
      )

    shape = next(filter(holds, self.ladder), self.ladder[-1])
    while not holds(shape):
      shape = grown(shape, self.row_lengths[-1])
    return shape

  def __getitem__(self, step: int) -> Batch:
    indices = self.indices(step)
    cells = self._cells(indices)
    shape = self.shape(cells)
    filled = []
    for hand, parts in cells:
      # Hands are sorted, so the empty places of a short last batch come last in every cell.
      ids = [int(indices[i]) for i in hand if i < len(indices)]
      places = place([p.length for p in parts], shape.rows, alone=self.packing.alone)
      examples = [self.dataset[i] for i in ids]
      assert places is not None
      cell = fill(
        examples,
        ids,
        parts,
        places,
        shape,
        len(hand),
        self.dataset.lengths.shape[1] - 1,
        self.completion,
      )
      self._attach(cell, examples, ids)
      filled.append(cell)
    lead = (self.microbatches, self.groups)
    return jax.tree.map(lambda *xs: np.stack(xs).reshape(*lead, *xs[0].shape), *filled)

  def _attach(self, cell: Batch, examples: Sequence[Any], ids: Sequence[int]) -> None:
    """Adds tables [B, K, T] and the examples' extras [B], [B, K] or [B, K, T] to the fields."""
    shape = cell.fields['mask'].shape
    for name, table in self.tables.items():
      cell.fields[name] = _field([table[i] for i in ids], shape)
    for name, rank in self._extras.items():
      values = [example.extras[name] for example in examples]
      cell.fields[name] = _field(values, shape[:rank])


def divisions(sizes: np.ndarray, most: int) -> list[slice]:
  """Ascending sizes int [n] cut into at most `most` parts, each to be filled up to its last.

  Of all ways the one with the least filling, found as shortest paths are.
  """
  n = len(sizes)
  cost, cuts = np.concatenate([[0.0], np.full(n, np.inf)]), []
  for _ in range(most):
    # [i, j]: the best up to i, then one part from i to j.
    through = cost[:, None] + np.maximum(
      np.arange(n + 1) - np.arange(n + 1)[:, None], 0
    ) * np.append(0, sizes)
    through[np.tril_indices(n + 1, -1)] = np.inf
    cuts.append(through.argmin(0))
    cost = through.min(0)
  parts, stop = [], n
  for cut in reversed(cuts):
    start = int(cut[stop])
    if start < stop:
      parts.append(slice(start, stop))
    stop = start
  return parts[::-1]


def _field(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
  """float32 [B], [B, K] or [B, K, T] of numbers, arrays [K] or K arrays [C_k]; 0 beyond them."""
  out = np.zeros(shape, np.float32)
  for b, value in enumerate(values):
    if len(shape) == 1:
      out[b] = value
    elif len(shape) == 2:
      out[b, : len(value)] = value
    else:
      for k, numbers in enumerate(value):
        out[b, k, : len(numbers)] = numbers
  return out


class _Steps:
  """Random access over batches for grain: item i is (step, batch)."""

  def __init__(self, batches: Batches, start: int, stop: int):
    self._batches, self._start, self._stop = batches, start, stop

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, i: int) -> tuple[int, Batch]:
    return self._start + i, self._batches[self._start + i]


def stream(
  batches: Batches, start: int, stop: int, *, ahead: int = 4
) -> Iterator[tuple[int, Batch]]:
  """(step, batch) for the steps [start, stop), read ahead in threads by grain."""
  if stop <= start:
    return iter(())
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)
  return iter(grain.MapDataset.source(_Steps(batches, start, stop)).to_iter_dataset(options))
