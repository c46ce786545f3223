"""Loading: a source, or a mixture of them, read, tokenised and cached as a data set."""

import collections
import functools
import json
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from rich import console as rich_console
from rich import markup, progress

from jaxpref.data import cache, conversations, examples, mixture, records, sources
from jaxpref.data import columns as renames
from jaxpref.data.dataset import Dataset, from_arrays, hash64
from jaxpref.data.examples import Example
from jaxpref.data.files import DataError
from jaxpref.data.tokenizer import Tokenizer

# What a data set may be loaded as -> the kinds of records that serve. SFT on preferences learns
# from the best completion, on labelled completions from all; pairs of a list are its two ends, and
# the two completions of a pair, unless it is a tie, are a desirable and an undesirable one.
_SERVES = {
  'preference': ('preference', 'comparison', 'ranked'),
  'ranked': ('preference', 'comparison', 'ranked'),
  'stepwise': ('stepwise',),
  'unpaired': ('unpaired', 'unpaired messages', 'preference', 'comparison', 'ranked'),
  'sft': ('preference', 'comparison', 'ranked', 'completion', 'messages', 'text'),
  'prompt': ('prompt', 'preference', 'messages'),
}
_LOADED_AS = {
  **{kind: kind for kind in ('preference', 'ranked', 'stepwise', 'unpaired', 'prompt')},
  **{'comparison': 'preference', 'unpaired messages': 'unpaired'},
  **dict.fromkeys(('completion', 'messages', 'text'), 'sft'),
}
_LOG = logging.getLogger(__name__)
_THREADS = 8  # that tokenise, at most
_AHEAD = 256  # records that are read before the first of them is wanted
_Made = tuple[list[tuple[str, int, Example]], Counter[str]]  # (origin, prompt, example), counts
_LISTED = 100  # bad lines that the report lists; it counts them all


def load(
  source: str,
  tokenizer: Tokenizer,
  *,
  kind: str = 'auto',
  columns: Mapping[str, str] | str | None = None,
  max_length: int = 1024,
  truncate: str = 'prompt_left',
  on_error: str = 'raise',
  cache_dir: str | pathlib.Path | None = None,
  seed: int = 0,
) -> Dataset:
  """Reads `source` (see `sources`, `mixture`) into token ids, from the cache where it is known.

  `kind`: one of `Dataset.kind`, or 'auto' (from the first record of each source). `columns`: see
  `columns`, as a mapping or in text. `max_length` bounds prompt + longest candidate in tokens, kept
  by `truncate`: 'prompt_left', 'end' or 'drop'. `on_error`: 'raise' a DataError at the first bad
  record, or 'skip' (the report counts and lists them). `cache_dir`: default `$JAXPREF_CACHE` or
  ~/.cache/jaxpref. `seed` chooses what a mixture takes.
  """
  _check_option('kind', kind, ('auto', *_SERVES))
  _check_option('truncate', truncate, examples.TRUNCATE)
  _check_option('on_error', on_error, ('raise', 'skip'))
  if max_length < 2:
    raise ValueError(f'max_length should be at least 2 (prompt and completion), got {max_length}')
  options = {
    'kind': kind,
    'columns': renames.check(columns),
    'max_length': max_length,
    'truncate': truncate,
    'on_error': on_error,
  }
  root = pathlib.Path(cache_dir or cache.default_folder()).expanduser()
  terms = mixture.parse(str(source))
  parts = [_load_one(term.source, tokenizer, root, options) for term in terms]
  if len(parts) == 1:
    return parts[0]
  mixture.check_alike(terms, [(part.kind, part.extras) for part in parts])
  key = cache.key_of({'parts': [part.fingerprint for part in parts]})
  arrays = cache.read(root / key)
  if arrays is None:
    meta = {'kind': parts[0].kind, 'report': _joined([part.report for part in parts])}
    arrays = cache.write(root / key, cache.concatenate([part.arrays for part in parts], meta))
  chosen = mixture.choose([len(part) for part in parts], terms, seed)
  starts = np.cumsum([0, *(len(part) for part in parts)])
  for term, indices in zip(terms, chosen, strict=True):
    _LOG.info('%s: %d examples of %s in a pass', source, len(indices), term.source)
  at = np.concatenate([start + one for start, one in zip(starts[:-1], chosen, strict=True)])
  return from_arrays(arrays, key).select(at)


def _load_one(
  source: str, tokenizer: Tokenizer, root: pathlib.Path, options: dict[str, Any]
) -> Dataset:
  opened = sources.open_source(source)
  key = cache.key_of(
    {'source': opened.content, 'tokenizer': tokenizer.fingerprint, 'options': options}
  )
  folder = root / key
  arrays = cache.read(folder)
  if arrays is None:
    arrays = cache.write(folder, _tokenise(opened, tokenizer, **options))
  data = from_arrays(arrays, key)
  counts = ', '.join(f'{k} {v}' for k, v in data.report.items() if v and k != 'skipped_lines')
  _LOG.info('%s: %s (kind %s, cache %s)', source, counts, data.kind, folder)
  for line in data.report['skipped_lines']:
    _LOG.warning('skipped %s', line)
  return data


