"""Stop strings: sampling with them is cutting the same sample made without them."""

import functools
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpref import models, sampling, stops
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.decoding import sample_groups
from jaxpref.generation import decode_after
from jaxpref.rollout.samples import Sampler, Scorer
from tests import rollouts
from tests.test_sampling import P, T, V, make, padded

HERE = pathlib.Path(__file__).parent / 'testdata' / 'chat'
TEXTS = 'a', ' bé', '€ 12', 'xaé x', '<|eos|>', ' \n\n'
# Pieces that begin and end in the middle of stop strings and of characters; one adds nothing.
PIECES = [b'a', b'b', b'ab', b'ba', b'aab', b'', b' a', b'\xc3', b'\xa9', b'b\xc3', b'abab', b'c']
STOP = 'abb', 'ba a', 'caa', '\u00e9b'


def first_end(tokens, pieces, stop):
  """How many tokens it takes until their bytes hold a stop string; None if they never do."""
  for n in range(1, len(tokens) + 1):
    text = b''.join(pieces[token] for token in tokens[:n])
    if any(word.encode() in text for word in stop):
      return n
  return None


@given(
  st.lists(st.integers(0, len(PIECES) + 1), max_size=12),
  st.lists(st.text('ab\u00e9', min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_the_automaton_finds_what_the_text_holds(tokens, stop):
  moves = stops.automaton(stop, PIECES)
  state, last = 0, len(moves) - 1
  within = [token if token < len(PIECES) else 5 for token in tokens]  # ids beyond add nothing
  for n, token in enumerate(tokens, 1):
    state = int(moves[state, token]) if token < len(PIECES) else state
    assert (state == last) == (first_end(within[:n], PIECES, stop) is not None)


def test_many_rows_follow_their_own_states_and_unknown_tokens_add_nothing():
  moves = stops.automaton(['ab'], PIECES)
  found = []
  states = np.zeros(3, np.int32)
  for tokens in ([0, 1, 2], [99, 0, 3], [1, 1, 3]):
    states, ended = stops.follow(moves, states, np.array(tokens))
    found.append(np.asarray(ended).tolist())
  assert found == [[False, False, True], [False, False, True], [True, True, True]]


@pytest.mark.parametrize('name', ['byte', 'bpe', *sorted(p.name for p in HERE.glob('*.model'))])
def test_pieces_of_a_tokenizer_make_up_its_texts(name):
  tokenizer = load_tokenizer(name if name == 'byte' else HERE / name)
  before, *_ = tokenizer.encode('a')
  assert len(tokenizer.pieces) == tokenizer.vocab_size
  for text in TEXTS:
    tokens = tokenizer.encode(text)
    joined = b''.join(tokenizer.pieces[i] for i in tokens)
    assert joined.decode(errors='replace') == decode_after(tokenizer, before, tokens)
    for n in range(len(tokens)):  # beginnings may end inside a character
      part = b''.join(tokenizer.pieces[i] for i in tokens[:n]).decode(errors='replace')
      assert part.rstrip('\ufffd') == decode_after(tokenizer, before, tokens[:n]).rstrip('\ufffd')


@pytest.fixture(scope='module')
def decoder():
  return make(models.Rope())


def cut(samples, pieces, stop):
  """Samples [..., T] cut after the token that completes a stop string, and where that was."""
  arrays = {name: np.array(value) for name, value in samples._asdict().items()}
  ended = np.zeros(arrays['finished'].shape, bool)
  for row in np.ndindex(ended.shape):
    n = first_end(arrays['tokens'][row][arrays['mask'][row]].tolist(), pieces, stop)
    if n is None:
      continue
    ended[row] = arrays['finished'][row] = True
    for name in ('tokens', 'mask', 'logps', 'sampling_logps'):
      arrays[name][row][n:] = 0
  return sampling.Samples(**arrays), ended


@pytest.mark.parametrize('slots', [None, 4], ids=['sample', 'groups'])
def test_samples_are_cut_where_the_stop_string_is_complete(decoder, slots):
  lengths, K = (5, 1, 3, 0, 4), 3
  prompts, mask = padded('left', lengths)
  settings = dict(seed=3, max_new_tokens=T, stop_ids=(2,))
  if slots is None:
    draw = functools.partial(sampling.sample, *decoder, prompts.repeat(K, 0), mask.repeat(K, 0))
    settings |= dict(ids=np.arange(5).repeat(K), k=np.tile(np.arange(K), 5))
  else:
    draw = functools.partial(sample_groups, *decoder, prompts, mask, num_samples=K, slots=slots)
  pieces = [PIECES[v % len(PIECES)] for v in range(V - 3)]  # the last tokens add nothing
  known = [*pieces, b'', b'', b'']
  want, ended = cut(draw(**settings), known, STOP)
  assert 2 < ended.sum() < ended.size - 2
  got = draw(**settings, stops=stops.automaton(STOP, pieces))
  for name, value in want._asdict().items():
    check = np.testing.assert_array_equal
    if value.dtype == np.float32:
      check = functools.partial(np.testing.assert_allclose, atol=1e-5)
    check(np.asarray(getattr(got, name)), value, err_msg=name)
  assert P > 1 and not np.asarray(got.mask)[~np.asarray(got.mask).any(-1)].any()


def test_a_stopped_sample_of_a_rollout_is_finished_and_its_text_ends_before_the_string():
  prompts, tokenizer = rollouts.prompts(), rollouts.TOKENIZER
  ends = tuple(tokenizer.stop_ids)
  new = functools.partial(Sampler, rollouts.MODEL, prompts, 16, rollouts.T, slots=9, stop_ids=ends)
  score = functools.partial(Scorer, rollouts.online().scorer.terms, tokenizer)
  plain = new()(rollouts.PARAMS, range(8), np.arange(8))
  texts = score()(prompts, range(8), plain).texts
  pairs = re.findall('[A-Z0-9]{2}', ' '.join(text for group in texts for text in group))
  stop = (*pairs[:3], *'QRSTUV', 'never')
  moves = stops.automaton(stop, tokenizer.pieces)
  stopped = new(stops=moves)(rollouts.PARAMS, range(8), np.arange(8))
  scored = score(stop=stop)(prompts, range(8), stopped)
  for place in np.ndindex(8, 16):
    text = texts[place[0]][place[1]]
    at = stops.find(text, stop)
    assert scored.texts[place[0]][place[1]] == text[:at]
    assert bool(stopped.finished[place]) == (at is not None or bool(plain.finished[place]))
  share = np.mean(np.asarray(stopped.finished))
  assert np.mean(np.asarray(plain.finished)) < share < 1
  assert scored.metrics['completions/clipped_ratio'] == pytest.approx(1 - share)


@pytest.mark.parametrize('stop', ['abc', [''], ['a', 3]])
def test_what_is_no_list_of_strings_is_refused(stop):
  with pytest.raises(ValueError, match='a list of texts that are not empty'):
    stops.automaton(stop, PIECES)
