"""Conversion between formats, and back."""

import json

import pytest

from jaxpref.data import DataError, load, load_tokenizer
from jaxpref.data.convert import TARGETS, convert

BYTE = load_tokenizer('byte')


def write(path, *records):
  path.write_text('\n'.join(map(json.dumps, records)))
  return f'jsonl:{path}'


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content):
  return {'role': 'assistant', 'content': content}


PAIR = {'prompt': 'Q', 'chosen': ' a', 'rejected': ' b', 'weight': 2}
LIST = {'prompt': 'Q', 'completions': [' a', ' b', ' c'], 'scores': [1, 3, 2]}
LABELLED = [
  {'prompt': p, 'completion': c, 'label': label}
  for p, c, label in [
    ('Q', ' a', True),
    ('R', ' r', False),
    ('Q', ' b', False),
    ('Q', ' c', True),
    ('R', ' s', False),
    ('Q', ' d', False),
  ]
]
HH = {
  'chosen': '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hm\n\nAssistant: Ha!',
  'rejected': '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hm\n\nAssistant: He',
}


@pytest.mark.parametrize(
  ('records', 'target', 'expected'),
  [
    (
      [PAIR],
      'unpaired',
      [
        {'prompt': 'Q', 'completion': ' a', 'label': True, 'weight': 2},
        {'prompt': 'Q', 'completion': ' b', 'label': False, 'weight': 2},
      ],
    ),
    ([PAIR], 'completion', [{'prompt': 'Q', 'completion': ' a', 'weight': 2}]),
    ([PAIR], 'messages', [{'messages': [user('Q'), assistant('a')]}]),
    ([PAIR, PAIR], 'prompt', [{'prompt': 'Q'}]),
    ([PAIR], 'ranked', [{'prompt': 'Q', 'completions': [' a', ' b'], 'weight': 2}]),
    (
      [LIST],
      'preference',
      [
        {
          'prompt': 'Q',
          'chosen': ' b',
          'rejected': ' a',
          'score_chosen': 3,
          'score_rejected': 1,
          'margin': 2,
        }
      ],
    ),
    ([LIST], 'ranked', [{**LIST, 'completions': [' b', ' c', ' a'], 'scores': [3, 2, 1]}]),
    (
      LABELLED,
      'preference',
      [
        {'prompt': 'Q', 'chosen': ' a', 'rejected': ' b'},
        {'prompt': 'Q', 'chosen': ' c', 'rejected': ' d'},
      ],
    ),
    (
      LABELLED,
      'completion',
      [{'prompt': 'Q', 'completion': ' a'}, {'prompt': 'Q', 'completion': ' c'}],
    ),
    (
      [HH],
      'messages',
      [{'messages': [user('Hi'), assistant('Ho'), user('Hm'), assistant('Ha!')]}],
    ),
    (
      [{'instruction': 'Do', 'input': 'it', 'output': 'done'}],
      'messages',
      [{'messages': [user('Do\nit'), assistant('done')]}],
    ),
    (
      [
        {
          'conversations': [{'from': 'human', 'value': 'Hi'}],
          'chosen': {'from': 'gpt', 'value': 'a'},
          'rejected': {'from': 'gpt', 'value': 'b'},
        }
      ],
      'preference',
      [{'prompt': [user('Hi')], 'chosen': [assistant('a')], 'rejected': [assistant('b')]}],
    ),
  ],
)
def test_conversions(records, target, expected, tmp_path):
  assert list(convert(write(tmp_path / 'a.jsonl', *records), target)) == expected


@pytest.mark.parametrize('records', [[PAIR], [LIST], LABELLED, [HH]])
@pytest.mark.parametrize('target', TARGETS)
def test_what_is_written_loads_again(records, target, tmp_path):
  if records is LABELLED and target == 'ranked':
    return  # lists are not made of labels
  source = write(tmp_path / 'a.jsonl', *records)
  converted = write(tmp_path / 'b.jsonl', *convert(source, target))
  kind = {'completion': 'sft', 'messages': 'sft'}.get(target, target)
  data = load(converted, BYTE, cache_dir=tmp_path / 'cache')
  assert data.kind == kind
  if kind == 'preference' and records is not LABELLED:
    same = load(source, BYTE, kind='preference', cache_dir=tmp_path / 'cache')
    assert [[*map(len, e.candidates)] for e in data] == [[*map(len, e.candidates)] for e in same]
    assert data[0].extras.keys() == same[0].extras.keys()


def test_bad_records_and_requests(tmp_path):
  source = write(tmp_path / 'a.jsonl', PAIR, {'prompt': 3}, PAIR)
  with pytest.raises(DataError, match=r"a.jsonl:2: no key 'chosen'"):
    list(convert(source, 'unpaired'))
  bad = []
  assert len(list(convert(source, 'completion', bad=bad))) == 2 and len(bad) == 1
  with pytest.raises(DataError, match=r"the target should be one of preference.*got 'pairs'"):
    convert(source, 'pairs')
  with pytest.raises(DataError, match='leave out the weights'):
    list(convert(f'0.5*{source} + 0.5*{source}', 'unpaired'))
  alone = write(tmp_path / 'b.jsonl', {'prompt': 'Q', 'completion': 'A'})
  with pytest.raises(DataError, match='preferences come from pairs, lists or labelled'):
    list(convert(alone, 'preference'))
  renamed = write(tmp_path / 'c.jsonl', {'q': 'Q', 'good': 'a', 'bad': 'b'})
  columns = 'prompt=q,chosen=good,rejected=bad'
  assert list(convert(f'{renamed} + {renamed}', 'prompt', columns=columns)) == [{'prompt': 'Q'}]
