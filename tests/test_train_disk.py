"""A disk that is full, and one that cannot be written: errors name the path, nothing is lost."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import rich.console

from jaxpref.data import cache
from jaxpref.rollout.tables import Tables
from jaxpref.storage import write_atomically
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.reference import Store
from jaxpref.train.writers import JsonLines, TensorBoard
from tests.states import assert_equal, make_state


@pytest.fixture
def disk(tmp_path):
  """300 KB of its own, where the system lets us mount them."""
  done = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', tmp_path], capture_output=True, check=False
  )
  if done.returncode:
    pytest.skip(f'no disk of our own: {done.stderr.decode()}')
  yield tmp_path
  subprocess.run(['umount', '--lazy', tmp_path], check=True)


def fill(disk, leave=0):
  """Takes the room there is, but for `leave` bytes."""
  (disk / 'filler').write_bytes(bytes(shutil.disk_usage(disk).free - leave))


def lock(disk):
  subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)


def jsonlines(folder):
  writer = JsonLines(folder / 'metrics.jsonl', 9)
  return 'metrics.jsonl', lambda: writer.write(1, {'loss': 0.5, 'text': 1.0})


def samples(folder):
  tables = Tables(1, rich.console.Console(quiet=True))
  tables.open(folder, 0)
  return 'samples.jsonl', lambda: tables(0, ['p'], [['text']], np.zeros((1, 1)))


def store(folder):
  entry = {b'0' * 16: (np.zeros(3, np.float32),)}
  return 'reference', lambda: Store(folder / 'reference').write(entry)


def tokens(folder):
  arrays = cache.Arrays(**{name: np.zeros(9, np.int32) for name in cache._NAMES}, meta={})
  return 'tokens', lambda: cache.write(folder / 'tokens', arrays)


def small(folder):
  return 'config.json', lambda: write_atomically(folder / 'config.json', 'x' * 9)


@pytest.mark.parametrize('end', [fill, lock])
@pytest.mark.parametrize('what', [jsonlines, samples, store, tokens, small])
def test_what_cannot_be_written_is_named(disk, what, end):
  name, write = what(disk)
  there = {file for file in disk.rglob('*') if file.is_file()}
  end(disk)
  said = {fill: 'No space left on device; make room', lock: 'Read-only file system; choose'}[end]
  with pytest.raises(OSError, match=f'cannot write to {disk}/{name}.*: {said}'):
    write()
  left = {file for file in disk.rglob('*') if file.is_file()} - there - {disk / 'filler'}
  assert not [file for file in left if file.stat().st_size], 'half a file is left'


def test_events_on_a_full_disk_stop_the_run(disk):
  writer = TensorBoard(disk / 'tensorboard')
  fill(disk)
  with pytest.raises(OSError, match=f'cannot write to {disk}/tensorboard: No space left'):
    for step in range(1, 1000):  # what a buffer takes is not on the disk yet
      writer.write(step, {f'loss/{n}': 0.5 for n in range(99)})
  (disk / 'filler').unlink()
  writer.close()


def saves(disk):
  """In a process of its own: after a failed save Orbax may raise in threads, at any later time."""
  checkpoints = Checkpoints(disk / 'run')
  checkpoints.save(1, make_state(1))
  checkpoints.wait()
  errors = []
  for leave in (0, 4096, 12_000, 30_000):
    fill(disk, leave)
    try:
      again = Checkpoints(disk / 'run')
      again.save(2, make_state(2))
      again.close()
    except OSError as error:
      errors.append(str(error))
    (disk / 'filler').unlink()
    for half in (disk / 'run' / 'checkpoints').glob('2.*'):
      shutil.rmtree(half)
  for error in errors:
    assert f'cannot write to {disk}/run/checkpoints: No space left on device; make' in error, error
  assert len(errors) == 4
  last = Checkpoints(disk / 'run')
  assert last.steps() == [1]
  assert_equal(last.restore(make_state())[0], make_state(1))
  assert last.save(2, make_state(2))
  last.close()
  print('sound', flush=True)


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(disk):
  code = f'import pathlib, tests.test_train_disk as t; t.saves(pathlib.Path({str(disk)!r}))'
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert found.stdout.endswith('sound\n'), found.stderr[-3000:]
