"""The reference's log-probs, computed once and kept on disk: one float32 per completion token.

Entries are keyed by what they depend on: the weights' bytes, the model's config and temperature,
the compute dtype and a numerics version name a folder; an example's tokens and scored mask name an
entry in it. Another beta, loss, seed or epoch computes none. Missing entries are computed in blocks
whose layout follows from the data set alone (one example a row, rows of a few lengths), so that a
build that was interrupted and one that was not agree to the last bit.
"""

import dataclasses
import functools
import hashlib
import io
import logging
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref import hosts, sharding
from jaxpref.data import packing
from jaxpref.data.batches import Examples
from jaxpref.log_probs import log_probs
from jaxpref.models import Model
from jaxpref.storage import naming, write_atomically
from jaxpref.typing import Batch, Params

NUMERICS = 1  # raise it when a change of ours moves log-probs
BLOCK_TOKENS = 4096  # tokens of a block, per data group
SMALLEST_ROW = 64

log = logging.getLogger(__name__)


class Table:
  """Log-probs of a data set: `table[i]` is K float32 arrays, one value per completion token."""

  def __init__(self, keys: list[bytes], entries: Mapping[bytes, tuple[np.ndarray, ...]]):
    self._keys, self._entries = keys, entries

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
    return self._entries[self._keys[i]]


