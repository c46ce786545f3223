"""Where a run's files are: a folder, or a prefix of an object store (`gs://bucket/run`).

Checkpoints go there by Orbax, everything else by the functions here. An object store has no
folders, renames nothing and appends to nothing, but it replaces an object at once and whole: what
has to appear together is written with the file last that readers look for, and a file that grows is
written anew now and then.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

STORES = ('gs://',)


def is_url(path: str | os.PathLike) -> bool:
  return '://' in os.fspath(path)


def open_url(url: str | os.PathLike) -> Any:
  """An etils.epath.Path."""
  import fsspec
  from etils import epath  # with what they need for clouds, slow to import

  # Other processes write there, and TensorStore does: a listing that is kept grows old.
  fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
  return epath.Path(url)


def open_path(path: str | os.PathLike) -> Any:
  """A whole path: pathlib's, or etils' of an object store.

  Raises:
    ValueError: a URL of another kind.
  """
  if not is_url(path):
    return pathlib.Path(path).expanduser().absolute()
  if not os.fspath(path).startswith(STORES):
    raise ValueError(f'{os.fspath(path)!r} is a URL; runs are kept in folders and at gs://')
  return open_url(path)


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
  """What fails to be written within raises OSError that names `path` and says what to do."""
  try:
    yield
  except Exception as error:
    number = error.errno if isinstance(error, OSError) else None
    if said := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's are ValueErrors
      number = int(said[1])
    if not (number or is_url(path) or isinstance(error, OSError)):
      raise
    reason = os.strerror(number) if number else ' '.join(f'{error}'.split())
    message = f'cannot write to {path}: {reason}; {_advice(path, number)}'
    raise type(OSError(number, ''))(message) from error


def check_writable(folder: Any) -> None:
  """Makes `folder`; raises OSError that names it where that or writing into it fails."""
  with naming(folder):
    if is_url(folder):
      probe = folder / f'.{secrets.token_hex(4)}'
      probe.write_text('')
      probe.unlink()
      return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(bytes(4096))  # a full disk still takes names


def remove_tree(folder: Any) -> None:
  """Removes a folder and all in it, on a disk or at gs://; nothing where there is none."""
  if folder.is_dir():
    folder.rmtree() if is_url(folder) else shutil.rmtree(folder)


def write_atomically(file: Any, content: str | bytes) -> None:
  """Readers see the old text or the new one, also when the process is killed half-way."""
  data = content.encode() if isinstance(content, str) else content
  with naming(file):
    if is_url(file):
      file.write_bytes(data)
      return
    half = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    try:
      with open(half, 'wb') as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
      os.replace(half, file)
    except OSError:
      half.unlink(missing_ok=True)
      raise


class Growing:
  """A text file that lines are added to, through several starts of a run.

  In a folder each line is there at once; an object is written anew, with all its lines, by `flush`:
  what a killed process had not flushed is gone.

  Args:
    path: as `open_path` gives it.
    keep: whether a line that is there stays. It raises ValueError for one that is none, such as a
      line half written, which is dropped too.
  """

  def __init__(self, path: Any, keep: Callable[[str], bool] = bool):
    self._path = path
    there = path.read_bytes().decode(errors='replace') if path.exists() else ''
    kept = ''.join(_kept(path, there, keep))
    if kept != there:
      write_atomically(path, kept)
    self._text, self._flushed = kept, True

  def write(self, text: str) -> None:
    if is_url(self._path):
      self._text, self._flushed = self._text + text, False
      return
    rest = text.encode()
    with naming(self._path), open(self._path, 'ab', buffering=0) as file:
      while rest:  # a disk that fills up may take a part
        rest = rest[file.write(rest) :]

  def flush(self) -> None:
    if not self._flushed:
      write_atomically(self._path, self._text)
      self._flushed = True


def before(name: str, stop: int) -> Callable[[str], bool]:
  """What `Growing` keeps of JSON lines: those whose value of `name` is below `stop`."""

  def keep(line: str) -> bool:
    values = json.loads(line)
    if not isinstance(values, dict) or name not in values:
      raise ValueError(f'no {name!r}')
    return values[name] < stop

  return keep


def _kept(path: Any, text: str, keep: Callable[[str], bool]) -> Iterator[str]:
  for number, line in enumerate(text.split('\n'), 1):
    try:
      if line and keep(line):
        yield line + '\n'
    except ValueError:
      logging.warning('%s:%d is not a whole line and is dropped: %.80r', path, number, line)


def _advice(path: Any, number: int | None) -> str:
  if number in (errno.ENOSPC, errno.EDQUOT):
    return 'make room there and run the same command: it goes on from the last checkpoint'
  if is_url(path):
    return (
      'that needs `pip install jaxpref[gcs]` and credentials that may create, read, list and '
      'delete objects'
    )
  return 'choose a folder that you may write to'
