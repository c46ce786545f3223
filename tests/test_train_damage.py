"""Damaged, half-written and failing checkpoints are named, and a sound one before them is used."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxpref.train.checkpoint import Checkpoints
from tests.states import assert_equal, make_state


def test_a_damaged_reference_is_named(copied_run):
  (copied_run / 'reference' / 'manifest.ocdbt').write_bytes(b'')
  checkpoints = Checkpoints(copied_run)
  with pytest.raises(
    OSError, match=r'reference cannot be read .*ocdbt has 0 bytes instead of .*remove it'
  ):
    checkpoints.restore_reference()
  checkpoints.close()


def damage(path, how):
  data = bytearray(path.read_bytes())
  path.unlink()
  if how == 'truncate':
    path.write_bytes(data[: len(data) // 2])
  elif how == 'flip a bit':
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize('how', ['delete', 'truncate'])
@pytest.mark.parametrize(
  'what', ['state/manifest.ocdbt', 'state/d', 'state/_METADATA', 'meta/metadata']
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
  copied_run, caplog, what, how
):
  newest = copied_run / 'checkpoints' / '2'
  files = [newest / what] if (newest / what).is_file() else list((newest / what).iterdir())
  for file in files:
    damage(file, how)
  checkpoints = Checkpoints(copied_run)
  state, meta = checkpoints.restore(make_state())
  assert_equal(state, make_state(1))
  assert meta['step'] == 1
  assert f'{newest} is damaged' in caplog.text
  # Its name is free, for the run will reach this step again.
  assert checkpoints.steps() == [1]
  assert (copied_run / 'checkpoints' / '2.corrupt').is_dir()
  assert checkpoints.save(2, make_state(2))
  assert_equal(checkpoints.restore(make_state())[0], make_state(2))
  checkpoints.close()


@pytest.mark.parametrize('how', ['delete', 'truncate'])
def test_damage_to_any_file_is_harmless_or_found(saved_run, tmp_path, how):
  damage_each(saved_run, tmp_path, how)


def damage_each(saved, folder, how):
  """Each file of a checkpoint damaged in a copy: the state is right, or that of the one before."""
  files = [p.relative_to(saved) for p in (saved / 'checkpoints' / '2').rglob('*') if p.is_file()]
  for number, file in enumerate(sorted(files)):
    run = shutil.copytree(saved, folder / str(number))
    damage(run / file, how)
    checkpoints = Checkpoints(run)
    state, meta = checkpoints.restore(make_state())
    assert_equal(state, make_state(meta['step']))
    checkpoints.close()


def flip_reference(saved, folder):
  """Each file of a reference's data with a bit flipped: right, or refused by name."""
  refused = 0
  for number, file in enumerate((saved / 'reference').glob('**/d/*')):
    run = shutil.copytree(saved, folder / f'reference-{number}')
    damage(run / file.relative_to(saved), 'flip a bit')
    try:
      assert_equal(Checkpoints(run, read_only=True).restore_reference(), make_state(7).params)
    except OSError as error:
      refused += 'reference cannot be read' in str(error)
  assert refused


def test_flipped_bits_are_harmless_or_found(saved_run, tmp_path):
  """In a process of its own: after a failed read Orbax may raise in threads, at any later time."""
  code = (
    'import pathlib, tests.test_train_damage as t;'
    f'saved, folder = pathlib.Path({str(saved_run)!r}), pathlib.Path({str(tmp_path)!r});'
    't.damage_each(saved, folder, "flip a bit"); t.flip_reference(saved, folder); print("sound")'
  )
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert found.stdout.endswith('sound\n'), found.stderr


def test_without_any_sound_checkpoint_the_run_does_not_start_over(copied_run, tmp_path):
  for step in (1, 2):
    (copied_run / 'checkpoints' / str(step) / 'meta' / 'metadata').unlink()
  checkpoints = Checkpoints(copied_run)
  with pytest.raises(OSError, match=r'no readable checkpoint: .*checkpoints/2 .*checkpoints/1 '):
    checkpoints.restore(make_state())
  assert checkpoints.steps() == [1, 2]
  checkpoints.close()
  empty = Checkpoints(tmp_path / 'empty')
  assert empty.latest_step() is None
  with pytest.raises(FileNotFoundError, match='no checkpoint in'):
    empty.restore(make_state())
  with pytest.raises(FileNotFoundError, match=r'no checkpoint of step 4 in .*have \[\]'):
    empty.restore(make_state(), step=4)
  empty.close()


def test_a_sound_checkpoint_is_not_called_damaged(copied_run, monkeypatch, caplog):
  """Its numbers were read, and what was asked for cannot be computed with: it stays in place."""

  def refuse(tree):
    raise ValueError('Received incompatible devices for jitted computation')

  monkeypatch.setattr('jaxpref.train.checkpoint.checksums', refuse)
  checkpoints = Checkpoints(copied_run)
  reads = (lambda: checkpoints.restore(make_state()), checkpoints.restore_params)
  for read in (*reads, checkpoints.restore_reference):
    with pytest.raises(ValueError, match='cannot be computed with: Received incompatible devices'):
      read()
  assert checkpoints.steps() == [1, 2] and 'damaged' not in caplog.text
  checkpoints.close()


def test_a_half_written_checkpoint_is_never_picked_up(copied_run):
  half = copied_run / 'checkpoints' / '3.orbax-checkpoint-tmp'
  shutil.copytree(copied_run / 'checkpoints' / '2' / 'state', half / 'state')
  watcher = Checkpoints(copied_run, read_only=True)
  assert watcher.latest_step() == 2
  assert half.exists()
  watcher.close()
  checkpoints = Checkpoints(copied_run)
  assert checkpoints.latest_step() == 2
  assert checkpoints.save(3, make_state(3))
  checkpoints.close()
  assert not half.exists()


def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path):
  program = """if True:
    import os, sys
    import jax.numpy as jnp
    from jaxpref.train.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {'params': {'w': jnp.full((2000, 2000), 1.0)}})
    checkpoints.save(2, {'params': {'w': jnp.arange(16e6)}})
    os._exit(9)
  """
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], check=False)
  assert run.returncode == 9
  checkpoints = Checkpoints(tmp_path)
  step = checkpoints.latest_step()
  assert step in (1, 2)
  w = checkpoints.restore_params()['w']
  np.testing.assert_array_equal(w, np.full((2000, 2000), 1.0) if step == 1 else np.arange(16e6))
  checkpoints.close()


def test_a_write_that_fails_is_raised_and_leaves_the_one_before(copied_run, monkeypatch):
  checkpoints = Checkpoints(copied_run)

  def full(folder):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr('jaxpref.train.handler._sizes', full)
    checkpoints.save(3, make_state(3))
    with pytest.raises(OSError, match='No space left'):
      checkpoints.wait()
  again = Checkpoints(copied_run)
  assert_equal(again.restore(make_state())[0], make_state(2))
  again.close()
