"""Records of every format come to one form, and errors name the line, the key and what came."""

import pytest

from jaxpref.data import columns as renames
from jaxpref.data.conversations import canonical
from jaxpref.data.files import DataError
from jaxpref.data.records import KINDS, Record, infer_kind, read_record

WHERE = 'pairs.jsonl:7'


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content):
  return {'role': 'assistant', 'content': content}


def read(value):
  value = canonical(WHERE, value)
  return read_record(WHERE, value, infer_kind(WHERE, value, tuple(KINDS)))


@pytest.mark.parametrize(
  ('value', 'prompt', 'completions'),
  [
    pytest.param(
      {'prompt': 'Hi', 'chosen': ' a', 'rejected': ' b', 'other': 1},
      'Hi',
      (' a', ' b'),
      id='explicit',
    ),
    pytest.param(
      {'chosen': 'The sky is blue', 'rejected': 'The sky is black'},
      'The sky is',
      (' blue', ' black'),
      id='implicit: back to the start of the word',
    ),
    pytest.param({'chosen': 'yes', 'rejected': 'no'}, '', ('yes', 'no'), id='nothing in common'),
    pytest.param({'prompt': '', 'chosen': 'a', 'rejected': ''}, '', ('a', ''), id='empty texts'),
    pytest.param(
      {
        'chosen': '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hm\n\nAssistant: Ha!',
        'rejected': '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hm\n\nAssistant: He',
      },
      '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hm\n\nAssistant:',
      (' Ha!', ' He'),
      id='HH transcript',
    ),
    pytest.param(
      {
        'chosen': '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hm\n\nAssistant: Ha!',
        'rejected': '\n\nHuman: Hi\n\nAssistant: No',
      },
      '\n\nHuman: Hi\n\nAssistant:',
      (' Ho\n\nHuman: Hm\n\nAssistant: Ha!', ' No'),
      id='HH transcript that parts early',
    ),
    pytest.param(
      {'prompt': [user('Hi')], 'chosen': [assistant('a')], 'rejected': [assistant('b')]},
      [user('Hi')],
      ([assistant('a')], [assistant('b')]),
      id='messages',
    ),
    pytest.param(
      {'chosen': [user('Hi'), assistant('a')], 'rejected': [user('Hi'), assistant('b')]},
      [user('Hi')],
      ([assistant('a')], [assistant('b')]),
      id='messages, implicit prompt',
    ),
    pytest.param(
      {'chosen': [user('Hi'), assistant('a')], 'rejected': [user('Hi'), assistant('a')]},
      [user('Hi')],
      ([assistant('a')], [assistant('a')]),
      id='messages, identical',
    ),
    pytest.param(
      {
        'prompt': 'Hi',
        'chosen': [user('Hi'), assistant('a')],
        'rejected': [user('Hi'), assistant('b')],
      },
      [user('Hi')],
      ([assistant('a')], [assistant('b')]),
      id='completions that repeat the prompt',
    ),
    pytest.param(
      {'prompt': [user('Hi')], 'chosen': 'a', 'rejected': 'b'},
      [user('Hi')],
      ([assistant('a')], [assistant('b')]),
      id='strings after messages',
    ),
    pytest.param({'prompt': 'Q', 'completion': ' A'}, 'Q', (' A',), id='prompt-completion'),
    pytest.param({'text': 'word'}, '', ('word',), id='text'),
    pytest.param(
      {'messages': [user('Hi'), assistant('a'), user('b'), assistant('c')]},
      [user('Hi')],
      ([assistant('a'), user('b'), assistant('c')],),
      id='conversation',
    ),
  ],
)
def test_formats(value, prompt, completions):
  assert read(value) == Record(prompt, completions, {})


