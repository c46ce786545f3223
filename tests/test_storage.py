"""Files that grow, are replaced, and cannot be written."""

import json
import os
import pathlib

import pytest

from jaxpref.storage import Growing, before, check_writable, naming, open_path, write_atomically

FULL = pathlib.Path('/dev/full')


def lines(path):
  return [json.loads(line)['n'] for line in path.read_text().splitlines()]


def test_a_file_that_grows_forgets_what_a_killed_run_wrote_too_much(tmp_path, caplog):
  path = tmp_path / 'a.jsonl'
  for start, stop in ((0, 6), (4, 5), (4, 6)):
    growing = Growing(path, before('n', start))
    for n in range(start, stop):
      growing.write(json.dumps({'n': n, 'text': 'é '}, ensure_ascii=False) + '\n')
      assert lines(path)[-1] == n  # at once
  assert lines(path) == [*range(6)] and not caplog.text
  whole = path.read_bytes()
  for cut in range(1, 6):  # within the last line, and within é
    path.write_bytes(whole[:-cut])
    Growing(path, before('n', 9))
    assert lines(path) == ([*range(6)] if cut == 1 else [*range(5)])
  assert caplog.text.count('a.jsonl:6 is not a whole line and is dropped') == 4
  assert [file.name for file in tmp_path.iterdir()] == ['a.jsonl']


def test_what_cannot_be_replaced_stays(tmp_path, monkeypatch):
  file = tmp_path / 'a'
  write_atomically(file, 'old')

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match=rf'cannot write to {file}: No space left.*same command'):
    write_atomically(file, 'new')
  assert file.read_text() == 'old'
  assert [one.name for one in tmp_path.iterdir()] == ['a']


@pytest.mark.skipif(not FULL.exists(), reason='a device of Linux')
def test_a_line_on_a_full_disk_names_its_file():
  growing = Growing(pathlib.Path('/dev/null'))
  growing._path = FULL
  with pytest.raises(OSError, match=r'cannot write to /dev/full: No space left.*make room'):
    growing.write('line\n')


def test_errors_name_the_folder_and_what_would_work(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(NotADirectoryError, match=r'cannot write to .*file/run: .*choose a folder'):
    check_writable(tmp_path / 'file' / 'run')
  with pytest.raises(ValueError, match=r"'s3://bucket/run' is a URL; .* at gs://"):
    open_path('s3://bucket/run')
  with pytest.raises(ZeroDivisionError), naming(tmp_path):  # no error of writing
    raise ZeroDivisionError
