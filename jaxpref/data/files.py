"""Files of records: JSON Lines, JSON, CSV, TSV, Parquet, Arrow and plain text, local or by URL.

The suffix (before .gz or .zst) says the format, unless a scheme does. A URL such as
gs://bucket/pairs.jsonl is read through etils.epath. Every record comes with its origin:
'pairs.csv:17' where a file has lines, 'pairs.parquet[16]' where it has none.
"""

import contextlib
import csv
import dataclasses
import difflib
import glob
import gzip
import hashlib
import io
import itertools
import json
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from jaxpref.storage import is_url, open_url

Record = dict[str, Any]
Bad = list[str] | None  # collects what is wrong with bad lines; where None, they raise
MAX_LINE = 32 << 20  # bytes: a longer line is no record, and reading it might take all memory
_ROWS = 256  # of Parquet and Arrow in memory at a time


class DataError(ValueError):
  """Something is wrong in the data; the message says where, what was expected and what came."""


@dataclasses.dataclass(frozen=True)
class Files:
  """Files read one after the other; `form` is a key of `FORMATS`, '' for by suffix."""

  name: str
  paths: tuple[str, ...]
  form: str = ''
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def records(self, bad: Bad = None) -> Iterator[tuple[str, Record]]:
    for path in self.paths:
      for origin, record in FORMATS[self.form or form_of(path)](path, self.options, bad):
        if isinstance(record, dict):
          yield origin, record
        else:
          note(
            bad, f'{origin}: expected a JSON object, got {type(record).__name__}: {short(record)}'
          )

  @property
  def content(self) -> str:
    said = json.dumps([self.form, *sorted(self.options.items())])
    return hashlib.sha256(f'{said} {hash_files(self.paths)}'.encode()).hexdigest()


def form_of(path: str) -> str:
  """The format that a file's suffix stands for; '' where it says nothing."""
  end = path.removesuffix('.gz').removesuffix('.zst').rpartition('.')[2].lower()
  return _SUFFIXES.get(end, '')


def find(pattern: str) -> tuple[str, ...]:
  """The files that a path or glob stands for, sorted; DataError where there is none."""
  if is_url(pattern):
    return _find_url(pattern)
  path = pathlib.Path(pattern).expanduser()
  if path.is_file():
    return (str(path),)
  if path.is_dir():
    raise DataError(
      f"{pattern!r} is a folder; give its files, as '{pattern}/*.jsonl', or 'hf:{pattern}'"
    )
  if glob.has_magic(pattern):
    found = [p for p in sorted(glob.glob(str(path), recursive=True)) if pathlib.Path(p).is_file()]
    if not found:
      raise DataError(f'no file matches {pattern!r} (in {pathlib.Path.cwd()})')
    return tuple(found)
  names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
  near = difflib.get_close_matches(path.name, names, 1)
  hint = f'; did you mean {str(path.parent / near[0])!r}?' if near else ''
  raise DataError(f'no such file: {pattern!r} (in {pathlib.Path.cwd()}){hint}')


def _find_url(pattern: str) -> tuple[str, ...]:
  try:
    path = open_url(pattern)
    if not glob.has_magic(pattern):
      if path.is_dir():
        raise DataError(f"{pattern!r} is a folder; give its files, as '{pattern}/*.jsonl'")
      found = [path] if path.exists() else []
    else:
      parts = path.parts
      fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
      found = sorted(type(path)(*parts[:fixed]).glob('/'.join(parts[fixed:])))
  except (ImportError, OSError, RuntimeError) as error:
    raise _unreachable(pattern, error) from error
  if not found:
    raise DataError(f'no file matches {pattern!r}')
  return tuple(str(path) for path in found)


def _unreachable(url: str, error: Exception) -> DataError:
  return DataError(
    f'cannot read {url!r}: {type(error).__name__}: {short(str(error))}; gs:// needs '
    '`pip install gcsfs` (s3:// s3fs) and credentials that may read the bucket'
  )