def test_labels_and_weights_are_numbers():
  talk = [user('Hi'), assistant('a'), user('b'), assistant('c')]
  assert read({'prompt': 'Q', 'completion': 'A', 'label': True}).extras == {'label': 1.0}
  assert read({'prompt': 'Q', 'completion': 'A', 'label': 0}).extras == {'label': -1.0}
  labelled = read({'messages': talk, 'label': False})
  assert labelled == Record(talk[:3], (talk[3:],), {'label': -1.0})
  assert read({'text': 'a', 'weight': 2}).extras == {'weight': 2.0}


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ({'prompt': 'a', 'reply': 'b'}, r"cannot use a record with the keys \['prompt', 'reply'\]"),
    ({'prompt': 3, 'chosen': 'a', 'rejected': 'b'}, "'prompt' should be a string or.*got int 3"),
    ({'prompt': 'p', 'chosen': None, 'rejected': 'b'}, "'chosen' should be a string.*got NoneType"),
    ({'chosen': 'a', 'rejected': [user('b')]}, "'chosen' is str 'a', 'rejected' is list"),
    ({'prompt': 'p', 'chosen': [], 'rejected': 'b'}, "'chosen' should be a non-empty list"),
    (
      {'prompt': [{'content': 'x'}], 'chosen': 'a', 'rejected': 'b'},
      r"prompt\[0\] should have a string 'role' and 'content', got dict",
    ),
    (
      {'prompt': 'p', 'chosen': {'from': 'robot', 'value': 'a'}, 'rejected': 'b'},
      r"chosen\[0\]: 'from' should be one of human, user, gpt.*got 'robot'",
    ),
    ({'messages': [user(None)]}, r"messages\[0\]: 'content' should be a string, got NoneType"),
    ({'messages': [user('a')]}, r"no 'assistant' turn to learn from, roles are \['user'\]"),
    (
      {'chosen': [user('a')], 'rejected': [user('b')]},
      r"after the prompt, 'chosen' should go on with an 'assistant' message, got roles \['user'\]",
    ),
    (
      {'chosen': '\n\nHuman: a\n\nAssistant: b', 'rejected': '\n\nHuman: x'},
      'so there is no prompt; they differ from character 9 on',
    ),
    ({'text': ''}, "'text' should be a non-empty string, got str ''"),
    (
      {'prompt': 'p', 'completion': 'c', 'label': 'yes'},
      "'label' should be true or false",
    ),
    ({'text': 'a', 'weight': 'big'}, "'weight' should be a number, got str 'big'"),
  ],
)
def test_errors(value, message):
  with pytest.raises(DataError, match=message) as error:
    read(value)
  assert str(error.value).startswith(WHERE)


def test_every_record_has_the_kind_of_the_first():
  with pytest.raises(DataError, match=r"no key 'rejected'.*it has.*did you mean 'reject'"):
    read_record(WHERE, {'prompt': 'a', 'chosen': 'b', 'reject': 'c'}, 'preference')


def test_columns_rename():
  value = {'question': 'Q', 'prompt': 'other', 'good': 'a', 'bad': 'b'}
  columns = {'prompt': 'question', 'chosen': 'good', 'rejected': 'bad'}
  assert read(renames.rename(WHERE, value, renames.check(columns))).prompt == 'Q'
  with pytest.raises(DataError, match=r"no key 'questoin' \(columns: 'prompt'\); it has"):
    renames.rename(WHERE, value, {'prompt': 'questoin'})
  with pytest.raises(DataError, match=r"unknown name 'choosen'.*did you mean 'chosen'"):
    renames.check({'choosen': 'good'})


def gpt(content):
  return {'from': 'gpt', 'value': content}


def human(content):
  return {'from': 'human', 'value': content}


SYSTEM = {'role': 'system', 'content': 's'}
PAIR = ([assistant('a')], [assistant('b')])


