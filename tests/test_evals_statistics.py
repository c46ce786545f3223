"""Intervals against closed forms, and their coverage by simulation."""

import numpy as np
import pytest

from jaxpref.evals import statistics

Z = 1.959963984540054


def covers(estimate, truth):
  return estimate.low <= truth <= estimate.high


def coverage(make, truth, repeats=400):
  hits = [covers(make(np.random.default_rng(i)), truth) for i in range(repeats)]
  return np.mean(hits)


def test_mean_is_the_textbook_interval():
  got = statistics.mean([1.0, 2.0, 3.0, 6.0])
  error = np.sqrt((4 + 1 + 0 + 9) / 3 / 4)
  assert (got.value, got.n) == (3.0, 4)
  assert got.high - got.value == pytest.approx(Z * error) == got.value - got.low


def test_mean_of_one_unit_claims_nothing():
  assert statistics.mean([2.0]) == statistics.Estimate(2.0, -np.inf, np.inf, 1)


def test_samples_of_a_prompt_are_one_unit():
  values = np.random.default_rng(0).normal(size=(40, 1))
  assert statistics.mean(np.tile(values, 5)) == statistics.mean(values[:, 0])


def test_mean_covers():
  def make(rng):
    return statistics.mean(rng.exponential(size=60))

  assert 0.90 <= coverage(make, 1.0) <= 0.98


def test_difference_cancels_what_the_prompts_share():
  rng = np.random.default_rng(0)
  difficulty, noise = rng.normal(size=200), 0.1 * rng.normal(size=200)
  before, after = difficulty, difficulty + 0.5 + noise
  got = statistics.difference(after, before)
  assert covers(got, 0.5)
  assert got.high - got.low < 0.2 * (statistics.mean(after).high - statistics.mean(after).low)
  back = statistics.difference(before, after)
  assert back.value == pytest.approx(-got.value) and back.low == pytest.approx(-got.high)


def test_win_rate_is_wilsons_interval():
  # 8 wins of 10: (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10)
  ours, theirs = np.ones(10), np.array([0.0] * 8 + [2.0] * 2)
  got = statistics.win_rate(ours, theirs)
  centre, half = 0.8 + Z**2 / 20, Z * np.sqrt(0.016 + Z**2 / 400)
  assert got.value == pytest.approx(0.8)
  assert got.low == pytest.approx((centre - half) / (1 + Z**2 / 10))
  assert got.high == pytest.approx((centre + half) / (1 + Z**2 / 10))


def test_win_rate_counts_a_tie_as_one_half_and_is_antisymmetric():
  a, b = np.array([1.0, 1.0, 0.0, 3.0]), np.array([1.0, 0.0, 1.0, 1.0])
  ab, ba = statistics.win_rate(a, b), statistics.win_rate(b, a)
  assert ab.value == 2.5 / 4
  assert ab.value + ba.value == 1 and ab.low == pytest.approx(1 - ba.high)
  assert statistics.win_rate(a, a).value == 0.5


def test_win_rate_of_a_clean_sweep_still_has_width():
  got = statistics.win_rate(np.ones(20), np.zeros(20))
  assert got.value == got.high == 1.0 and 0.8 < got.low < 0.9


@pytest.mark.parametrize('p', [0.5, 0.97])
def test_win_rate_covers(p):
  def make(rng):
    return statistics.win_rate((rng.random(60) < p) * 1.0, np.full(60, 0.5))

  assert 0.91 <= coverage(make, p) <= 0.99


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
  values = np.random.default_rng(0).normal(size=150)
  normal, got = statistics.mean(values), statistics.bootstrap(np.mean, values)
  assert got.value == pytest.approx(normal.value)
  assert [got.low, got.high] == pytest.approx([normal.low, normal.high], abs=0.02)
  assert got == statistics.bootstrap(np.mean, values)
  assert got != statistics.bootstrap(np.mean, values, seed=1)


def test_bootstrap_keeps_pairs_together():
  x = np.arange(50.0)
  ratio = statistics.bootstrap(lambda a, b: a.sum() / b.sum(), 2 * x, x)
  assert [ratio.low, ratio.value, ratio.high] == pytest.approx([2, 2, 2])


def test_kl_of_sampled_sequences():
  """T independent tokens from p against q: KL = T Σ p log(p/q)."""
  p, q, length = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4]), 6
  truth = length * np.sum(p * np.log(p / q))

  def sample(rng):
    tokens = rng.choice(3, size=(200, length), p=p)
    return statistics.kl(np.log(p)[tokens], np.log(q)[tokens], np.ones(tokens.shape, bool))

  for name in ('k1', 'k3'):
    estimates = [getattr(sample(np.random.default_rng(i)), name) for i in range(200)]
    assert 0.90 <= np.mean([covers(estimate, truth) for estimate in estimates]) <= 0.99
    assert np.mean([estimate.value for estimate in estimates]) == pytest.approx(truth, rel=0.02)


def test_k3_has_less_spread_when_the_policy_moved_little():
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.48, 0.31, 0.21])
  tokens = np.random.default_rng(0).choice(3, size=(500, 5), p=p)
  got = statistics.kl(np.log(p)[tokens], np.log(q)[tokens], np.ones(tokens.shape, bool))
  assert got.k3.high - got.k3.low < 0.2 * (got.k1.high - got.k1.low)
  assert got.k3.low >= 0


def test_kl_ignores_masked_tokens_and_survives_extremes():
  logps, ref = np.full((3, 4), -1.0), np.full((3, 4), -1.5)
  mask = np.array([[True, True, False, False]] * 3)
  logps[:, 2], ref[:, 2:] = -np.inf, [-np.inf, np.nan]
  assert statistics.kl(logps, ref, mask).k1.value == pytest.approx(1.0)
  assert np.isfinite(
    statistics.kl(np.full((2, 1), -1e4), np.zeros((2, 1)), np.ones((2, 1))).k3.value
  )
  same = statistics.kl(ref[:, :2], ref[:, :2], mask[:, :2])
  assert same.k1.value == same.k3.value == same.k1.high == 0


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: statistics.mean([]), 'values: expected shape'),
    (lambda: statistics.mean([1.0], level=95), r'level: expected a number in \(0, 1\), got 95'),
    (lambda: statistics.difference([1.0], [1.0, 2.0]), 'the same prompts, got 1 and 2'),
    (lambda: statistics.win_rate([1.0], [[1.0]]), r'equal shapes, got \[1\] and \[1, 1\]'),
    (lambda: statistics.bootstrap(np.mean, [1.0], [1.0, 2.0]), r'one length > 0, got \[1, 2\]'),
  ],
)
def test_wrong_input_says_what_was_expected(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_estimate_prints_its_interval():
  estimate = statistics.Estimate(0.5, 0.25, 0.75, 9)
  assert str(estimate) == '0.500 [0.250, 0.750]'
  assert f'{estimate:+.1f}' == '+0.5 [+0.2, +0.8]'
