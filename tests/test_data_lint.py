"""Lint finds what was planted, and says nothing about clean data."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxpref.data import Example, from_examples, lint, load, load_tokenizer

BYTE = load_tokenizer('byte')
EOS = '<|eos|>'


def example(prompt, *candidates, **extras):
  arrays = tuple(np.array(BYTE.encode(c + EOS), np.int32) for c in candidates)
  return Example(
    np.array(BYTE.encode('<|bos|>' + prompt), np.int32),
    arrays,
    tuple(np.ones(len(a), bool) for a in arrays),
    extras,
  )


def found(*examples):
  findings = lint.lint(from_examples(examples), BYTE)
  return {f.name: f.examples for f in findings if f.name != 'length bias'}


def test_clean_data_has_no_findings():
  data = from_examples([example('a', 'x', 'y'), example('b', 'x', 'y')])
  assert lint.lint(data, BYTE) == []
  console = Console(file=io.StringIO(), width=80)
  lint.render([], data, console)
  printed = console.file.getvalue()
  assert printed.startswith('2 examples: nothing found\n')
  assert '0-15' in printed and 'of packed rows are tokens' in printed


def test_planted_troubles_are_found():
  good = example('q', 'x', 'y')
  assert found(good, example('r', 'x', 'x')) == {'identical pairs': (1,)}
  assert found(good, good) == {'duplicates': (1,), 'repeated prompts': (1,)}
  assert found(good, example('q', 'y', 'x')) == {
    'conflicting labels': (1,),
    'repeated prompts': (1,),
  }
  assert found(good, example('<|bos|>r', 'x', 'y')) == {'bos doubled': (1,)}
  assert found(good, example('r', ' ', 'y')) == {'empty completions': (1,)}
  cut = example('r', 'x', 'y')
  cut = cut._replace(candidates=(cut.candidates[0][:-1], cut.candidates[1]))
  assert found(good, cut._replace(scored=(cut.scored[0][:-1], cut.scored[1]))) == {'no end': (1,)}
  assert 'conflicting labels' in found(example('q', 'x', label=1.0), example('q', 'x', label=-1.0))


def test_length_bias_is_a_share_with_an_interval():
  def bias(longer, shorter):
    pairs = [example(f'{i}', 'xx', 'y') for i in range(longer)]
    pairs += [example(f'-{i}', 'x', 'yy') for i in range(shorter)]
    return lint.lint(from_examples(pairs), BYTE)[0]

  assert bias(5, 5).severity == 'note'
  assert '50.0% [23.7%, 76.3%]' in bias(5, 5).message
  assert 'no clear length bias' in bias(5, 5).message
  assert bias(30, 2).severity == 'warning' and 'follows length' in bias(30, 2).message
  assert bias(2, 30).severity == 'warning'


def test_wilson_interval():
  # 8 of 10: centre (0.8 + 1.9208/10) / 1.38416 = 0.7168; half-width 0.2266
  assert lint.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_what_reading_counted_is_reported(tmp_path):
  path = tmp_path / 'a.jsonl'
  pair = {'prompt': 'question', 'chosen': ' a', 'rejected': ' b'}
  path.write_text('\n'.join(['{', json.dumps(pair)]))
  data = load(str(path), BYTE, max_length=8, on_error='skip')
  findings = {f.name: f for f in lint.lint(data, BYTE)}
  assert findings['skipped'].count == 1
  assert findings['truncated prompts'].count == 1
  console = Console(file=io.StringIO(), width=120)
  lint.render(findings.values(), data, console)
  assert 'records skipped because of an error' in console.file.getvalue()
