"""Sources of records: files, TFDS data sets, Hugging Face data set folders, and parts of them.

  jsonl:PATH  json:  csv:  tsv:  parquet:  arrow:  text:    files; PATH may be a glob or a URL
  PATH                              the same, where the suffix says the format (.gz and .zst too)
  tfds:NAME/CONFIG:SPLIT            a prepared TFDS data set
  hf:FOLDER[:CONFIG][:SPLIT]        a Hugging Face data set folder, or ORG/NAME on the hub

Any of them may be followed by a part of its records, [:5%], [10:200] or [5%:10%], and then by
?NAME=VALUE&...: options (`names` and `delimiter` of CSV, `by` of text, `data_dir` of TFDS,
`revision` of hf) and columns (see `columns`), such as ?prompt=question&chosen=good. Mixtures of
sources are read by `dataset.load`.

`records()` of a source yields (origin, record), where origin is what an error message can point at
('pairs.jsonl:17', 'tfds:pairs/small:train[17]') and record is a dict; `content` is a hash of all
that it reads, for the token cache.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from jaxpref.data import columns, files, folders
from jaxpref.data.files import Bad, DataError, Record

FILE_OPTIONS = ('names', 'delimiter', 'by')
_QUERY = re.compile(r'\?(?=[a-z_]+=)')
_BOUND = r'(?:-?\d+|\d+(?:\.\d+)?%)?'
_PART = re.compile(rf'\[({_BOUND}):({_BOUND})\]$')


class Source(Protocol):
  @property
  def name(self) -> str:
    """The source as the user wrote it."""
    ...

  def records(self, bad: Bad = None) -> Iterator[tuple[str, Record]]:
    """Yields (origin, record). A bad line raises DataError or, given `bad`, is noted there."""
    ...

  @property
  def content(self) -> str:
    """Hash of what is read."""
    ...


def open_source(spec: str) -> Source:
  """Opens a source as the module's docstring has it; DataError where it cannot be."""
  text = str(spec)
  head, *query = _QUERY.split(text, maxsplit=1)
  given = dict(urllib.parse.parse_qsl(''.join(query), keep_blank_values=True))
  renames = {name: given.pop(name) for name in list(given) if name in columns.NAMES}
  scheme, part = head.partition(':')[0], None
  if scheme != 'tfds' and (part := _PART.search(head)):  # TFDS cuts its splits itself
    head = head[: part.start()]
  opener, rest, known = _opener(head)
  if unknown := sorted(set(given) - set(known)):
    near = difflib.get_close_matches(unknown[0], [*known, *columns.NAMES], 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise DataError(
      f'unknown option {unknown[0]!r} in {text!r}; known: {", ".join(known) or "none"}, and the '
      f'columns {", ".join(columns.NAMES)}{hint}'
    )
  source = opener(rest, given)
  if part:
    source = Part(text.partition('?')[0], source, part[1], part[2])
  if renames:
    source = Renamed(text, source, columns.check(renames))
  return source


def _opener(head: str) -> tuple[Callable[[str, Mapping[str, str]], Source], str, tuple[str, ...]]:
  """What opens a spec without part and options, what it is to open, and the options it knows."""
  scheme, colon, rest = head.partition(':')
  if colon and scheme == 'tfds':
    return _open_tfds, rest, ('data_dir',)
  if colon and scheme == 'hf':
    return _open_hf, rest, (*FILE_OPTIONS, 'revision')
  if colon and scheme in files.FORMATS:
    return lambda path, options: _open_files(head, scheme, path, options), rest, FILE_OPTIONS
  misspelt = colon and scheme.isalnum() and not files.is_url(head)
  if files.form_of(head) and (not misspelt or pathlib.Path(head).exists()):
    return lambda path, options: _open_files(head, '', path, options), head, FILE_OPTIONS
  near = difflib.get_close_matches(scheme, _SCHEMES, 1) if colon else []
  hint = f'; did you mean {near[0]!r}?' if near else ''
  hint = f'; it is a folder: hf:{head}?' if pathlib.Path(head).is_dir() else hint
  raise DataError(
    f'cannot tell what data source {head!r} is{hint} Expected one of '
    f'{", ".join(f"{name}:" for name in _SCHEMES)}, or a path ending in .jsonl, .json, .csv, .tsv, '
    '.parquet, .arrow or .txt, maybe with .gz or .zst'
  )


_SCHEMES = (*files.FORMATS, 'tfds', 'hf')


@dataclasses.dataclass(frozen=True)
class Part:
  """The records of a source from `start` up to `stop`: numbers, or per cent of all, rounded."""

  name: str
  source: Source
  start: str
  stop: str

  def records(self, bad: Bad = None) -> Iterator[tuple[str, Record]]:
    bounds = [self.start or '0', self.stop]
    total = 0
    if any('%' in bound or '-' in bound for bound in bounds):
      total = sum(1 for _ in self.source.records(None if bad is None else []))
    start, stop = (_position(bound, total) for bound in bounds)
    yield from itertools.islice(self.source.records(bad), start, stop)

  @property
  def content(self) -> str:
    return _hash(self.source.content, [self.start, self.stop])


def _position(bound: str, total: int) -> int | None:
  if not bound:
    return None
  if bound.endswith('%'):
    return min(total, round(total * float(bound[:-1]) / 100))
  return max(0, total + int(bound)) if bound.startswith('-') else int(bound)


@dataclasses.dataclass(frozen=True)
class Renamed:
  """A source whose records have their keys as jaxpref calls them (see `columns`)."""

  name: str
  source: Source
  columns: Mapping[str, str]

  def records(self, bad: Bad = None) -> Iterator[tuple[str, Record]]:
    for origin, record in self.source.records(bad):
      try:
        renamed = columns.rename(origin, record, self.columns)
      except DataError as error:
        files.note(bad, str(error))
      else:
        yield origin, renamed

  @property
  def content(self) -> str:
    return _hash(self.source.content, sorted(self.columns.items()))


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
  """A split of a TFDS data set prepared as ArrayRecord; tensorflow is not imported."""

  name: str
  builder: Any
  split: str

  def records(self, bad: Bad = None) -> Iterator[tuple[str, Record]]:
    del bad  # TFDS writes typed records: there are no bad lines
    data = self.builder.as_data_source(split=self.split)
    for index in range(len(data)):
      yield f'{self.name}[{index}]', files.plain(data[index])

  @property
  def content(self) -> str:
    paths = map(str, self.builder.info.splits[self.split].filepaths)
    return _hash(files.hash_files(paths), self.split)


def _open_files(name: str, scheme: str, path: str, options: Mapping[str, str]) -> files.Files:
  found = files.find(path)
  # JSON and JSON Lines are often called by one another's name; the suffix knows better.
  by_suffix = scheme in ('json', 'jsonl') and all(
    files.form_of(one) in ('json', 'jsonl') for one in found
  )
  return files.Files(name, found, '' if by_suffix else scheme, options)


def _open_hf(rest: str, options: Mapping[str, str]) -> files.Files:
  options = dict(options)
  found = folders.find(rest, options.pop('revision', None))
  return files.Files(f'hf:{rest}', found, '', options)


def _open_tfds(target: str, options: Mapping[str, str]) -> TfdsSplit:
  name, colon, split = target.partition(':')
  if not colon or not name or not split:
    raise DataError(f"expected 'tfds:NAME/CONFIG:SPLIT[?data_dir=DIR]', got 'tfds:{target}'")
  import tensorflow_datasets as tfds  # slow to import, and only this source needs it

  try:
    builder = tfds.builder(name, **options)
  except tfds.core.DatasetNotFoundError as error:
    raise DataError(
      f'TFDS knows no data set {name!r}: prepare it (file_format=array_record), give '
      '?data_dir=DIR, or import the module that registers its builder'
    ) from error
  where = f'{name!r} in {builder.data_path}'
  if not builder.is_prepared():
    raise DataError(f'TFDS data set {where} is not prepared; run its download_and_prepare first')
  form = builder.info.file_format
  if form is None or not form.file_suffix.startswith('array_record'):
    raise DataError(
      f'TFDS data set {where} is stored as {form}; expected array_record, which reads by index '
      "without tensorflow: prepare it again with file_format='array_record'"
    )
  base = split.partition('[')[0]
  if base not in builder.info.splits:
    raise DataError(
      f'TFDS data set {where} has no split {base!r}; it has {list(builder.info.splits)}'
    )
  return TfdsSplit(f'tfds:{target}', builder, split)


def _hash(content: str, said: Any) -> str:
  return hashlib.sha256(f'{content} {json.dumps(said)}'.encode()).hexdigest()
