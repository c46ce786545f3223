"""Evaluation: sums by hand, and whatever a reward does wrong stays with its samples."""

import logging
import math
import re
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.rewards import Sample, Term, calls, evaluate, exact_match, length_penalty

NAN = math.nan
SAMPLES = [
  Sample(f'prompt {i}', str(i), {'answer': str(i % 2), 'index': i}, tokens=i) for i in range(4)
]


def of(scores, name='of'):
  """A reward that gives sample i `scores[i]`, however the samples are batched."""

  def reward(prompts, completions, records):
    return [scores[record['index']] for record in records]

  reward.__name__ = name
  return reward


@pytest.fixture
def release():
  """An event that hanging rewards wait for, so that their threads end with the test."""
  event = threading.Event()
  yield event
  event.set()
  for thread in calls._abandoned:
    thread.join()


def test_weighted_sum_over_what_applies():
  scores = evaluate(
    [
      Term(of([1, None, 3, None], 'a'), 2.0),
      Term(of([10, 20, None, None], 'b'), -0.5),
      Term(of([7, 7, 7, 7], 'logged'), 0.0),
    ],
    SAMPLES,
  )
  assert scores.names == ('a', 'b', 'logged')
  np.testing.assert_array_equal(
    scores.values, [[1, 10, 7], [NAN, 20, 7], [3, NAN, 7], [NAN, NAN, 7]]
  )
  # 2·1 − 10/2 = −3; −20/2 = −10; 2·3 = 6; nothing with a weight applies.
  np.testing.assert_array_equal(scores.combined, [-3, -10, 6, NAN])
  np.testing.assert_array_equal(scores.valid, [True, True, True, False])
  assert scores.values.dtype == scores.combined.dtype == scores.weights.dtype == np.float32
  assert scores.failures == ()
  assert scores.metrics() == {
    'rewards/a/mean': 2,
    'rewards/a/std': 1,
    'rewards/a/scored': 0.5,
    'rewards/b/mean': 15,
    'rewards/b/std': 5,
    'rewards/b/scored': 0.5,
    'rewards/logged/mean': 7,
    'rewards/logged/std': 0,
    'rewards/logged/scored': 1,
    'reward/mean': pytest.approx(-7 / 3),
    'reward/std': pytest.approx(math.sqrt((9 + 100 + 36) / 3 - (7 / 3) ** 2)),
    'reward/scored': 0.75,
  }


def test_rules_see_records_tokens_and_whether_the_end_was_reached():
  seen = {}

  def look(prompts, completions, records):
    seen.update(records[0], prompt=prompts[0], completion=completions[0])
    return [0.0]

  sample = Sample('p', 'c', {'answer': 'c', 'finished': 'hidden'}, tokens=5, finished=False)
  scores = evaluate([Term(look), Term(exact_match()), Term(length_penalty(), 0.1)], [sample])
  assert seen == {
    'prompt': 'p',
    'completion': 'c',
    'answer': 'c',
    'completion_tokens': 5,
    'finished': False,
  }
  np.testing.assert_allclose(scores.combined, [0.5])


@pytest.mark.parametrize('make', [tuple, np.array, lambda x: jnp.array(x, jnp.bfloat16), list])
def test_scores_may_be_arrays(make):
  scores = evaluate([Term(lambda p, c, r: make([1.0, 2.0, 3.0, 4.0]))], SAMPLES)
  np.testing.assert_array_equal(scores.combined, [1, 2, 3, 4])


def test_scores_may_be_numbers_of_any_kind():
  mixed = [True, np.float64(2), jnp.float32(3), np.bool_(False)]
  np.testing.assert_array_equal(evaluate([Term(of(mixed))], SAMPLES).combined, [1, 2, 3, 0])


@pytest.mark.parametrize(
  ('bad', 'error'),
  [
    (NAN, 'the score is nan'),
    (-math.inf, 'the score is -inf'),
    (1e300, r'the score is 1e\+300'),  # infinite in float32
    (10**400, 'OverflowError'),
    (KeyError('gone'), "KeyError: 'gone'"),
  ],
)
def test_a_bad_score_masks_its_sample(bad, error, caplog):
  with caplog.at_level(logging.WARNING):
    scores = evaluate([Term(of([1, 1, bad, 1], 'mine')), Term(of([2, 2, 2, 2]))], SAMPLES)
  np.testing.assert_array_equal(scores.valid, [True, True, False, True])
  np.testing.assert_array_equal(scores.combined, [3, 3, NAN, 3])
  assert scores.values[2, 1] == 2  # what the other reward gave is kept
  (failure,) = scores.failures
  assert (failure.reward, failure.sample, failure.prompt) == ('mine', 2, 'prompt 2')
  assert re.search(error, failure.error)
  assert '1 of 4 samples failed' in caplog.text and "'prompt 2'" in caplog.text


