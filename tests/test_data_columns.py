"""Columns: renames, paths, lists, templates and tests, in text and as a mapping."""

import pytest

from jaxpref.data import columns
from jaxpref.data.files import DataError

RECORD = {
  'q': 'Why?',
  'prediction 1': 'a',
  'prediction 2': 'b',
  'gpt-4.1': {'text': 'c', 'right': True},
  'turns': [{'say': 'x'}, {'say': 'y'}],
  'wrong': 'u; v',
  'grade': 'full',
  'n': 51.0,
  'prompt': 'other',
}


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('q', 'Why?'),
    ('gpt-4.1.text', 'c'),
    ('turns.1.say', 'y'),
    ('turns.*.say', ['x', 'y']),
    ('wrong.;.1', 'v'),
    ('prediction 1|prediction 2', ['a', 'b']),
    ('gpt-4.1.text|q', ['c', 'Why?']),
    ('Q: {q}\\nA, {turns.*.say}:', 'Q: Why?\nA, x\ny:'),
    ('{n}{gpt-4.1.right}', '51true'),
    ('grade==full', True),
    ('grade==none', False),
  ],
)
def test_values(text, value):
  assert columns.rename('here', RECORD, {'prompt': text})['prompt'] == value


def test_keys_that_were_used_go_and_others_stay():
  renamed = columns.rename('here', RECORD, {'prompt': '{q} {grade}', 'chosen': 'turns.0.say'})
  assert set(renamed) == set(RECORD) - {'q', 'grade', 'turns'} | {'chosen'}
  assert 'prompt' not in columns.rename('here', RECORD, {'prompt': ''})


def test_text_form():
  text = 'prompt={q}, and {n}\\n, label=grade==full,weight='
  assert columns.parse(text) == {'prompt': '{q}, and {n}\\n', 'label': 'grade==full', 'weight': ''}
  assert columns.parse('') == {}
  for wrong in ('prompt', 'prompt=q,prompt=n'):
    with pytest.raises(DataError, match='columns must look like'):
      columns.parse(wrong)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('qq', r"here: no key 'qq' \(columns: 'prompt'\); it has .*did you mean 'q'"),
    ('{quest}', r"no key 'quest'"),
    ('turns.2.say', r"no key 'turns.2.say'"),
    ('gpt-4.1.txt', r"no key 'gpt-4.1.txt'.*it has \['right', 'text'\]"),
  ],
)
def test_errors_name_the_key(text, message):
  with pytest.raises(DataError, match=message):
    columns.rename('here', RECORD, {'prompt': text})
