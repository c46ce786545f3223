"""The token cache: used when whole, rebuilt when not, safe when two processes build it at once."""

import json
import multiprocessing
import os

import numpy as np
import pytest

from jaxpref.data import cache, loading
from jaxpref.data.tokenizer import load_tokenizer

BYTE = load_tokenizer('byte')


def write_pairs(path, count=20, word='good'):
  lines = [{'prompt': f'Q{i}?', 'chosen': f' {word} {i}', 'rejected': ' bad'} for i in range(count)]
  path.write_text('\n'.join(map(json.dumps, lines)))
  return path


def load(path, folder, **options):
  return loading.load(f'jsonl:{path}', BYTE, cache_dir=folder, **options)


def same(a, b):
  return all(
    np.array_equal(x, y)
    for one, two in zip(a, b, strict=True)
    for x, y in zip(
      (one.prompt, *one.candidates, *one.scored),
      (two.prompt, *two.candidates, *two.scored),
      strict=True,
    )
  )


@pytest.fixture
def tokenised(monkeypatch):
  """Counts how often a source is tokenised."""
  calls = []
  tokenise = loading._tokenise
  monkeypatch.setattr(
    loading, '_tokenise', lambda *args, **kwargs: calls.append(1) or tokenise(*args, **kwargs)
  )
  return calls


def test_a_second_load_reads_the_cache(tmp_path, tokenised):
  path, folder = write_pairs(tmp_path / 'a.jsonl'), tmp_path / 'cache'
  first = load(path, folder)
  second = load(path, folder)
  assert len(tokenised) == 1
  assert same(first, second)
  assert first.report == second.report and first.fingerprint == second.fingerprint
  assert second.origin(3) == f'{path}:4'
  assert isinstance(second.arrays.tokens, np.memmap)


def test_what_decides_the_tokens_decides_the_cache(tmp_path, tokenised):
  path, folder = write_pairs(tmp_path / 'a.jsonl'), tmp_path / 'cache'
  seen = {load(path, folder).fingerprint}
  seen.add(load(path, folder, max_length=12).fingerprint)
  seen.add(load(path, folder, max_length=12, truncate='end').fingerprint)
  seen.add(load(path, folder, kind='sft').fingerprint)
  write_pairs(path, word='fine')
  seen.add(load(path, folder).fingerprint)
  assert len(seen) == len(tokenised) == 5


def damage_tokens(folder):
  path = folder / 'tokens.bin'
  data = bytearray(path.read_bytes())
  data[5] ^= 1
  path.write_bytes(data)


DAMAGES = {
  'one bit': damage_tokens,
  'truncated': lambda folder: os.truncate(folder / 'scored.bin', 3),
  'no meta': lambda folder: (folder / 'meta.json').unlink(),
  'broken meta': lambda folder: (folder / 'meta.json').write_text('{"meta": {'),
  'missing array': lambda folder: (folder / 'lengths.bin').unlink(),
  'empty folder': lambda folder: [p.unlink() for p in folder.iterdir()],
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_rebuilt(damage, tmp_path, tokenised):
  path, root = write_pairs(tmp_path / 'a.jsonl'), tmp_path / 'cache'
  before = [*load(path, root)]
  (folder,) = root.iterdir()
  damage(folder)
  assert same(before, load(path, root))
  assert len(tokenised) == 2
  assert same(before, load(path, root))
  assert len(tokenised) == 2
  assert [p.name for p in root.iterdir()] == [folder.name], 'nothing temporary is left'


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
  path, root = write_pairs(tmp_path / 'a.jsonl'), tmp_path / 'cache'

  def full_disk(path, data):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(cache, '_write_file', full_disk)
  with pytest.raises(OSError, match='No space left'):
    load(path, root)
  assert list(root.iterdir()) == []


def _build(path, folder, barrier, answers):
  barrier.wait()
  data = load(path, folder)
  answers.put((len(data), data.fingerprint, int(np.asarray(data.arrays.tokens).sum())))


@pytest.mark.parametrize('start', ['nothing', 'a broken cache'])
def test_two_processes_build_at_once(start, tmp_path):
  path, root = write_pairs(tmp_path / 'a.jsonl', count=300), tmp_path / 'cache'
  if start == 'a broken cache':
    load(path, root)
    (folder,) = root.iterdir()
    damage_tokens(folder)
  context = multiprocessing.get_context('spawn')
  barrier, answers = context.Barrier(2), context.Queue()
  processes = [
    context.Process(target=_build, args=(path, root, barrier, answers)) for _ in range(2)
  ]
  for process in processes:
    process.start()
  found = [answers.get(timeout=60) for _ in processes]
  for process in processes:
    process.join()
  assert [process.exitcode for process in processes] == [0, 0]
  assert found[0] == found[1]
  assert found[0][0] == 300
  assert len(list(root.iterdir())) == 1


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv('JAXPREF_CACHE', str(tmp_path))
  assert cache.default_folder() == tmp_path
  monkeypatch.delenv('JAXPREF_CACHE')
  assert cache.default_folder().parts[-2:] == ('.cache', 'jaxpref')
