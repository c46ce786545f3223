"""Mixtures: shares of a pass, without repeats, by the seed alone."""

import json

import numpy as np
import pytest

from jaxpref.data import DataError, load, load_tokenizer, mixture

BYTE = load_tokenizer('byte')


def write(path, count, **more):
  rows = [{'prompt': f'{path.stem}{i}', 'completion': f' {i}', **more} for i in range(count)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return f'jsonl:{path}'


def names(data):
  return [BYTE.decode(example.prompt[1:]) for example in data]


def test_text_form():
  assert mixture.parse('0.7*jsonl:a.jsonl + 0.3 * b+c.jsonl') == (
    mixture.Term(0.7, 'jsonl:a.jsonl'),
    mixture.Term(0.3, 'b+c.jsonl'),
  )
  assert mixture.parse('jsonl:2*x.jsonl') == (mixture.Term(None, 'jsonl:2*x.jsonl'),)
  with pytest.raises(DataError, match='give every source of a mixture a weight, or none'):
    mixture.parse('0.7*a.jsonl + b.jsonl')
  with pytest.raises(DataError, match="a weight should be a positive number, got '0'"):
    mixture.parse('0*a.jsonl + 1*b.jsonl')


@pytest.mark.parametrize('seed', range(3))
def test_shares_hold_and_nothing_repeats(seed):
  terms = mixture.parse('3*a.jsonl + 1*b.jsonl')
  chosen = mixture.choose([90, 100], terms, seed)
  assert [len(one) for one in chosen] == [90, 30]
  for size, one in zip((90, 100), chosen, strict=True):
    assert len(set(one.tolist())) == len(one) and one.max() < size
  again, other = mixture.choose([90, 100], terms, seed), mixture.choose([90, 100], terms, seed + 1)
  assert all(np.array_equal(a, b) for a, b in zip(chosen, again, strict=True))
  assert not np.array_equal(chosen[1], other[1])


def test_a_mixture_is_loaded_with_its_parts_columns_and_cuts(tmp_path):
  a, b = write(tmp_path / 'a.jsonl', 6), write(tmp_path / 'b.jsonl', 9)
  data = load(f'{a}[:4] + {b}?prompt={{prompt}}!', BYTE, cache_dir=tmp_path / 'cache')
  assert names(data) == [*(f'a{i}' for i in range(4)), *(f'b{i}!' for i in range(9))]
  assert data.report['records'] == 13 and data.report['record_kind'] == 'completion'
  assert data.lengths.tolist() == [[len(e.prompt), len(e.candidates[0])] for e in data]
  shares = load(f'0.5*{a} + 0.5*{b}', BYTE, cache_dir=tmp_path / 'cache', seed=3)
  assert sum(name.startswith('a') for name in names(shares)) == 6 == len(shares) - 6
  other = load(f'0.5*{a} + 0.5*{b}', BYTE, cache_dir=tmp_path / 'cache', seed=4)
  assert names(other) != names(shares) and other.fingerprint != shares.fingerprint


def test_parts_must_be_alike(tmp_path):
  a, b = write(tmp_path / 'a.jsonl', 3), write(tmp_path / 'b.jsonl', 3, label=True)
  with pytest.raises(DataError, match=r'a.jsonl.* is sft, .*b.jsonl.* is unpaired'):
    load(f'{a} + {b}', BYTE, cache_dir=tmp_path / 'cache')
  assert len(load(f'{a} + {b}', BYTE, kind='sft', cache_dir=tmp_path / 'cache')) == 6
  c = write(tmp_path / 'c.jsonl', 3, weight=2)
  with pytest.raises(DataError, match=r"c.jsonl' has 'weight', .*leave it out with .*\?weight="):
    load(f'{a} + {c}', BYTE, cache_dir=tmp_path / 'cache')
  assert load(f'{a} + {c}?weight=', BYTE, cache_dir=tmp_path / 'cache').extras == ()
