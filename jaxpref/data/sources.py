"""Sources of records: JSON Lines files and TFDS data sets.

`open_source('jsonl:data/*.jsonl.gz')` or `open_source('tfds:name/config:split')` gives a source:
`records()` yields (origin, record), where origin is what an error message can point at
('pairs.jsonl:17', 'tfds:pairs/small:train[17]') and record is a dict; `content` is a hash of all
that it reads, for the token cache.
"""

import dataclasses
import difflib
import glob
import gzip
import hashlib
import json
import pathlib
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

Record = dict[str, Any]


class DataError(ValueError):
  """Something is wrong in the data; the message says where, what was expected and what came."""


class Source(Protocol):
  @property
  def name(self) -> str:
    """The source as the user wrote it."""
    ...

  def records(self, bad: list[str] | None = None) -> Iterator[tuple[str, Record]]:
    """Yields (origin, record). A bad line raises DataError or, given `bad`, is noted there."""
    ...

  @property
  def content(self) -> str:
    """Hash of what is read."""
    ...


def open_source(spec: str) -> Source:
  """Opens 'jsonl:PATH-OR-GLOB', 'tfds:NAME/CONFIG:SPLIT[?data_dir=DIR]' or a bare path.

  A bare path must end in .jsonl or .json (one array of records), either with .gz.
  """
  scheme, colon, rest = str(spec).partition(':')
  if colon and scheme in _SCHEMES:
    return _SCHEMES[scheme](rest)
  misspelt = colon and scheme.isalnum() and not pathlib.Path(spec).exists()
  if str(spec).endswith(_SUFFIXES) and not misspelt:
    return _open_json(str(spec))
  near = difflib.get_close_matches(scheme, _SCHEMES, 1) if colon else []
  hint = f'; did you mean {near[0]!r}?' if near else ''
  raise DataError(
    f'cannot tell what data source {str(spec)!r} is{hint} Expected '
    "'jsonl:PATH-OR-GLOB', 'tfds:NAME/CONFIG:SPLIT' or a path ending in " + ', '.join(_SUFFIXES)
  )


@dataclasses.dataclass(frozen=True)
class JsonFiles:
  """Files of one JSON object a line, or (.json) of one array of objects; gzip by suffix .gz."""

  name: str
  paths: tuple[str, ...]

  def records(self, bad: list[str] | None = None) -> Iterator[tuple[str, Record]]:
    for path in self.paths:
      array = path.removesuffix('.gz').endswith('.json')
      for number, value in enumerate(_json_array(path) if array else _lines(path), 1):
        origin = f'{path}[{number - 1}]' if array else f'{path}:{number}'
        try:
          record = value if array else _parse_line(origin, value)
          if record is None:
            continue  # a blank line
          if not isinstance(record, dict):
            raise DataError(
              f'{origin}: expected a JSON object, got {type(record).__name__}: {_short(record)}'
            )
        except DataError as error:
          if bad is None:
            raise
          bad.append(str(error))
          continue
        yield origin, record

  @property
  def content(self) -> str:
    return _hash_files(self.paths)


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
  """A split of a TFDS data set prepared as ArrayRecord; tensorflow is not imported."""

  name: str
  builder: Any
  split: str

  def records(self, bad: list[str] | None = None) -> Iterator[tuple[str, Record]]:
    del bad  # TFDS writes typed records: there are no bad lines
    data = self.builder.as_data_source(split=self.split)
    for index in range(len(data)):
      yield f'{self.name}[{index}]', _plain(data[index])

  @property
  def content(self) -> str:
    files = self.builder.info.splits[self.split].filepaths
    return hashlib.sha256(f'{self.split} {_hash_files(files)}'.encode()).hexdigest()


def _open_json(pattern: str) -> JsonFiles:
  path = pathlib.Path(pattern).expanduser()
  if path.is_file():
    paths = [str(path)]
  elif glob.has_magic(pattern):
    paths = [p for p in sorted(glob.glob(str(path), recursive=True)) if pathlib.Path(p).is_file()]
    if not paths:
      raise DataError(f'no file matches {pattern!r} (in {pathlib.Path.cwd()})')
  else:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    hint = f'; did you mean {str(path.parent / near[0])!r}?' if near else ''
    raise DataError(f'no such file: {pattern!r} (in {pathlib.Path.cwd()}){hint}')
  return JsonFiles(f'jsonl:{pattern}', tuple(paths))


def _open_tfds(spec: str) -> TfdsSplit:
  target, _, query = spec.partition('?')
  name, colon, split = target.partition(':')
  if not colon or not name or not split:
    raise DataError(f"expected 'tfds:NAME/CONFIG:SPLIT[?data_dir=DIR]', got 'tfds:{spec}'")
  options = dict(urllib.parse.parse_qsl(query))
  if unknown := sorted(set(options) - {'data_dir'}):
    raise DataError(f"unknown option {unknown[0]!r} in 'tfds:{spec}'; known: 'data_dir'")
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


_SCHEMES: dict[str, Callable[[str], Source]] = {'jsonl': _open_json, 'tfds': _open_tfds}
_SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz')


def _lines(path: str) -> Iterator[bytes]:
  opened = gzip.open(path, 'rb') if path.endswith('.gz') else open(path, 'rb')
  number = 0
  with opened as file:
    try:
      for line in file:
        number += 1
        yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise DataError(f'{path}: broken gzip after line {number}: {error}') from error


def _json_array(path: str) -> list:
  try:
    value = json.loads(b''.join(_lines(path)))
  except ValueError as error:
    raise DataError(f'{path}: not JSON: {error}') from error
  if not isinstance(value, list):
    raise DataError(
      f'{path}: expected a JSON array of records, got {type(value).__name__}; '
      'one object per line belongs in a .jsonl file'
    )
  return value


def _parse_line(origin: str, line: bytes) -> Any:
  try:
    text = line.decode('utf-8-sig').strip()
    return json.loads(text) if text else None
  except UnicodeDecodeError as error:
    raise DataError(f'{origin}: not UTF-8 at byte {error.start}: {_short(line)}') from error
  except ValueError as error:
    raise DataError(f'{origin}: not JSON: {error}: {_short(line.decode())}') from error


def _plain(value: Any) -> Any:
  """TFDS values (bytes, numpy) -> the str, number, list and dict that JSON would give."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    value = {key: _plain(item) for key, item in value.items()}
    if isinstance(value.get('role'), list):  # TFDS keeps a list of messages as a dict of lists
      return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  return value


def _hash_files(paths) -> str:
  total = hashlib.sha256()
  for path in paths:
    with open(path, 'rb') as file:
      total.update(hashlib.file_digest(file, 'sha256').digest())
  return total.hexdigest()


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else repr(value)
  return text if len(text) <= 80 else text[:77] + '...'