def test_what_raises_for_all_is_asked_one_by_one():
  calls_seen = []

  def fragile(prompts, completions, records):
    calls_seen.append(len(prompts))
    return [12 // int(c) for c in completions]

  for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
    scores = evaluate([Term(fragile)], [SAMPLES[i] for i in order])
    expected = {0: NAN, 1: 12, 2: 6, 3: 4}
    np.testing.assert_array_equal(scores.combined, [expected[i] for i in order])
    (failure,) = scores.failures
    assert failure.sample == order.index(0) and failure.error.startswith('ZeroDivisionError')
  assert calls_seen == [4, 1, 1, 1, 1] * 2


def test_a_failure_of_a_logged_reward_masks_nothing():
  scores = evaluate([Term(of([1, 1, 1, 1], 'a')), Term(of([NAN] * 4, 'b'), 0)], SAMPLES)
  assert scores.valid.all() and len(scores.failures) == 4
  assert scores.metrics()['rewards/b/scored'] == 0
  assert 'rewards/b/mean' not in scores.metrics()


@pytest.mark.parametrize('timeout', [60.0, None])
def test_exit_and_changes_to_arguments_stay_inside(timeout):
  def rude(prompts, completions, records):
    for record in records:
      record.clear()
    prompts.clear()
    sys.exit(3)

  scores = evaluate([Term(rude), Term(exact_match())], SAMPLES, timeout)
  assert not scores.valid.any()
  np.testing.assert_array_equal(scores.values[:, 1], [1, 1, 0, 0])
  assert {f.error for f in scores.failures} == {'RuntimeError: it called exit(3)'}


def test_a_timeout_masks_the_sample_that_hangs(release, caplog):
  def slow(prompts, completions, records):
    if '2' in completions:
      release.wait()
    return [1.0] * len(prompts)

  terms = [Term(of([5, 5, 5, 5], 'before')), Term(slow), Term(of([7, 7, 7, 7], 'after'))]
  with caplog.at_level(logging.WARNING):
    scores = evaluate(terms, SAMPLES, timeout=1.0)
  np.testing.assert_array_equal(scores.valid, [True, True, False, True])
  np.testing.assert_array_equal(scores.values[2], [5, NAN, 7])
  (failure,) = scores.failures
  assert failure.sample == 2 and 'no answer within' in failure.error
  assert 'goes on in the background' in caplog.text


def test_samples_that_hang_leave_time_to_the_others(release):
  def mostly_slow(prompts, completions, records):
    if completions != ['3']:
      release.wait()
    return [1.0]

  start = time.monotonic()
  scores = evaluate([Term(mostly_slow)], SAMPLES, timeout=2.0)
  assert scores.valid.tolist() == [False, False, False, True]
  assert time.monotonic() - start < 6  # two rounds of 2 s, not one and three


def test_calls_that_hang_are_bounded(release, monkeypatch):
  monkeypatch.setattr(calls, 'MAX_ABANDONED', 2)
  started = []

  def hang(prompts, completions, records):
    started.append(1)
    release.wait()
    return [0.0] * len(prompts)

  scores = evaluate([Term(hang)], SAMPLES, timeout=0.1)
  assert len(started) == 2 and len(scores.failures) == 4
  assert '2 calls that ran out of time are still running' in scores.failures[3].error
  release.set()
  for thread in calls._abandoned:
    thread.join()
  assert evaluate([Term(hang)], SAMPLES, timeout=60).valid.all()  # they ended: it is called again


@pytest.mark.parametrize('timeout', [0, -1.0, NAN])
def test_a_limit_that_nothing_can_keep_is_refused(timeout):
  with pytest.raises(ValueError, match=f'timeout={timeout}: seconds .* above 0'):
    evaluate([Term(of([1, 2, 3, 4]))], SAMPLES, timeout=timeout)


def test_an_infinite_limit_is_none():
  assert evaluate([Term(of([1, 2, 3, 4]))], SAMPLES, timeout=math.inf).valid.all()


def test_no_limit_runs_on_the_callers_thread():
  def where(prompts, completions, records):
    return [float(threading.current_thread() is threading.main_thread())] * len(prompts)

  assert evaluate([Term(where)], SAMPLES, timeout=None).combined.tolist() == [1] * 4
  assert evaluate([Term(where)], SAMPLES).combined.tolist() == [0] * 4


@pytest.mark.parametrize(
  ('answer', 'error', 'message'),
  [
    ([1.0], ValueError, "'mine' returned 1 scores for 4 samples"),
    ([1.0] * 5, ValueError, "'mine' returned 5 scores for 4 samples"),
    (1.0, TypeError, "'mine' must return a list of 4 scores, one a sample; it returned float 1.0"),
    (None, TypeError, 'it returned NoneType'),
    ('1111', TypeError, 'it returned str'),
    ({0: 1}, TypeError, 'it returned dict'),
    ([1, 2, '3', 4], TypeError, r"'mine', sample 2: a score is a number, None .* got str '3'"),
    (np.ones((4, 1)), TypeError, "'mine', sample 0: .* got list"),
    ([1, 2, 3, 1j], TypeError, 'sample 3: .* got complex'),
  ],
)
def test_what_is_not_scores_is_an_error_that_names_the_reward(answer, error, message):
  with pytest.raises(error, match=message):
    evaluate([Term(lambda p, c, r: answer, name='mine')], SAMPLES)


def test_terms_are_checked():
  with pytest.raises(ValueError, match="two rewards are called 'of'"):
    evaluate([Term(of([1])), Term(of([1]))], [])
  with pytest.raises(ValueError, match='there is none'):
    evaluate([], SAMPLES)
  with pytest.raises(ValueError, match='is a callable'):
    Term('numeric_answer')
  with pytest.raises(ValueError, match="weight of 'of' is nan"):
    Term(of([1]), NAN)


def test_no_samples_and_none_that_applies(caplog):
  scores = evaluate([Term(exact_match())], [])
  assert scores.values.shape == (0, 1) and scores.metrics() == {}
  with caplog.at_level(logging.WARNING):
    assert not evaluate([Term(exact_match(key='anwser'))], SAMPLES).valid.any()
  assert "'exact_match' applies to none of 4 samples" in caplog.text
  assert 'answer, index' in caplog.text
