"""Examples -> packed rows: which row holds which piece, and the arrays of one `Batch`.

A piece is a prompt with some of its candidates. With shared prompts an example is one piece, its
prompt laid out once; without, every candidate brings its own copy. Rows come in a few lengths, so
that short examples do not pay for long rows' attention. Everything here is numpy and a pure
function of its arguments; results of training do not depend on any of it
(tests/test_data_packing.py).
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref.typing import Batch, Layout, Rows, Scored

# Attention to a row of this length takes as long as all else, in small models on a CPU. Where it
# takes less, rows could be a little longer.
ATTENTION_LENGTH = 2048
SCORED_MULTIPLE = 64  # scored slots are rounded up to it


class Shape(NamedTuple):
  """Static sizes of one (microbatch, group) cell of a batch."""

  rows: tuple[tuple[int, int], ...]  # (number of rows, row length), ascending in length
  scored: int  # slots for scored tokens

  @property
  def tokens(self) -> int:
    return sum(count * length for count, length in self.rows)


class Piece(NamedTuple):
  """`example` (its place in the cell) with the candidates `branches` (1..K); `length` in tokens."""

  example: int
  branches: tuple[int, ...]
  length: int
  completion: int  # tokens of `length` that are completions


class Place(NamedTuple):
  kind: int  # index in Shape.rows
  row: int
  start: int


def pieces(lengths: np.ndarray, *, share_prompts: bool = True) -> list[Piece]:
  """Pieces of examples with token counts `lengths` int [B, 1+K] (prompt, then candidates)."""
  whole = tuple(range(1, lengths.shape[1]))
  out = []
  for b, (prompt, *counts) in enumerate(lengths.tolist()):
    present = tuple(k for k in whole if counts[k - 1])
    for branches in [present] if share_prompts else [(k,) for k in present]:
      if branches:
        completion = sum(counts[k - 1] for k in branches)
        out.append(Piece(b, branches, prompt + completion, completion))
  return out


def place(
  sizes: Sequence[int], rows: Sequence[tuple[int, int]], *, alone: bool = False
) -> list[Place] | None:
  """Best-fit decreasing into the given rows; None when something does not fit.

  `alone` gives every piece a row of its own. Ties fall to the lower row, so the result is a
  function of the arguments only.
  """
  free = sorted(
    (length, kind, row) for kind, (count, length) in enumerate(rows) for row in range(count)
  )
  out: list[Place | None] = [None] * len(sizes)
  for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
    at = bisect_left(free, (sizes[i],))
    if at == len(free):
      return None
    room, kind, row = free.pop(at)
    out[i] = Place(kind, row, rows[kind][1] - room)
    if not alone and room > sizes[i]:
      insort(free, (room - sizes[i], kind, row))
  return [p for p in out if p is not None]


def open_rows(
  sizes: Sequence[int], row_lengths: Sequence[int], *, alone: bool = False
) -> tuple[tuple[int, int], ...]:
  """Rows that hold pieces of these sizes: best fit, and a new row is the shortest that will do."""
  if sizes and max(sizes) > row_lengths[-1]:
    raise ValueError(
      f'an example of {max(sizes)} tokens does not fit the longest row of {row_lengths[-1]}; '
      f'raise batch.row_lengths or lower data.max_length'
    )
  free: list[int] = []
  counts = dict.fromkeys(row_lengths, 0)
  for size in sorted(sizes, reverse=True):
    at = bisect_left(free, size)
    if at < len(free) and not alone:
      room = free.pop(at)
    else:
      room = row_lengths[bisect_left(row_lengths, size)]
      counts[room] += 1
    insort(free, room - size)
  return tuple((count, length) for length, count in counts.items())


def auto_row_lengths(longest: int) -> tuple[int, ...]:
  """Row lengths for examples of up to `longest` tokens: that one rounded up, and its halves."""
  step = 128 if longest > 512 else 32
  top = -(-longest // step) * step
  lengths = {top}
  while top > 256:
    top = -(-top // (2 * step)) * step
    lengths.add(top)
  return tuple(sorted(lengths))


def divide(sizes: np.ndarray, cells: int) -> np.ndarray:
  """Deal `n` examples to `cells` equal hands with balanced token counts: int [cells, n / cells].

  Longest first, each to the hand with the fewest tokens that still has a place.
  """
  per = len(sizes) // cells
  hands: list[list[int]] = [[] for _ in range(cells)]
  load = np.zeros(cells, np.int64)
  for i in np.argsort(-sizes, kind='stable'):
    open_hands = [c for c in range(cells) if len(hands[c]) < per]
    c = min(open_hands, key=lambda c: (load[c], c))
    hands[c].append(int(i))
    load[c] += sizes[i]
  return np.array([sorted(hand) for hand in hands], np.int64).reshape(cells, per)


def shape_for(
  cells: Sequence[Sequence[int]], scored: int, row_lengths: Sequence[int], *, alone: bool = False
) -> Shape:
  """A small shape that holds each of several cells (lists of piece sizes).

  Starts from the rows that the cells would open, the most of each length, and from the longest
  alone; as long as every cell still fits, gives back rows or takes others in their place that cost
  less. The cheaper end is taken.
  """
  opened = [
    dict((length, count) for count, length in open_rows(cell, row_lengths, alone=alone))
    for cell in cells
  ]
  each = {length: max(o[length] for o in opened) for length in row_lengths}
  longest = {length: 0 for length in row_lengths} | {row_lengths[-1]: sum(each.values())}
  hardest = sorted(cells, key=sum, reverse=True)
  moves = _moves(row_lengths, swap=not alone)

  def fits(counts: Mapping[int, int]) -> bool:
    rows = _as_rows(counts)
    for i, cell in enumerate(hardest):
      if place(cell, rows, alone=alone) is None:
        hardest.insert(0, hardest.pop(i))  # what did not fit is what to try first
        return False
    return True

  def tightened(counts: dict[int, int]) -> Shape:
    while True:
      fewer = ({n: counts[n] + move.get(n, 0) for n in counts} for move in moves)
      found = next((new for new in fewer if min(new.values()) >= 0 and fits(new)), None)
      if found is None:
        return Shape(_as_rows(counts), _slots(scored))
      counts = found

  return min((tightened(start) for start in (each, longest)), key=lambda shape: cost(shape.rows))


def cost(rows: Iterable[tuple[int, int]]) -> float:
  """Of computing rows (how many, how long), in tokens: theirs, and what attention adds."""
  return sum(count * length * (1 + length / ATTENTION_LENGTH) for count, length in rows)


def _moves(row_lengths: Sequence[int], *, swap: bool) -> list[dict[int, int]]:
  """Changes of how many rows there are of each length that save, what saves most first."""
  moves = [{length: -1} for length in row_lengths]
  for short, long in itertools.combinations(sorted(row_lengths), 2) if swap else ():
    times = -(-long // short)
    moves += [{long: -1, short: n} for n in range(1, times + 1)]
    moves += [{long: 1, short: -n} for n in (times, times + 1)]
  priced = [(cost((n, length) for length, n in move.items()), move) for move in moves]
  return [move for price, move in sorted(priced, key=lambda x: x[0]) if price < 0]


def _slots(scored: int) -> int:
  return -(-max(scored, 1) // SCORED_MULTIPLE) * SCORED_MULTIPLE


def grown(shape: Shape, length: int) -> Shape:
  """The next larger shape: a quarter more tokens in rows of `length`, a quarter more slots."""
  counts = {size: count for count, size in shape.rows}
  counts[length] = counts.get(length, 0) + -(-shape.tokens // (4 * length))
  return Shape(_as_rows(counts), _slots(shape.scored + shape.scored // 4))


def _as_rows(counts: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
  return tuple((count, length) for length, count in sorted(counts.items()) if count)


def fill(
  examples: Sequence[Any],
  ids: Sequence[int],
  parts: Sequence[Piece],
  places: Sequence[Place],
  shape: Shape,
  size: int,
  candidates: int,
  completion: int,
) -> Batch:
  """Arrays of one cell (no leading [M, G]).

  Args:
    examples: up to `size` = B objects with `prompt` int [P], `candidates` (K int arrays) and
      `scored` (K bool arrays).
    ids: their indices in the data set.
    parts, places: from `pieces` and `place`.
    candidates, completion: K and T.
  """
  rows = [np.zeros((4, count, length), np.int32) for count, length in shape.rows]
  offsets = np.cumsum([0, *(count * length for count, length in shape.rows)])
  before, at, cell = [], [], []
  mask = np.zeros((size, candidates, completion), bool)
  segment = [[0] * count for count, _ in shape.rows]
  for part, (kind, row, start) in zip(parts, places, strict=True):
    example = examples[part.example]
    segment[kind][row] += 1
    prompt = len(example.prompt)
    flat = offsets[kind] + row * shape.rows[kind][1] + start
    line = rows[kind][:, row, start : start + part.length]
    line[0, :prompt] = example.prompt
    line[1, :prompt] = np.arange(prompt)
    line[2] = segment[kind][row]
    used = prompt
    for branch in part.branches:
      tokens, scored = example.candidates[branch - 1], example.scored[branch - 1]
      span = slice(used, used + len(tokens))
      line[0, span], line[1, span], line[3, span] = (
        tokens,
        np.arange(prompt, prompt + len(tokens)),
        branch,
      )
      t = np.flatnonzero(scored)
      if not prompt:
        t = t[t > 0]  # nothing comes before the first token, so nothing predicts it
      at.append(flat + used + t)
      # The last prompt token predicts the first token of every branch.
      before.append(np.where(t > 0, flat + used + t - 1, flat + prompt - 1))
      cell.append((part.example * candidates + branch - 1) * completion + t)
      mask[part.example, branch - 1, t] = True
      used += len(tokens)
  slots = Scored(*(np.full(shape.scored, fill, np.int32) for fill in (0, 0, mask.size)))
  for slot, found in zip(slots, (before, at, cell), strict=True):
    values = np.concatenate(found) if found else np.zeros(0, np.int32)
    slot[: len(values)] = values
  padded = np.full(size, -1, np.int32)
  padded[: len(ids)] = ids
  packed = tuple(Rows(tokens, Layout(*rest)) for tokens, *rest in rows)
  return Batch(packed, slots, {'mask': mask, 'ids': padded})
