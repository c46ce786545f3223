"""Examples drawn as rows: one letter per token over one mark per token.

^ bos   $ eos   / end of turn   upper case: a token of several letters
-  prompt     x  scored     .  in the completion, unscored
"""

from collections import Counter

import numpy as np
import pytest
import vocabularies

from jaxpref.data.examples import Example, make_example, prompt_tokens, truncate
from jaxpref.data.records import Record
from jaxpref.data.tokenizer import load_tokenizer

NAMES = {'<s>': '^', '<|bos|>': '^', '</s>': '$', '<|eos|>': '$', '<end>': '/', '\n': '_'}


def drawn(example, tokenizer, k=0):
  """The tokens and the marks of prompt + candidate k, as two strings of equal length."""
  pieces = [tokenizer.decode([t]) for t in (*example.prompt, *example.candidates[k])]
  letters = [NAMES.get(piece, piece) for piece in pieces]
  marks = ['-'] * len(example.prompt) + ['x' if s else '.' for s in example.scored[k]]
  return ''.join(a if len(a) == 1 else a[0].upper() for a in letters), ''.join(marks)


def made(tokenizer, prompt, *completions, report=None):
  report = Counter() if report is None else report
  return make_example(Record(prompt, completions, {}), tokenizer, report)


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content):
  return {'role': 'assistant', 'content': content}


def test_prompt_then_completion_then_eos():
  byte = load_tokenizer('byte')
  example = made(byte, 'q? ', 'yes', 'n')
  assert drawn(example, byte, 0) == ('^q? yes$',
                                     '----xxxx')  # fmt: skip
  assert drawn(example, byte, 1) == ('^q? n$',
                                     '----xx')  # fmt: skip


def test_a_merge_across_the_border_is_scored_in_every_candidate(tmp_path):
  tokenizer = vocabularies.merging(tmp_path)  # 'a' + 'b' is one token
  report = Counter()
  example = made(tokenizer, 'xa', 'bc', 'cb', report=report)
  assert drawn(example, tokenizer, 0) == ('xAc$',
                                          '-xxx')  # fmt: skip
  assert drawn(example, tokenizer, 1) == ('xacb$',
                                          '-xxxx')  # fmt: skip
  assert report['boundary_merges'] == 1
  exact = made(tokenizer, 'x', 'ab', 'cb', report=report)
  assert drawn(exact, tokenizer, 0) == ('xA$',
                                        '-xx')  # fmt: skip
  assert report['boundary_merges'] == 1


def test_an_empty_prompt_is_bos_where_there_is_one(tmp_path):
  tokenizer = vocabularies.merging(tmp_path / 'bos')  # adds no bos to text by itself
  assert drawn(made(tokenizer, '', 'xy'), tokenizer) == ('^xy$',
                                                         '-xxx')  # fmt: skip
  bare = vocabularies.merging(tmp_path / 'none', special={'eos_token': '</s>'})
  assert drawn(made(bare, '', 'xy', 'z'), bare, 0) == ('xy$',
                                                       '.xx')  # fmt: skip
  assert drawn(made(bare, '', 'xy', 'z'), bare, 1) == ('z$',
                                                       '.x')  # fmt: skip


def test_bos_and_eos_are_never_doubled():
  byte = load_tokenizer('byte')
  assert drawn(made(byte, '<|bos|>a', 'b<|eos|>'), byte) == ('^ab$',
                                                             '--xx')  # fmt: skip
  assert drawn(made(byte, [user('a')], [assistant('b')]), byte)[0].count('^') == 1


def test_a_completion_that_says_nothing_still_ends(tmp_path):
  byte = load_tokenizer('byte')
  assert drawn(made(byte, 'a', ''), byte) == ('^a$',
                                              '--x')  # fmt: skip
  endless = vocabularies.merging(tmp_path, special={}, added=[], config={})
  with pytest.raises(ValueError, match='nothing to score'):
    made(endless, 'a', '')


def test_the_end_of_turn_is_scored_and_what_follows_it_left_out(tmp_path):
  tokenizer = vocabularies.merging(tmp_path)
  example = made(tokenizer, [user('q')], [assistant('yes')], [assistant('n')])
  assert drawn(example, tokenizer, 0) == ('^u:q/_a:yes/',
                                          '--------xxxx')  # fmt: skip
  assert drawn(example, tokenizer, 1) == ('^u:q/_a:n/',
                                          '--------xx')  # fmt: skip


