"""The token cache: tokenised examples on disk, as flat arrays that are memory-mapped.

A cache is a folder named by the hash of all that decides its content: the source's bytes, the
tokenizer, the options and `FORMAT`. It is written under a temporary name and renamed into place, so
it is there whole or not at all; of two processes that build the same one, the first to rename wins
and both go on with a whole cache. Every file's checksum is kept, and a cache that does not match
(truncated, corrupt) is replaced.

  tokens.bin   int32 [S]       prompt and candidates of every example, end to end
  scored.bin   bool  [S]       True on scored completion tokens
  lengths.bin  int32 [n, 1+K]  tokens of the prompt and of each candidate (0: no such candidate)
  prompts.bin  uint64 [n]      hash of the prompt as the record gave it, before any truncation
  extras.bin   float32 [n, X]  numbers of an example; meta.json has the names
  of_candidates.bin float32 [n, K, Y]  numbers of each candidate
  of_tokens.bin     float32 [S, Z]     numbers of each token, 0 on prompts
  origins.bin  bytes [n]       where each example came from
  meta.json                    kind, report, names, and shape, dtype and checksum of every array
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data.examples import Example
from jaxpref.storage import naming

FORMAT = 2  # raise it when the same inputs would give other tokens or another layout


@dataclasses.dataclass(frozen=True)
class Arrays:
  """The content of a cache; arrays as in the module's docstring."""

  tokens: np.ndarray
  scored: np.ndarray
  lengths: np.ndarray
  prompts: np.ndarray
  extras: np.ndarray
  of_candidates: np.ndarray
  of_tokens: np.ndarray
  origins: np.ndarray
  meta: Mapping[str, Any]  # names of the last axis of the three, and what the builder added


EXTRAS = ('extras', 'of_candidates', 'of_tokens')
_NAMES = tuple(field.name for field in dataclasses.fields(Arrays) if field.name != 'meta')


def default_folder() -> pathlib.Path:
  """`$JAXPREF_CACHE`, or ~/.cache/jaxpref."""
  return pathlib.Path(os.environ.get('JAXPREF_CACHE') or '~/.cache/jaxpref').expanduser()


