"""Judges: a bias for a position cancels, and win rates are means over the group."""

import numpy as np
import pytest

from jaxpref.rewards import Sample, Term, both_orders, evaluate, parse, win_rate
from jaxpref.rewards.base import Traits

LENGTHS = ['', 'a', 'bb', 'ccc']


def longer(prompts, firsts, seconds):
  return [
    0.5 if len(a) == len(b) else float(len(a) > len(b))
    for a, b in zip(firsts, seconds, strict=True)
  ]


def biased(prompts, firsts, seconds):
  """Adds 0.3 to the first's chance, where the honest chance is 0.2 or 0.5 or 0.7."""
  honest = {('a', 'b'): 0.2, ('b', 'a'): 0.8, ('a', 'a'): 0.5}
  return [min(honest[pair] + 0.3, 1.0) for pair in zip(firsts, seconds, strict=True)]


def test_both_orders_cancel_a_bias():
  # (0.2 + 0.3 + 1 − 1) / 2 = 0.25 for a before b: the second verdict was cut off at 1.
  judge = both_orders(biased)
  assert judge(['p'] * 3, ['a', 'b', 'a'], ['b', 'a', 'a']) == pytest.approx([0.25, 0.75, 0.5])


def test_both_orders_need_both_verdicts():
  def shy(prompts, firsts, seconds):
    return [None if a == 'b' else 1.0 for a in firsts]

  assert both_orders(shy)(['p'] * 2, ['a', 'a'], ['b', 'a']) == [None, 0.5]


def test_win_rates_are_by_prompt():
  prompts = ['p', 'q', 'p', 'q', 'p']
  completions = ['', 'a', 'bb', 'bb', 'bb']
  # p: '' loses both; each 'bb' beats '' and ties: (1 + 1/2) / 2. q: 'bb' beats 'a'.
  assert win_rate(longer)(prompts, completions, [{}] * 5) == [0, 0, 0.75, 1, 0.75]


def test_pairs_without_a_verdict_are_left_out():
  def partial(prompts, firsts, seconds):
    return [None if '' in pair else 1.0 for pair in zip(firsts, seconds, strict=True)]

  assert win_rate(partial)(['p'] * 3, ['', 'a', 'b'], [{}] * 3) == [None, 1, 0]


def test_a_judge_that_fails_masks_the_prompt_alone():
  def strict(prompts, firsts, seconds):
    if 'bad' in prompts:
      raise ConnectionError('refused')
    return longer(prompts, firsts, seconds)

  samples = [Sample(p, c) for p in ('good', 'bad', 'fine') for c in LENGTHS]
  scores = evaluate([Term(win_rate(strict))], samples)
  np.testing.assert_allclose(scores.combined[:4], [0, 1 / 3, 2 / 3, 1])
  np.testing.assert_allclose(scores.combined[8:], [0, 1 / 3, 2 / 3, 1])
  assert [failure.sample for failure in scores.failures] == [4, 5, 6, 7]
  assert 'refused' in scores.failures[0].error


def refuses(prompts, firsts, seconds):
  """Like `longer`, but no pair with a text that has an x."""
  if any('x' in text for text in [*firsts, *seconds]):
    raise ValueError('will not read it')
  return longer(prompts, firsts, seconds)


# How a config names one.
judge = win_rate(both_orders(refuses))


@pytest.mark.parametrize('named', ['', 'user', 'cosine_length'])
def test_a_text_that_a_judge_refuses_is_masked_alone(named):
  texts = {'p': ['a', 'xx', ''], 'q': ['a', 'bb', 'ccc']}
  samples = [Sample(p, text, tokens=0) for p, group in texts.items() for text in group]
  terms = {
    '': [Term(judge)],
    'user': parse("user('tests.test_rewards_judges:judge')"),
    'cosine_length': parse("cosine_length(user('tests.test_rewards_judges:judge'), limit=9)"),
  }[named]
  scores = evaluate(terms, samples)
  # p: 'a' beats '', and no pair of 'xx' has a verdict. q: 'bb' beats one of two.
  expected = np.array([1, np.nan, 0, 0, 0.5, 1])
  if named == 'cosine_length':  # at length 0: 2 where the score is above 0, else -10
    expected = np.where(np.isnan(expected), np.nan, np.where(expected > 0, 2, -10))
  np.testing.assert_allclose(scores.combined, expected)
  (failure,) = scores.failures
  assert failure.sample == 1 and 'will not read it' in failure.error


def test_of_two_samples_nobody_can_tell_which_one_was_refused():
  scores = evaluate([Term(judge)], [Sample('p', 'xx'), Sample('p', 'a')])
  assert [failure.sample for failure in scores.failures] == [0, 1]


def test_pairs_that_fail_without_a_sample_that_does_are_said(caplog):
  def tired(prompts, firsts, seconds):
    if ('a', 'bb') in zip(firsts, seconds, strict=True):
      raise TimeoutError('busy')
    return longer(prompts, firsts, seconds)

  scores = evaluate([Term(win_rate(tired))], [Sample('p', text) for text in ('a', 'bb', 'ccc')])
  assert scores.valid.all() and "a judge failed on pairs of 'p', left out: busy" in caplog.text
  np.testing.assert_allclose(scores.combined, [0, 0, 1])  # each of 'a' and 'bb' lost to 'ccc'


def test_a_judge_with_a_model_says_what_it_needs():
  class Model:
    untimed, nbytes = True, 3
    __call__ = staticmethod(longer)

  assert Term(win_rate(both_orders(Model()))).traits == Traits(True, True, 3)


def test_a_single_sample_and_bad_verdicts_are_refused():
  with pytest.raises(ValueError, match="2 or more samples of a prompt; 'q' has 1"):
    win_rate(longer)(['p', 'p', 'q'], ['a', 'b', 'c'], [{}] * 3)
  with pytest.raises(ValueError, match='0 verdicts on 1 pairs'):
    win_rate(lambda p, a, b: [])(['p', 'p'], ['a', 'b'], [{}] * 2)
  for verdict in (1.5, -0.1, float('nan')):
    with pytest.raises(ValueError, match='probability in'):
      win_rate(lambda p, a, b, verdict=verdict: [verdict])(['p', 'p'], ['a', 'b'], [{}] * 2)