def test_a_template_without_end_of_turn_gets_eos(tmp_path):
  template = '{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}'
  prompt = '{% if add_generation_prompt %}a{% endif %}'
  tokenizer = vocabularies.merging(tmp_path, added=[], config={'chat_template': template + prompt})
  assert drawn(made(tokenizer, [user('q')], [assistant('y')]), tokenizer) == ('uqay$',
                                                                              '---xx')  # fmt: skip


@pytest.mark.parametrize('marked', [True, False])
def test_only_the_assistants_turns_are_scored(marked, tmp_path):
  template = vocabularies.CHAT
  if marked:
    says = '{% generation %}{{ message.content + "<end>" }}{% endgeneration %}{{ "\\n" }}'
    template = (
      '{{ bos_token }}{% for message in messages %}{{ message.role[0] + ":" }}'
      '{% if message.role == "assistant" %}' + says + '{% else %}{{ message.content + "<end>\\n" }}'
      '{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "a:" }}{% endif %}'
    )
  tokenizer = vocabularies.merging(tmp_path, config={'chat_template': template})
  talk = [assistant('yes'), user('r'), assistant('no')]
  assert drawn(made(tokenizer, [user('q')], talk), tokenizer) == (
    '^u:q/_a:yes/_u:r/_a:no/',
    '--------xxxx........xxx',
  )
  # Turns of the assistant within the prompt are prompt.
  example = made(tokenizer, [user('q'), *talk[:2]], talk[2:])
  assert drawn(example, tokenizer) == ('^u:q/_a:yes/_u:r/_a:no/',
                                       '--------------------xxx')  # fmt: skip


def test_a_template_that_rewrites_earlier_turns_needs_marks(tmp_path):
  config = {'chat_template': '{{ messages | length }}' + vocabularies.CHAT}
  tokenizer = vocabularies.merging(tmp_path, config=config)
  with pytest.raises(ValueError, match=r'writes what comes before .* differently.*generation'):
    made(tokenizer, [user('q')], [assistant('y')])


def test_human_turns_within_a_transcript_completion_are_unscored():
  byte = load_tokenizer('byte')
  prompt, completion = '\n\nHuman: q\n\nAssistant:', ' y\n\nHuman: r\n\nAssistant: z'
  _, marks = drawn(made(byte, prompt, completion), byte)
  between = len('\n\nHuman: r\n\nAssistant:')
  assert marks == '-' * (1 + len(prompt)) + 'xx' + '.' * between + 'xxx'


def test_the_prompt_is_what_a_sampler_is_given(tmp_path):
  tokenizer = vocabularies.merging(tmp_path)
  for prompt in ('q', [user('q')]):
    completion = 'y' if prompt == 'q' else [assistant('y')]
    assert made(tokenizer, prompt, completion).prompt.tolist() == prompt_tokens(prompt, tokenizer)


def example(prompt, *candidates):
  return Example(
    np.arange(prompt, dtype=np.int32),
    tuple(np.array(c, np.int32) for c in candidates),
    tuple(np.ones(len(c), bool) for c in candidates),
    {},
  )


@pytest.mark.parametrize(
  ('how', 'limit', 'prompt', 'lengths', 'counts'),
  [
    ('prompt_left', 9, [0, 1, 2, 3, 4], [4, 2], {}),
    ('prompt_left', 7, [0, 3, 4], [4, 2], {'truncated_prompts': 1}),
    ('prompt_left', 4, [0], [3, 2], {'truncated_prompts': 1, 'truncated_completions': 1}),
    ('prompt_left', 2, None, None, {'dropped_same': 1}),
    ('end', 8, [0, 1, 2, 3, 4], [3, 2], {'truncated_completions': 1}),
    ('end', 6, None, None, {'dropped_same': 1}),
    ('end', 5, None, None, {'dropped_unscored': 1}),
    ('drop', 9, [0, 1, 2, 3, 4], [4, 2], {}),
    ('drop', 8, None, None, {'dropped_long': 1}),
  ],
)
def test_truncation(how, limit, prompt, lengths, counts):
  report = Counter()
  shorter = truncate(example(5, [7, 8, 9, 9], [7, 6]), limit, how, bos_id=0, report=report)
  assert (None if shorter is None else shorter.prompt.tolist()) == prompt
  assert (None if shorter is None else [len(c) for c in shorter.candidates]) == lengths
  assert {k: v for k, v in report.items() if v and k in counts} == counts


def test_a_prompt_without_bos_keeps_its_last_tokens():
  shorter = truncate(example(5, [7, 8]), 4, 'prompt_left', bos_id=None, report=Counter())
  assert shorter.prompt.tolist() == [3, 4]


def test_identical_pairs_are_kept():
  pair = truncate(example(5, [7, 8], [7, 8]), 4, 'prompt_left', bos_id=None, report=Counter())
  assert pair is not None