def key_of(parts: Mapping[str, Any]) -> str:
  """The name of the cache that is decided by `parts` (JSON values)."""
  text = json.dumps({'format': FORMAT, **parts}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def collect(examples: Iterable[tuple[str, int, Example]], meta: Mapping[str, Any]) -> Arrays:
  """Flat arrays of (origin, prompt hash, example); every example has the same extras."""
  rows = list(examples)
  width = max((len(example.candidates) for _, _, example in rows), default=0)
  names: dict[str, list[str]] = {group: [] for group in EXTRAS}
  for name, value in sorted(rows[0][2].extras.items()) if rows else ():
    names[EXTRAS[group_of(value)]].append(name)
  lengths = np.zeros((len(rows), 1 + width), np.int32)
  of_candidates = np.zeros((len(rows), width, len(names['of_candidates'])), np.float32)
  tokens, scored = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
  of_tokens = [np.zeros((0, len(names['of_tokens'])), np.float32)]
  for row, (_, _, example) in enumerate(rows):
    count = len(example.candidates)
    lengths[row, : 1 + count] = [len(example.prompt), *map(len, example.candidates)]
    tokens += [example.prompt, *example.candidates]
    scored += [np.zeros(len(example.prompt), bool), *example.scored]
    for y, name in enumerate(names['of_candidates']):
      of_candidates[row, :count, y] = example.extras[name]
    if names['of_tokens']:
      columns = [np.concatenate(example.extras[name]) for name in names['of_tokens']]
      of_tokens.append(np.zeros((len(example.prompt), len(columns)), np.float32))
      of_tokens.append(np.stack(columns, 1))
  extras = [[example.extras[name] for name in names['extras']] for _, _, example in rows]
  total = int(lengths.sum(dtype=np.int64))
  return Arrays(
    tokens=np.concatenate(tokens).astype(np.int32),
    scored=np.concatenate(scored).astype(bool),
    lengths=lengths,
    prompts=np.array([prompt for _, prompt, _ in rows], np.uint64),
    extras=np.array(extras, np.float32).reshape(len(rows), len(names['extras'])),
    of_candidates=of_candidates,
    of_tokens=np.concatenate(of_tokens).astype(np.float32)
    if names['of_tokens']
    else np.zeros((total, 0), np.float32),
    origins=np.array([origin.encode() for origin, _, _ in rows], np.bytes_),
    meta={**meta, **names},
  )


def group_of(extra: Any) -> int:
  """0: a number of the example, 1: an array over its candidates, 2: arrays over their tokens."""
  return 2 if isinstance(extra, tuple) else int(isinstance(extra, np.ndarray) and extra.ndim == 1)


def concatenate(parts: Sequence[Arrays], meta: Mapping[str, Any]) -> Arrays:
  """Several caches laid end to end; they have extras of the same names."""
  width = max(part.lengths.shape[1] for part in parts)

  def widened(array: np.ndarray, missing: int) -> np.ndarray:
    return np.pad(array, [(0, 0), (0, missing), (0, 0)][: array.ndim])

  joined = {name: [getattr(part, name) for part in parts] for name in _NAMES}
  missing = [width - part.lengths.shape[1] for part in parts]
  for name in ('lengths', 'of_candidates'):
    joined[name] = [widened(a, m) for a, m in zip(joined[name], missing, strict=True)]
  names = {group: parts[0].meta[group] for group in EXTRAS}
  arrays = {name: np.concatenate(found) for name, found in joined.items()}
  return Arrays(**arrays, meta={**meta, **names})


def read(folder: pathlib.Path) -> Arrays | None:
  """The cache in `folder`, memory-mapped, or None where there is none that is whole."""
  try:
    meta = json.loads((folder / 'meta.json').read_bytes())
    arrays = {}
    for name in _NAMES:
      info = meta['arrays'][name]
      if _checksum(folder / f'{name}.bin') != info['crc32']:
        return None
      arrays[name] = _map(folder / f'{name}.bin', np.dtype(info['dtype']), tuple(info['shape']))
    return Arrays(**arrays, meta=meta['meta'])
  except (OSError, ValueError, KeyError, TypeError):
    return None


def write(folder: pathlib.Path, arrays: Arrays) -> Arrays:
  """Puts a cache in place, unless a whole one is there by now; returns it, memory-mapped."""
  with naming(folder):
    return _put(folder, arrays)


def _put(folder: pathlib.Path, arrays: Arrays) -> Arrays:
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix='.building-', dir=folder.parent))
  try:
    meta: dict[str, Any] = {'meta': dict(arrays.meta), 'arrays': {}}
    for name in _NAMES:
      array = np.ascontiguousarray(getattr(arrays, name))
      data = array.tobytes()
      _write_file(temporary / f'{name}.bin', data)
      info = {'dtype': array.dtype.str, 'shape': array.shape, 'crc32': zlib.crc32(data)}
      meta['arrays'][name] = info
    _write_file(temporary / 'meta.json', json.dumps(meta, indent=1).encode())
    _sync_folder(temporary)
    while True:
      if (there := read(folder)) is not None:
        return there  # another process was first, or we were
      _discard(folder)
      try:
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
      except OSError:
        if not folder.exists():  # not a race, a real failure such as a full disk
          raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _discard(folder: pathlib.Path) -> None:
  """Moves a broken cache aside in one step, then deletes it."""
  if folder.exists():
    grave = pathlib.Path(tempfile.mkdtemp(prefix='.broken-', dir=folder.parent))
    try:
      os.rename(folder, grave / 'cache')
    except FileNotFoundError:
      pass  # another process did the same
    shutil.rmtree(grave, ignore_errors=True)


def _map(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
  if 0 in shape or dtype.itemsize == 0:  # an empty file cannot be mapped
    return np.zeros(shape, dtype)
  return np.memmap(path, dtype=dtype, mode='r', shape=shape)


def _checksum(path: pathlib.Path) -> int:
  total = 0
  with open(path, 'rb') as file:
    while block := file.read(1 << 20):
      total = zlib.crc32(block, total)
  return total


def _write_file(path: pathlib.Path, data: bytes) -> None:
  with open(path, 'wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: pathlib.Path) -> None:
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