def open_raw(path: str) -> BinaryIO:
  if not is_url(path):
    return open(path, 'rb')
  try:
    return open_url(path).open('rb')
  except (ImportError, OSError, RuntimeError) as error:
    raise _unreachable(path, error) from error


def hash_files(paths) -> str:
  """Of the files' bytes; of a remote file its address, size and time, to spare a download."""
  total = hashlib.sha256()
  for path in paths:
    if is_url(path):
      stat = open_url(path).stat()
      total.update(f'{path} {stat.length} {stat.mtime}'.encode())
    else:
      with open(path, 'rb') as file:
        total.update(hashlib.file_digest(file, 'sha256').digest())
  return total.hexdigest()


def note(bad: Bad, message: str) -> None:
  """Raises DataError, or adds the message to `bad`."""
  if bad is None:
    raise DataError(message)
  bad.append(message)


def short(value: Any) -> str:
  text = value if isinstance(value, str) else repr(value)
  return text if len(text) <= 80 else text[:77] + '...'


def plain(value: Any) -> Any:
  """Arrow and TFDS values (bytes, numpy) -> the str, number, list and dict that JSON would give."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    value = {key: plain(item) for key, item in value.items()}
    if isinstance(value.get('role'), list):  # TFDS keeps a list of messages as a dict of lists
      return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if hasattr(value, 'tolist'):
    return plain(value.tolist())
  return value


def _lines(path: str, bad: Bad, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
  """(number from 1, line) of a file that may be compressed; lines above `longest` bytes are bad."""
  longest = longest or MAX_LINE
  number = 0
  with open_raw(path) as raw:
    file = _decompressed(path, raw)
    try:
      while line := file.readline(longest + 1):
        number += 1
        if len(line) <= longest:
          yield number, line
          continue
        while line and not line.endswith(b'\n'):
          line = file.readline(longest)
        message = f'{path}:{number}: a line of more than {longest >> 20} MiB'
        note(bad, f'{message}; expected one record a line')
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise DataError(f'{path}: broken gzip after line {number}: {error}') from error
    except OSError as error:  # what pyarrow calls a broken frame
      raise DataError(f'{path}: cannot be read after line {number}: {error}') from error


def _decompressed(path: str, raw: BinaryIO) -> Any:
  if path.endswith('.gz'):
    return gzip.open(raw, 'rb')
  if path.endswith('.zst'):
    import pyarrow  # slow to import; it brings the codec

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, 'zstd'))
  return raw


def _text_lines(path: str, bad: Bad) -> Iterator[tuple[int, str]]:
  for number, line in _lines(path, bad):
    try:
      yield number, line.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      note(bad, f'{path}:{number}: not UTF-8 at byte {error.start}: {short(line[:80])}')


def _read_jsonl(path: str, options, bad: Bad) -> Iterator[tuple[str, Any]]:
  for number, line in _text_lines(path, bad):
    if text := line.strip():
      origin = f'{path}:{number}'
      try:
        value = json.loads(text)
      except (ValueError, RecursionError) as error:
        note(bad, f'{origin}: not JSON: {error}: {short(text)}')
      else:
        yield origin, value


def _read_json(path: str, options, bad: Bad) -> Iterator[tuple[str, Any]]:
  """An array of objects, or, where the file begins with an object, one object per line."""
  # A whole array may stand in one line of any length.
  lines = [line for _, line in _lines(path, bad, sys.maxsize - 1)]
  first = next((line.strip() for line in lines if line.strip()), b'')
  if first.removeprefix(b'\xef\xbb\xbf').startswith(b'{') and first.endswith(b'}'):
    del lines
    yield from _read_jsonl(path, options, bad)
    return
  try:
    value = json.loads(b''.join(lines).decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise DataError(f'{path}: not JSON: {error}') from error
  if not isinstance(value, list):
    raise DataError(
      f'{path}: expected a JSON array of records, or one a line, got {type(value).__name__} '
      f'{short(sorted(value) if isinstance(value, dict) else value)}'
    )
  for index, item in enumerate(value):
    yield f'{path}[{index}]', item


def _read_csv(path: str, options, bad: Bad) -> Iterator[tuple[str, Record]]:
  """Rows under a header, or under the option `names`. TSV knows no quotes, as IANA defines it."""
  tabs = form_of(path) == 'tsv'
  csv.field_size_limit(MAX_LINE)
  delimiter = options.get('delimiter', '\t' if tabs else ',')
  lines = (line.replace('\0', '\ufffd') for _, line in _text_lines(path, bad))
  if tabs:
    rows = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
  else:
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
  header = options['names'].split(',') if 'names' in options else None
  while True:
    number = rows.line_num + 1
    try:
      row = next(rows)
    except StopIteration:
      return
    except csv.Error as error:
      note(bad, f'{path}:{number}: not CSV: {error}')
      continue
    if not row:
      continue
    if header is None:
      header = row
    elif len(row) != len(header):
      note(bad, f'{path}:{number}: expected {len(header)} columns {header}, got {len(row)}')
    else:
      yield f'{path}:{number}', dict(zip(header, row, strict=True))


def _read_parquet(path: str, options, bad: Bad) -> Iterator[tuple[str, Record]]:
  import pyarrow.parquet

  with _arrow_errors(path, 'Parquet'), open_raw(path) as raw:
    yield from _rows(path, pyarrow.parquet.ParquetFile(raw).iter_batches(_ROWS))


def _read_arrow(path: str, options, bad: Bad) -> Iterator[tuple[str, Record]]:
  """Arrow's file format, or its stream format, which Hugging Face's datasets write."""
  import pyarrow.ipc

  with _arrow_errors(path, 'Arrow'), open_raw(path) as raw:
    magic = raw.read(6)
    raw.seek(0)
    if magic == b'ARROW1':
      reader = pyarrow.ipc.open_file(raw)
      yield from _rows(path, map(reader.get_batch, range(reader.num_record_batches)))
    else:
      yield from _rows(path, iter(pyarrow.ipc.open_stream(raw)))


def _rows(path: str, batches) -> Iterator[tuple[str, Record]]:
  count = itertools.count()
  for batch in batches:
    for start in range(0, batch.num_rows, _ROWS):
      for row in batch.slice(start, _ROWS).to_pylist():
        yield f'{path}[{next(count)}]', plain(row)


@contextlib.contextmanager
def _arrow_errors(path: str, form: str) -> Iterator[None]:
  import pyarrow

  try:
    yield
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise DataError(f'{path}: not {form}: {short(str(error))}') from error


def _read_text(path: str, options, bad: Bad) -> Iterator[tuple[str, Record]]:
  """{'text': ...}: a line each; `by=paragraph`: up to an empty line; `by=file`: all of it."""
  by = options.get('by', 'line')
  if by not in ('line', 'paragraph', 'file'):
    raise DataError(f"{path}: by should be 'line', 'paragraph' or 'file', got {by!r}")
  held: list[str] = []
  start = 1
  for number, line in itertools.chain(_text_lines(path, bad), [(0, '')]):
    ends = by == 'line' or (by == 'paragraph' and not line.strip()) or not number
    if line.strip() or (held and by == 'file'):
      start = start if held else number
      held.append(line)
    if ends and held:
      yield f'{path}:{start}', {'text': ''.join(held).rstrip('\r\n')}
      held = []


FORMATS: dict[str, Callable[[str, Mapping[str, str], Bad], Iterator[tuple[str, Any]]]] = {
  'jsonl': _read_jsonl,
  'json': _read_json,
  'csv': _read_csv,
  'tsv': _read_csv,
  'parquet': _read_parquet,
  'arrow': _read_arrow,
  'text': _read_text,
}
_SUFFIXES = {name: name for name in FORMATS if name != 'text'} | {'txt': 'text', 'ndjson': 'jsonl'}
