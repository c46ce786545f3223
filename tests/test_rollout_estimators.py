"""Estimators hand a rollout to the functions of `advantages`, the KL penalty where it belongs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import advantages, masked
from jaxpref.rollout.estimators import ESTIMATORS, Inputs, parse

B, K, T = 3, 4, 5
BETA, GAMMA, LAM = 0.3, 0.9, 0.8


def inputs(seed=0):
  """Scores, KL and values, one sample invalid and one reward that does not apply."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  mask = np.arange(T) < rng.integers(1, T + 1, (B, K, 1))
  mask[1, 2] = False
  rewards = normal(B, K, 2)
  rewards[0, 1, 1] = np.nan
  weights = np.array([1.0, 0.5], np.float32)
  scores = np.nansum(rewards * weights, -1)
  kl = np.where(mask, normal(B, K, T), 0)
  greedy = normal(B), np.array([True, False, True])
  return Inputs(
    scores, rewards, weights, mask.any(-1), mask, kl, np.float32(BETA), normal(B, K, T), greedy
  )  # fmt: skip


def close(found, expected, x):
  np.testing.assert_allclose(found, np.where(x.mask, expected, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('text', 'function'),
  [
    ('leave_one_out()', advantages.leave_one_out),
    ('group_baseline()', advantages.group_normalised),
    (
      'group_baseline(scale=no_scale)',
      lambda r, v: advantages.group_normalised(r, v, scale=advantages.no_scale),
    ),
    (
      'group_baseline(scale=batch_std)',
      lambda r, v: advantages.group_normalised(r, v, scale=advantages.batch_std),
    ),
    ('whitened_group()', advantages.reinforce_plus_plus_baseline),
  ],
)
def test_estimators_of_groups_take_the_penalty_off_the_score(text, function):
  x = inputs()
  penalised = x.scores - BETA * x.kl.sum(-1)
  expected = np.asarray(function(penalised, x.valid))
  close(parse(text)(x)['advantages'], expected[..., None], x)
  assert not np.asarray(parse(text)(x)['advantages'])[1, 2].any()  # the invalid sample


def test_every_reward_is_normalised_by_itself():
  x = inputs()
  applies = np.isfinite(x.rewards) & x.valid[..., None]
  parts = [
    np.asarray(advantages.group_normalised(np.nan_to_num(x.rewards[..., j]), applies[..., j]))
    for j in range(2)
  ]
  close(parse('each_reward()')(x)['advantages'], (parts[0] + 0.5 * parts[1])[..., None], x)


def test_a_greedy_completion_is_a_baseline_where_its_score_counts():
  x = inputs()
  expected = x.scores - BETA * x.kl.sum(-1) - x.greedy[0][:, None]
  expected = np.where(x.valid & np.array([[True], [False], [True]]), expected, 0)
  close(parse('remax()')(x)['advantages'], expected[..., None], x)


def test_returns_are_sums_of_what_is_to_come():
  x = inputs()
  expected = np.zeros((B, K, T))
  for b, k in np.ndindex(B, K):
    following = x.scores[b, k]  # the score comes with the last token
    for t in reversed(range(int(x.mask[b, k].sum()))):
      following = expected[b, k, t] = following - BETA * x.kl[b, k, t]
      following *= GAMMA
  close(parse(f'plain_returns(gamma={GAMMA})')(x)['advantages'], expected, x)
  found = np.asarray(parse(f'whitened_returns(gamma={GAMMA})')(x)['advantages'])
  counted = expected[x.mask]
  close(found, (expected - counted.mean()) / counted.std(), x)


@pytest.mark.parametrize('rewards', ['unchanged', 'whiten_keeping_mean'])
@pytest.mark.parametrize('whitened', ['unchanged', 'whiten'])
def test_gae_reads_the_values_of_the_critic(rewards, whitened):
  x = inputs()
  text = f'gae(gamma={GAMMA}, lam={LAM}, rewards={rewards}, advantages={whitened})'
  found = parse(text)(x)
  tokens = advantages.token_rewards(x.scores, x.kl, x.mask, beta=BETA)
  if rewards != 'unchanged':
    tokens = masked.whiten_keeping_mean(tokens, x.mask)
  expected, returns = advantages.gae(tokens, x.values, x.mask, gamma=GAMMA, lam=LAM)
  if whitened != 'unchanged':
    expected = masked.whiten(expected, x.mask)
  close(found['advantages'], expected, x)
  close(found['returns'], returns, x)


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_without_a_penalty_kl_is_of_no_account(estimator):
  x = inputs()._replace(beta=jnp.float32(0))
  one, other = estimator()(x), estimator()(x._replace(kl=7 * x.kl))
  for name, values in one.items():
    np.testing.assert_array_equal(values, other[name])
    assert np.isfinite(values).all()


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_text_and_estimator_are_the_same(estimator):
  assert parse(f'{estimator.__name__}()') == estimator()


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('gea()', "'gae'"),
    ('gae(gama=1.0)', r"gae\(\) has no 'gama'; did you mean 'gamma'"),
    ('group_std', r'expected one of gae\(\), leave_one_out\(\)'),
    ('group_baseline', r'expected one of gae\(\)'),
    ('', 'advantages'),
    ('leave_one_out() + gae()', 'advantages'),
    ('group_baseline(scale=std)', "'std'"),
  ],
)
def test_text_that_describes_no_estimator(text, message):
  with pytest.raises(ValueError, match=message):
    parse(text)
