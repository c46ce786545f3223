"""Data sets: `load(...)` reads, tokenises and caches a source; `from_examples` stays in memory.

A `Dataset` is a fixed list of examples that knows all lengths at once, which is what packing needs.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich import console as rich_console
from rich import markup, progress

from jaxpref.data import cache, examples, records, sources
from jaxpref.data.examples import Example
from jaxpref.data.sources import DataError
from jaxpref.data.tokenizer import Tokenizer

# What a data set may be loaded as -> the kinds of records that serve. SFT on preference pairs
# learns from the chosen completion, on labelled completions from all.
_SERVES = {
  'preference': ('preference',),
  'unpaired': ('unpaired', 'unpaired messages'),
  'sft': ('preference', 'completion', 'messages', 'text'),
}
_LOG = logging.getLogger(__name__)
_LISTED = 100  # bad lines that the report lists; it counts them all


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Examples by index, stored flat (memory-mapped where they come from a cache).

  `kind` is 'preference' (K = 2), 'unpaired' (K = 1 and a label) or 'sft' (K = 1); `report` counts
  what reading and truncation did; `fingerprint` changes with any token, mask or extra.
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
    values = map(float, self.arrays.extras[row])
    return Example(
      prompt,
      tuple(candidates),
      tuple(np.split(scored, cuts)[1:]),
      dict(zip(self.arrays.meta['extras'], values, strict=True)),
    )

  def __iter__(self) -> Iterator[Example]:
    return (self[i] for i in range(len(self)))

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    ends = np.cumsum(self.arrays.lengths.sum(1, dtype=np.int64))
    return np.concatenate([[0], ends])

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """int32 [n, 1+K]: tokens of the prompt and of each candidate (0: no such candidate)."""
    return np.asarray(self.arrays.lengths)[self.indices]

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
    salt = np.uint64(_hash64(f'split {seed}'.encode()))
    held_out = _mix(self.arrays.prompts[self.indices] ^ salt) < fraction * 2.0**64
    return self.select(np.flatnonzero(~held_out)), self.select(np.flatnonzero(held_out))


def load(
  source: str,
  tokenizer: Tokenizer,
  *,
  kind: str = 'auto',
  columns: Mapping[str, str] | None = None,
  max_length: int = 1024,
  truncate: str = 'prompt_left',
  on_error: str = 'raise',
  cache_dir: str | pathlib.Path | None = None,
) -> Dataset:
  """Reads `source` (see `sources.open_source`) into token ids, from the cache where it is known.

  `kind`: 'preference', 'unpaired', 'sft', or 'auto' (from the first record). `columns`: see
  `records`. `max_length` bounds prompt + longest candidate in tokens, kept by `truncate`:
  'prompt_left', 'end' or 'drop'. `on_error`: 'raise' a DataError at the first bad record, or 'skip'
  (the report counts and lists them). `cache_dir`: default `$JAXPREF_CACHE` or ~/.cache/jaxpref.
  """
  _check_option('kind', kind, ('auto', *_SERVES))
  _check_option('truncate', truncate, examples.TRUNCATE)
  _check_option('on_error', on_error, ('raise', 'skip'))
  if max_length < 2:
    raise ValueError(f'max_length should be at least 2 (prompt and completion), got {max_length}')
  columns = records.check_columns(columns)
  opened = sources.open_source(source)
  options = {
    'kind': kind,
    'columns': columns,
    'max_length': max_length,
    'truncate': truncate,
    'on_error': on_error,
  }
  key = cache.key_of(
    {'source': opened.content, 'tokenizer': tokenizer.fingerprint, 'options': options}
  )
  folder = pathlib.Path(cache_dir or cache.default_folder()).expanduser() / key
  arrays = cache.read(folder)
  if arrays is None:
    arrays = cache.write(folder, _tokenise(opened, tokenizer, **options))
  data = _whole(arrays, key)
  counts = ', '.join(f'{k} {v}' for k, v in data.report.items() if v and k != 'skipped_lines')
  _LOG.info('%s: %s (kind %s, cache %s)', source, counts, data.kind, folder)
  for line in data.report['skipped_lines']:
    _LOG.warning('skipped %s', line)
  return data


def from_examples(
  items: Sequence[Example], *, kind: str | None = None, origins: Sequence[str] | None = None
) -> Dataset:
  """A data set in memory. Without `kind`, it follows from 'label' and the number of candidates."""
  if not items:
    raise ValueError('from_examples: expected at least one example')
  if kind is None:
    kind = 'preference' if len(items[0].candidates) > 1 else 'sft'
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
    digest.update(json.dumps(example.extras, sort_keys=True).encode())
    prompt = example.prompt if len(example.prompt) > 1 else example.candidates[0]
    origin = origins[number] if origins else f'example {number}'
    rows.append((origin, _hash64(np.asarray(prompt, np.int32).tobytes()), example))
  report = {'records': len(rows), 'examples': len(rows)}
  return _whole(cache.collect(rows, {'kind': kind, 'report': report}), digest.hexdigest())


def _whole(arrays: cache.Arrays, fingerprint: str) -> Dataset:
  return Dataset(
    arrays,
    np.arange(len(arrays.lengths)),
    arrays.meta['kind'],
    fingerprint,
    arrays.meta['report'],
  )


def _tokenise(
  source: sources.Source, tokenizer: Tokenizer, kind, columns, max_length, truncate, on_error
) -> cache.Arrays:
  bad: list[str] | None = [] if on_error == 'skip' else None
  report: Counter[str] = Counter()
  rows: list[tuple[str, int, Example]] = []
  record_kind = names = None
  among = _SERVES.get(kind, tuple(records.KINDS))
  console = rich_console.Console(stderr=True)
  for origin, value in progress.track(
    source.records(bad),
    description=markup.escape(f'tokenising {source.name}'),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  ):
    report['records'] += 1
    try:
      value = records.rename(origin, value, columns)
      record_kind = record_kind or records.infer_kind(origin, value, among)
      record = records.read_record(origin, value, record_kind)
      if kind == 'sft':
        record = record._replace(completions=record.completions[:1])
      names = sorted(record.extras) if names is None else names
      if sorted(record.extras) != names:
        raise DataError(
          f'{origin}: it has the numbers {sorted(record.extras)}, others have {names}'
        )
      try:
        example = examples.make_example(record, tokenizer, report)
      except ValueError as error:
        raise DataError(f'{origin}: {error}') from error
    except DataError as error:
      if bad is None:
        raise
      bad.append(str(error))
      continue
    shorter = examples.truncate(example, max_length, truncate, tokenizer.bos_id, report)
    if shorter is not None:
      rows.append((origin, _prompt_hash(record), shorter))
  report['examples'] = len(rows)
  report['skipped'] = len(bad or ())
  summary = {**report, 'skipped_lines': (bad or [])[:_LISTED]}
  if not rows:
    first = ''.join(f'\n  {line}' for line in (bad or [])[:3])
    raise DataError(f'{source.name}: no usable example among the records; {dict(report)}{first}')
  loaded_as = kind if kind != 'auto' else _dataset_kind(record_kind)
  return cache.collect(rows, {'kind': loaded_as, 'report': summary})


def _dataset_kind(record_kind: str | None) -> str:
  return next(kind for kind, serves in _SERVES.items() if record_kind in serves)


def _prompt_hash(record: records.Record) -> int:
  content = record.prompt or record.completions[0]
  return _hash64(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _hash64(data: bytes) -> int:
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little')


def _mix(x: np.ndarray) -> np.ndarray:
  """splitmix64's finaliser: every input bit reaches every output bit (https://prng.di.unimi.it)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _check_option(name: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    raise ValueError(f'{name} should be one of {", ".join(known)}; got {value!r}')


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