def _tokenise(
  source: sources.Source, tokenizer: Tokenizer, kind, columns, max_length, truncate, on_error
) -> cache.Arrays:
  bad: list[str] | None = [] if on_error == 'skip' else None
  report: Counter[str] = Counter()
  rows: list[tuple[str, int, Example]] = []
  record_kind = names = None
  among = _SERVES.get(kind, tuple(records.KINDS))

  def read(origin: str, value: Any) -> list[records.Record]:
    nonlocal record_kind, names
    value = conversations.canonical(origin, renames.rename(origin, value, columns))
    record_kind = record_kind or records.infer_kind(origin, value, among)
    found = _as_kind(records.read_record(origin, value, record_kind), kind)
    report['dropped_ties'] += not found
    names = sorted(found[0].extras) if names is None and found else names
    for record in found:
      if sorted(record.extras) != names:
        raise DataError(
          f'{origin}: it has the numbers {sorted(record.extras)}, others have {names}'
        )
    return found

  def make(origin: str, found: list[records.Record]) -> _Made:
    """In a thread; the tokenizer's work is outside Python's lock."""
    counts: Counter[str] = Counter()
    try:
      made = [(_prompt_hash(r), examples.make_example(r, tokenizer, counts)) for r in found]
    except (ValueError, RecursionError) as error:
      raise DataError(f'{origin}: {error}') from error
    cut = functools.partial(
      examples.truncate, max_length=max_length, how=truncate, bos_id=tokenizer.bos_id, report=counts
    )
    shorter = [(origin, prompt, cut(example)) for prompt, example in made]
    return [(o, p, e) for o, p, e in shorter if e is not None], counts

  with futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
    for task in _in_order(pool, _steps(source, bad, report, read), make):
      try:
        made, counts = task()
      except DataError as error:
        if bad is None:
          raise
        bad.append(str(error))
      else:
        rows += made
        report.update(counts)
  report['examples'] = len(rows)
  report['skipped'] = len(bad or ())
  summary = {**report, 'record_kind': record_kind, 'skipped_lines': (bad or [])[:_LISTED]}
  if not report['records'] and not bad:
    raise DataError(f'{source.name} is empty: it holds no record')
  if not rows:
    first = ''.join(f'\n  {line}' for line in (bad or [])[:3])
    raise DataError(f'{source.name}: no usable example among the records; {dict(report)}{first}')
  loaded_as = kind if kind != 'auto' else _LOADED_AS[record_kind or '']
  return cache.collect(rows, {'kind': loaded_as, 'report': summary})


def _steps(
  source: sources.Source, bad: list[str] | None, report: Counter[str], read: Callable
) -> Iterator[tuple[str, list[records.Record]] | DataError]:
  """Each record as `read` understands it, or what is wrong with it, in the source's order."""
  console = rich_console.Console(stderr=True)
  noted: list[str] | None = None if bad is None else []
  tracked = progress.track(
    source.records(noted),
    description=markup.escape(f'tokenising {source.name}'),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  )
  found = iter(tracked)
  while True:
    try:
      item = next(found, None)
    except DataError as error:  # the source ends with it, but what came before is looked at first
      if bad is not None:
        raise
      yield error
      return
    yield from map(DataError, noted or ())
    if noted:
      noted.clear()
    if item is None:
      return
    report['records'] += 1
    try:
      yield item[0], read(*item)
    except DataError as error:
      yield error


def _in_order(
  pool: futures.Executor, steps: Iterable, make: Callable
) -> Iterator[Callable[[], _Made]]:
  """What gives, when called, the result of `make` on each step, some of them ahead."""
  waiting: collections.deque[Callable[[], _Made]] = collections.deque()
  for step in steps:
    if isinstance(step, DataError):
      waiting.append(functools.partial(_raise, step))
    else:
      waiting.append(pool.submit(make, *step).result)
    if len(waiting) > _AHEAD:
      yield waiting.popleft()
  yield from waiting


def _raise(error: Exception) -> _Made:
  raise error


def _as_kind(record: records.Record, kind: str) -> list[records.Record]:
  if kind == 'unpaired':
    return records.labelled(record)
  if kind == 'prompt':
    return [record._replace(completions=(), extras={})]
  if kind == 'sft':
    weight = {k: v for k, v in record.extras.items() if k == 'weight'}
    return [record._replace(completions=record.completions[:1], extras=weight)]
  return [records.ends(record) if kind == 'preference' else record]


def _joined(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Counts summed, lists laid end to end, kinds listed."""
  whole: dict[str, Any] = {'skipped_lines': []}
  for report in reports:
    for name, value in report.items():
      if isinstance(value, str):
        seen = whole.setdefault(name, value)
        whole[name] = seen if value in seen.split(', ') else f'{seen}, {value}'
      else:
        whole[name] = whole[name] + value if name in whole else value
  return whole


def _prompt_hash(record: records.Record) -> int:
  content = record.prompt or record.completions[0]
  return hash64(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _check_option(name: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    raise ValueError(f'{name} should be one of {", ".join(known)}; got {value!r}')