@pytest.mark.parametrize(
  ('value', 'record'),
  [
    pytest.param(
      {'conversations': [human('Hi')], 'chosen': gpt('a'), 'rejected': gpt('b'), 'system': 's'},
      Record([SYSTEM, user('Hi')], PAIR, {}),
      id='ShareGPT pair',
    ),
    pytest.param(
      {'conversations': [{'from': 'system', 'value': 's'}, human('Hi'), gpt('a')]},
      Record([SYSTEM, user('Hi')], ([assistant('a')],), {}),
      id='ShareGPT conversation',
    ),
    pytest.param(
      {'conversations': [human('Hi'), gpt('a')], 'kto_tag': False},
      Record([user('Hi')], ([assistant('a')],), {'label': -1.0}),
      id='ShareGPT labelled',
    ),
    pytest.param(
      {'instruction': 'Do', 'input': 'this', 'output': 'a', 'history': [['h', 'i']]},
      Record([user('h'), assistant('i'), user('Do\nthis')], ([assistant('a')],), {}),
      id='Alpaca',
    ),
    pytest.param(
      {'instruction': 'Do', 'input': '', 'chosen': 'a', 'rejected': 'b'},
      Record([user('Do')], PAIR, {}),
      id='Alpaca pair',
    ),
    pytest.param(
      {
        'prompt': 'Hi',
        'prompt_id': '7',
        'chosen': [user('Hi'), assistant('a')],
        'rejected': [user('Hi'), assistant('b')],
        'messages': [user('Hi'), assistant('a')],
        'score_chosen': 8.5,
        'score_rejected': 6,
      },
      Record([user('Hi')], PAIR, {'scores': (8.5, 6.0), 'margin': 2.5}),
      id='UltraFeedback',
    ),
    pytest.param(
      {'prompt': 'Q', 'chosen': 'a', 'rejected': 'b', 'preference': 0.25, 'margin': 1},
      Record('Q', ('b', 'a'), {'preference': 0.75, 'margin': -1.0}),
      id='soft label, turned round',
    ),
    pytest.param(
      {'prompt': 'Q', 'first': 'a', 'second': 'b', 'verdict': 1.9},
      Record('Q', ('b', 'a'), {'preference': pytest.approx(0.9)}),
      id='verdict',
    ),
    pytest.param(
      {'prompt': 'Q', 'first': 'a', 'second': 'b', 'verdict': ['model_a', 'tie', 0, '2']},
      Record('Q', ('a', 'b'), {'preference': 0.5}),
      id='several verdicts',
    ),
    pytest.param(
      {'prompt': 'Q', 'completions': ['a', 'b', 'c'], 'scores': [1, 3, 1]},
      Record('Q', ('b', 'a', 'c'), {'scores': (3.0, 1.0, 1.0)}),
      id='scores',
    ),
    pytest.param(
      {'prompt': 'Q', 'completions': ['a', 'b', 'c'], 'ranks': [3, 1, 2]},
      Record('Q', ('b', 'c', 'a'), {'scores': (2.0, 1.0, 0.0)}),
      id='ranks',
    ),
    pytest.param(
      {'prompt': 'Q', 'completions': ['a', 'b', 'c'], 'verdicts': [2, 0, 1]},
      Record('Q', ('b', 'a', 'c'), {'scores': (2.0, 0.5, 0.5)}),
      id='verdicts on all pairs',
    ),
    pytest.param(
      {'prompt': 'Q', 'completions': '["a", "b"]'},
      Record('Q', ('a', 'b'), {}),
      id='a list as CSV has it, best first',
    ),
    pytest.param(
      {'prompt': 'Q', 'completions': ['one', 'two '], 'labels': [True, None]},
      Record('Q', ('one\ntwo ',), {}, ((4, 1.0),)),
      id='steps',
    ),
    pytest.param({'prompt': [user('Q')]}, Record([user('Q')], (), {}), id='prompt only'),
    pytest.param(
      {'prompt': [user('Q')], 'completion': 'A', 'tools': '[{"name": "f"}]'},
      Record([user('Q')], ([assistant('A')],), {}, (), [{'name': 'f'}]),
      id='tools as text',
    ),
    pytest.param(
      {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}, assistant('a')]},
      Record([user('Hi')], ([assistant('a')],), {}),
      id='contents in parts',
    ),
    pytest.param(
      {'text': 'a', 'weight': '0.5'}, Record('', ('a',), {'weight': 0.5}), id='a number as text'
    ),
  ],
)
def test_more_formats(value, record):
  assert read(value) == record


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ({'prompt': 'p', 'completion': 'c', 'label': float('nan')}, "'label' should be true or false"),
    ({'text': 'a', 'weight': float('inf')}, r"'weight' should be a number, .*'weight=' leaves it"),
    (
      {'prompt': 'p', 'chosen': 'a', 'rejected': 'b', 'preference': 1.5},
      r'within \[0, 1\].*verdict',
    ),
    ({'prompt': 'p', 'first': 'a', 'second': 'b', 'verdict': 3}, '1 .the first is better., 2'),
    ({'prompt': 'p', 'completions': ['a']}, "'completions' should be a list of at least two"),
    ({'prompt': 'p', 'completions': ['a', 3]}, r"'completions\[1\]' should be a string"),
    ({'prompt': 'p', 'completions': ['a', 'b'], 'scores': [1]}, "'scores' should hold 2 numbers"),
    (
      {'prompt': 'p', 'completions': ['a', 'b'], 'scores': [1, 2], 'ranks': [1, 2]},
      "expected one of 'scores', 'ranks' and 'verdicts'",
    ),
    ({'prompt': 'p', 'completions': ['a'], 'labels': [1, 0]}, "'labels' holds 2 for 1 steps"),
    ({'prompt': 'p', 'completions': ['a', ''], 'labels': [1, 0]}, r"'completions\[1\]' should be"),
    ({'text': 'half \ud83d of it'}, "'text' holds half a surrogate pair"),
    ({'prompt': 'p', 'completion': 51.0}, "columns such as 'completion={answer}'"),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'image'}]}, assistant('a')]},
      r"messages\[0\]: 'content' should be a string.*only text is read",
    ),
    ({'prompt': [user('Q')], 'completion': 'A', 'tools': 'f'}, "'tools' should be a list of JSON"),
    ({'conversations': [{'from': 'function_call', 'value': 'f('}]}, 'function_call should be JSON'),
  ],
)
def test_hostile_values(value, message):
  with pytest.raises(DataError, match=message) as error:
    read(value)
  assert str(error.value).startswith(WHERE)


def test_a_function_call_becomes_a_tool_call():
  call = {'from': 'function_call', 'value': '{"name": "f", "arguments": {}}'}
  talk = [human('Q'), call, {'from': 'observation', 'value': '1'}, gpt('one')]
  record = read({'conversations': talk})
  assert [message['role'] for message in record.completions[0]] == [
    'assistant',
    'tool',
    'assistant',
  ]
  assert record.completions[0][0]['tool_calls'][0]['function']['name'] == 'f'
