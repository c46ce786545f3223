"""Lint finds what was planted, and says nothing about clean data."""

import io
import json

import numpy as np
import pytest
import vocabularies
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


def test_what_stands_in_both_splits_is_found():
  train = from_examples([example('a', 'x', 'y'), example('b', 'x', 'y'), example('c', 'x', 'y')])
  held_out = from_examples([example('b', 'x', 'y'), example('c', 'other', 'y')])
  findings = {f.name: f for f in lint.lint(train, BYTE, held_out)}
  assert findings['in both splits'].examples == (1,)
  assert findings['in both splits'].severity == 'error'
  assert findings['prompts in both splits'].examples == (1, 2)


def test_labels_ties_and_scores_are_counted():
  def message(name, *examples):
    return next(f for f in lint.lint(from_examples(examples), BYTE) if f.name == name)

  labelled = [example(f'{i}', 'x', label=1.0 if i < 3 else -1.0) for i in range(5)]
  assert message('labels', *labelled).message == '3 desirable, 2 undesirable'
  assert message('labels', *labelled).severity == 'note'
  assert message('labels', *labelled[:3]).severity == 'warning'
  judged = [example(f'{i}', 'x', 'y', preference=p) for i, p in enumerate((0.5, 0.75, 1.0))]
  assert message('ties', *judged).examples == (0,)
  assert message('soft labels', *judged).count == 1
  assert 'mean of all is 0.75' in message('soft labels', *judged).message
  scores = [np.array(s, np.float32) for s in ((2, 1), (1, 1))]
  listed = [example(f'{i}', 'x', 'y', scores=s) for i, s in enumerate(scores)]
  assert message('equal scores', *listed).examples == (1,)


def test_templates_that_do_not_fit_are_found(tmp_path):
  chat = vocabularies.merging(
    tmp_path,
    added=['<turn>', '<end>'],
    config={
      'chat_template': '{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}'
      '{% if add_generation_prompt %}<turn>{% endif %}'
    },
  )
  pair = {'chosen': 'yes', 'rejected': 'no'}
  names = {}
  for prompt in ('Hi', [{'role': 'user', 'content': 'Hi'}], '<|im_start|>user\nHi'):
    path = tmp_path / f'{len(names)}.jsonl'
    path.write_text(json.dumps({'prompt': prompt, **pair}))
    data = load(str(path), chat, cache_dir=tmp_path / 'cache')
    names[str(prompt)[:5]] = {f.name for f in lint.lint(data, chat)} - {'length bias'}
  assert list(names.values()) == [
    {'no chat template'},
    set(),
    {'no chat template', 'foreign template'},
  ]


def test_json_says_it_all():
  pairs = [example('a' * 40, 'x' * 9, 'y'), example('b', 'x', 'y'), example('b', 'x', 'y')]
  data = from_examples(pairs, origins=['p.jsonl:1', 'p.jsonl:2', 'p.jsonl:3'])
  said = json.loads(json.dumps(lint.to_json(lint.lint(data, BYTE), data)))
  assert said['examples'] == 3 and said['kind'] == 'preference'
  duplicates = next(f for f in said['findings'] if f['name'] == 'duplicates')
  assert duplicates['examples'] == ['p.jsonl:3'] and duplicates['severity'] == 'warning'
  # 41 + 10 + 2 tokens, and twice 2 + 2 + 2
  assert said['lengths']['total'] == 65
  assert said['lengths']['bins'] == [[0, 15, 2], [32, 63, 1]]
  # All of it fits one packed row of 64 but for 1 token; padded: six rows of 51.
  assert said['lengths']['packed'] == pytest.approx(65 / 128)
  assert said['lengths']['padded'] == pytest.approx(65 / (6 * 51))


def test_prompts_alone_are_linted_too(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"prompt": "Hi"}\n{"prompt": "Hi"}')
  data = load(str(tmp_path / 'a.jsonl'), BYTE, cache_dir=tmp_path / 'cache')
  findings = lint.lint(data, BYTE)
  assert {f.name for f in findings} == {'duplicates', 'repeated prompts'}
  lint.render(findings, data, Console(file=io.StringIO(), width=80))
