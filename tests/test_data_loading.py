"""Tokenising in threads: order, counts and the first error are those of one record at a time."""

import json
import time

import jax
import numpy as np
import pytest

from jaxpref.data import load, load_tokenizer, loading
from jaxpref.data.files import DataError

BYTE = load_tokenizer('byte')
GOOD = {'prompt': 'what is it? ', 'completion': 'it is this'}
REFUSED = {'text': 'x'}


def write(path, lines):
  path.write_text('\n'.join(x if isinstance(x, str) else json.dumps(x) for x in lines) + '\n')
  return f'jsonl:{path}'


def test_threads_change_nothing(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  lines = [GOOD | {'completion': 'no ' * int(n)} for n in rng.integers(1, 40, 3 * loading._AHEAD)]
  source = write(tmp_path / 'a.jsonl', lines)
  many = load(source, BYTE, max_length=64, cache_dir=tmp_path / 'many')
  monkeypatch.setattr(loading, '_THREADS', 1)
  monkeypatch.setattr(loading, '_AHEAD', 0)
  one = load(source, BYTE, max_length=64, cache_dir=tmp_path / 'one')
  assert many.report == one.report and many.report['examples'] == len(lines)
  jax.tree.map(np.testing.assert_array_equal, list(map(many.__getitem__, range(len(many)))),
               list(map(one.__getitem__, range(len(one)))))  # fmt: skip
  # Bytes and an eos; a prompt keeps one token at least.
  assert [len(many[i].candidates[0]) for i in range(5)] == [
    min(len(line['completion']) + 1, 63) for line in lines[:5]
  ]


@pytest.mark.parametrize('worse', ['{broken', {'prompt': 3, 'completion': 'x'}])
def test_the_first_mistake_is_named_though_a_later_one_is_found_sooner(
  tmp_path, monkeypatch, worse
):
  make = loading.examples.make_example

  def refuse(record, *rest):
    if record.completions[0] == 'x':
      time.sleep(0.05)
      raise ValueError('nothing to score')
    return make(record, *rest)

  monkeypatch.setattr(loading.examples, 'make_example', refuse)
  good = {'text': 'some words'}
  source = write(tmp_path / 'a.jsonl', [good, REFUSED, good, worse])
  with pytest.raises(DataError, match=r'a\.jsonl:2.*nothing to score'):
    load(source, BYTE, cache_dir=tmp_path)
  skipped = load(source, BYTE, on_error='skip', cache_dir=tmp_path).report['skipped_lines']
  assert ['a.jsonl:2' in skipped[0], 'a.jsonl:4' in skipped[1], len(skipped)] == [True, True, 2]
