"""What `inspect` prints: who said what, what is scored, and how long things are."""

import io

import numpy as np
from rich.console import Console

from jaxpref.data import Example, from_examples, inspect, load_tokenizer

BYTE = load_tokenizer('byte')


def printed(examples, *, colour=False, **options):
  console = Console(
    file=io.StringIO(),
    width=100,
    force_terminal=colour,
    color_system='truecolor' if colour else None,
  )
  data = from_examples(examples)
  inspect.show(data, BYTE, range(len(data)), console, **options)
  return console.file.getvalue()


def example(prompt, *candidates, scored=None):
  arrays = tuple(np.array(BYTE.encode(c), np.int32) for c in candidates)
  masks = scored or [np.ones(len(a), bool) for a in arrays]
  return Example(np.array(BYTE.encode(prompt), np.int32), arrays, tuple(masks), {'weight': 0.5})


def test_a_pair_is_printed_with_its_counts():
  text = printed([example('<|bos|>Why?', ' So<|eos|>', ' No, é<|eos|>')])
  assert 'example 0 · weight 0.5' in text
  assert 'prompt · 5 tokens' in text and '<|bos|>Why?' in text
  assert 'chosen · 4 tokens, 4 scored' in text
  assert 'rejected · 8 tokens, 8 scored' in text
  assert 'No, é' in text, 'the two bytes of é are shown as one letter'


def test_unscored_parts_are_visible_without_colours():
  scored = [np.array([False, False, True, True])]
  assert '‹ab›cd' in printed([example('q', 'abcd', scored=scored)])


def test_colours_tell_prompt_candidates_and_scores_apart():
  text = printed([example('q', 'yes', 'no')], colour=True)
  assert '\x1b[2mq' in text  # the prompt is dim
  assert '\x1b[4;32myes' in text  # chosen: underlined green
  assert '\x1b[4;31mno' in text  # rejected: underlined red


def test_text_cannot_drive_the_terminal_or_the_markup():
  text = printed([example('\x1b[31m[bold]q', 'a\x07')])
  assert '\x1b' not in text and '\x07' not in text
  assert '␛[31m[bold]q' in text and 'a␇' in text


def test_boundaries_between_tokens():
  assert 'a·b·c' in printed([example('abc', 'x')], boundaries=True)


def test_the_length_table_counts_tokens():
  text = printed([example('abc', 'x', 'yz'), example('abcde', 'x', 'yz')])
  rows = {
    line.split('│')[1].strip(): line.split('│')[2:-1] for line in text.splitlines() if '│' in line
  }
  assert [cell.strip() for cell in rows['prompt']] == ['4.0', '3', '4', '5', '5', '5', '8']
  assert rows['rejected'][-1].strip() == '4'
  assert rows['prompt once + all candidates'][-1].strip() == '14'


def test_numbers_of_every_shape_are_shown():
  ends = (np.array([0, 1], np.float32), np.array([1], np.float32))
  extras = {'weight': 3.0, 'scores': np.array([2.5, 1], np.float32), 'step_ends': ends}
  text = printed([example('p', 'ab', 'c')._replace(extras=extras)])
  assert 'scores 2.5, 1' in text and 'step_ends on 2 tokens' in text and 'weight 3' in text