@dataclasses.dataclass(frozen=True)
class Store:
  """Blocks of entries in `folder`, one npz file each, written whole or not at all."""

  folder: Path

  def read(self) -> dict[bytes, tuple[np.ndarray, ...]]:
    """All entries; a damaged file is named, removed and later computed again."""
    entries: dict[bytes, tuple[np.ndarray, ...]] = {}
    for file in sorted(self.folder.glob('block-*.npz')):
      try:
        with open(file, 'rb') as raw, np.load(raw) as block:
          keys, lengths, values = block['keys'], block['lengths'], block['values']
      except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning(
          'reference log-probs: %s is damaged (%s); its examples are computed again', file, error
        )
        file.unlink(missing_ok=True)
        continue
      at = 0
      for key, counts in zip(keys, lengths, strict=True):
        parts = []
        for count in counts[counts >= 0]:
          parts.append(values[at : at + count])
          at += count
        entries[key.tobytes()] = tuple(parts)
    return entries

  def write(self, entries: Mapping[bytes, tuple[np.ndarray, ...]]) -> None:
    widest = max(len(parts) for parts in entries.values())
    lengths = [[len(p) for p in parts] + [-1] * (widest - len(parts)) for parts in entries.values()]
    keys = np.stack([np.frombuffer(key, np.uint8) for key in entries])
    values = np.concatenate([v for parts in entries.values() for v in parts])
    block = io.BytesIO()
    np.savez(
      block, keys=keys, lengths=np.array(lengths, np.int32), values=values.astype(np.float32)
    )
    with naming(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(self.folder / f'block-{uuid.uuid4().hex}.npz', block.getvalue())


def weights_hash(params: Params) -> str:
  """A hash of every parameter's path, dtype, shape and bytes."""
  digest = hashlib.blake2b(digest_size=16)
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(hosts.whole(leaf))
    digest.update(f'{sharding.path_of(key_path)} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.view(np.uint8).reshape(-1).data if array.size else b'')
  return digest.hexdigest()


def example_key(example: Any) -> bytes:
  """16 bytes from an example's tokens and scored masks."""
  digest = hashlib.blake2b(digest_size=16)
  for array in (example.prompt, *example.candidates, *example.scored):
    digest.update(len(array).to_bytes(8, 'little'))
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.digest()


def build(
  model: Model,
  params: Params,
  dataset: Examples,
  folder: str | os.PathLike,
  *,
  mesh: jax.sharding.Mesh | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
  """The table of `dataset` under `params`, computing what the store in `folder` lacks.

  Args:
    mesh: blocks are spread over its data groups; None: one device.
    progress: called with (examples computed, examples to compute).
  """
  dtype = np.dtype(model.dtype).name
  identity = f'{NUMERICS} {model.config!r} {model.temperature} {dtype} {weights_hash(params)}'
  store = Store(Path(folder) / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest())
  keys = [example_key(dataset[i]) for i in range(len(dataset))]
  entries = _known(store, keys, dataset.lengths)
  total = len(set(keys) - set(entries))
  compute = _compiled(model)
  done, first = 0, jax.process_index() == 0

  def lacks(i: int) -> bool:  # asked block by block: equal examples are computed once
    return keys[i] not in entries

  for block, batch in _blocks(dataset, lacks, 1 if mesh is None else sharding.groups(mesh)):
    if mesh is not None:
      batch = hosts.place(batch, jax.sharding.NamedSharding(mesh, jax.P(sharding.GROUPS)))
    logps = hosts.whole(compute(params, batch)).reshape(-1, *batch.fields['mask'].shape[2:])
    found = {}
    for row, i in enumerate(block):
      if not lacks(i):
        continue
      counts = dataset.lengths[i, 1:]
      found[keys[i]] = tuple(logps[row, k, :count].copy() for k, count in enumerate(counts))
    hosts.together(functools.partial(store.write, found) if first else lambda: None)
    entries |= found
    done += len(found)
    progress(done, total)
  return Table(keys, entries)


def _known(
  store: Store, keys: list[bytes], lengths: np.ndarray
) -> dict[bytes, tuple[np.ndarray, ...]]:
  """What process 0 finds in its store: the others may have another folder under this name."""
  first = jax.process_index() == 0
  entries = hosts.together(store.read if first else dict)
  if jax.process_count() == 1:
    return entries
  there = np.flatnonzero(hosts.from_first(np.array([key in entries for key in keys], bool)))
  values = np.zeros(int(lengths[there, 1:].sum()), np.float32)
  if first:
    values = np.concatenate([values[:0], *(part for i in there for part in entries[keys[i]])])
  values, at = hosts.from_first(values), 0
  for i in there:
    ends = at + np.cumsum(lengths[i, 1:])
    entries[keys[i]] = tuple(np.split(values[at : ends[-1]], ends[:-1] - at))
    at = ends[-1]
  return entries


@functools.cache
def _compiled(model: Model) -> Callable[[Params, Batch], jax.Array]:
  return jax.jit(lambda params, batch: log_probs(model, params, batch)['logps'])


def _blocks(
  dataset: Examples, lacks: Callable[[int], bool], groups: int
) -> Iterator[tuple[list[int], Batch]]:
  """Blocks of one example a row that hold a missing example, as (indices, batch [G, ...]).

  Every block of the data set is laid out alike whatever is missing. `lacks` is asked when a block's
  turn comes.
  """
  totals = dataset.lengths.sum(1)
  rows = np.maximum(SMALLEST_ROW, 1 << np.ceil(np.log2(np.maximum(totals, 1))).astype(np.int64))
  for length in np.unique(rows).tolist():
    members = np.flatnonzero(rows == length).tolist()
    count = max(1, BLOCK_TOKENS // length)
    for start in range(0, len(members), count * groups):
      block = members[start : start + count * groups]
      if any(map(lacks, block)):
        yield block, _lay_out(dataset, block, groups, count, length)


def _lay_out(dataset: Examples, block: list[int], groups: int, count: int, length: int) -> Batch:
  hands = [block[g * count : (g + 1) * count] for g in range(groups)]
  scored = max(int(dataset.lengths[hand, 1:].sum()) for hand in hands if hand)
  quarter = max(1, count * length // 4)  # scored slots in quarters of the block: few shapes
  shape = packing.Shape(((count, length),), -(-scored // quarter) * quarter)
  cells = []
  for hand in hands:
    parts = packing.pieces(dataset.lengths[np.array(hand, np.int64)])
    places = [packing.Place(0, part.example, 0) for part in parts]
    examples = [dataset[i] for i in hand]
    cells.append(
      packing.fill(
        examples, hand, parts, places, shape, count, dataset.lengths.shape[1] - 1, length
      )
    )
  return jax.tree.map(lambda *xs: np.stack(xs), *cells)
