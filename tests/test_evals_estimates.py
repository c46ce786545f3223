"""Intervals of metrics: values agree with the metric, prompts are the unit."""

import numpy as np
import pytest

from jaxpref import masked
from jaxpref.evals import statistics
from jaxpref.evals.estimates import estimates, ratio
from jaxpref.objectives import Metric, reduce_metrics

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('weights', ['ones', 'some', 'lengths'])
def test_the_value_is_the_metrics_own(weights):
  values = RNG.normal(size=40).astype('f4')
  weights = {'ones': np.ones(40), 'some': RNG.integers(2, size=40)}.get(
    weights, RNG.integers(1, 9, size=40)
  )
  metrics = {'x': Metric(values, weights.astype('f4'))}
  for prompts in (np.arange(40), np.arange(40) // 4):
    (found,) = estimates(metrics, prompts).values()
    assert np.isclose(found.value, reduce_metrics(metrics)['x'], rtol=1e-5)
    assert found.low < found.value < found.high


def test_examples_of_one_prompt_do_not_narrow_the_interval():
  totals = RNG.normal(size=30)
  once = ratio(totals, np.ones(30))
  again = ratio(5 * totals, np.full(30, 5.0))
  assert once.n == again.n == 30
  np.testing.assert_allclose(
    [once.value, once.low, once.high], [again.value, again.low, again.high]
  )
  mean = statistics.mean(totals)
  np.testing.assert_allclose([once.value, once.low, once.high], [mean.value, mean.low, mean.high])


def test_shares_get_wilsons_interval():
  won = np.array([1.0] * 9 + [0.0])
  found = ratio(won, np.ones(10))
  assert found == statistics.win_rate(won, np.full(10, 0.5))
  assert ratio(np.ones(10), np.ones(10)).low < 1  # not of width 0


def test_the_interval_covers_the_truth_as_often_as_it_says():
  covered, trials = 0, 400
  for _ in range(trials):
    counts = RNG.integers(1, 6, size=60)
    difficulty = RNG.normal(size=60)  # shared by the examples of a prompt
    totals = counts * (2.0 + difficulty) + RNG.normal(size=60) * np.sqrt(counts)
    found = ratio(totals, counts.astype(float))
    covered += found.low <= 2.0 <= found.high
  assert 0.90 < covered / trials < 0.985


def test_what_is_no_mean_over_examples_has_no_interval():
  ones = np.ones(4, 'f4')
  metrics = {
    'sum': Metric(ones, ones, masked.sum),
    'tokens': Metric(np.ones((4, 3), 'f4'), np.ones((4, 3), 'f4')),
    'none': Metric(ones, 0 * ones),
  }
  assert estimates(metrics, np.arange(4)) == {}
