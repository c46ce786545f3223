"""Policies that learn from samples alone, as runs do, end within 2 % of what there is to gain.

The estimators, objectives and minibatches are those of a run; the policy and the critic are tables,
so the optimum π*(β) is known. The learning rate falls to zero: whitening makes noise as large near
the optimum, where advantages vanish, as it is far from it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref.masked import fixed_length
from jaxpref.objectives import dr_grpo, ppo_clip, reinforce, value_loss
from jaxpref.rollout import estimators
from tests.fixed_points import WORLD

BETA = 1.0
ROLLOUTS, PROMPTS, EPOCHS, MINIBATCHES = 150, 128, 2, 2

METHODS = {
  'PPO': (ppo_clip() + 0.5 * value_loss(), 'gae()', 1),
  'PPO, whitened rewards': (
    ppo_clip() + 0.5 * value_loss(),
    'gae(rewards=whiten_keeping_mean, lam=1.0)',
    1,
  ),
  'REINFORCE': (reinforce(), 'plain_returns()', 1),
  'RLOO': (reinforce(), 'leave_one_out()', 4),
  'Dr. GRPO': (
    dr_grpo(reduce=fixed_length(WORLD.mask.shape[1])),
    'group_baseline(scale=no_scale)',
    4,
  ),
}


def outputs(params, prompts, picks):
  """What the policy and the critic say of completions `picks` [B, K] of prompts [B]."""
  at = prompts[:, None], picks
  logps = WORLD.at_tokens(jax.nn.log_softmax(params['policy']))
  return {'logps': logps[at], 'values': WORLD.at_prefixes(params['critic'])[at]}


def sampled(score, params, rng, samples):
  """A rollout: the fields of `PROMPTS` prompts with their samples."""
  log_probs = np.asarray(log_probs_of(params['policy']))
  prompts = np.arange(PROMPTS) % len(log_probs)
  noise = rng.gumbel(size=(PROMPTS, samples, log_probs.shape[1]))
  picks = (log_probs[prompts][:, None] + noise).argmax(-1)
  return jax.tree.map(np.asarray, score(params, prompts, picks))


log_probs_of = jax.jit(WORLD.log_probs)


def scored(estimator, params, prompts, picks):
  """The fields of sampled completions: of the policy that sampled them, and the estimator's."""
  at = prompts[:, None], picks
  said, mask = outputs(params, prompts, picks), jnp.asarray(WORLD.mask)[picks]
  kl = said['logps'] - WORLD.at_tokens(WORLD.reference)[at]
  scores = jnp.asarray(WORLD.rewards)[at]
  valid = jnp.ones(scores.shape, bool)
  found = estimator(
    estimators.Inputs(scores, scores[..., None], jnp.ones(1), valid, mask, kl, BETA, said['values'])
  )
  old = {'old_logps': said['logps'], 'old_values': said['values'], 'mask': mask}
  return {'prompts': prompts, 'picks': picks, **old, **found}


def learnt(objective, estimator, samples):
  """log π(y|x) [P, C] after a run of `ROLLOUTS`."""
  params = {
    'policy': jnp.asarray(WORLD.reference),
    'critic': jnp.zeros(WORLD.reference.shape[:2]),
  }
  steps = ROLLOUTS * EPOCHS * MINIBATCHES
  optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, steps))
  state, rng = optimizer.init(params), np.random.default_rng(0)
  score = jax.jit(functools.partial(scored, estimator))

  @jax.jit
  def step(params, state, batch, objective):
    def loss(params):
      fields = {**batch, **outputs(params, batch['prompts'], batch['picks'])}
      return objective(fields)[0]

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  for _ in range(ROLLOUTS):
    rollout = sampled(score, params, rng, samples)
    for _ in range(EPOCHS):
      for rows in np.split(rng.permutation(PROMPTS), MINIBATCHES):
        batch = jax.tree.map(lambda x: x[rows], rollout)  # noqa: B023
        params, state = step(params, state, batch, objective)
  return WORLD.log_probs(params['policy'])


@pytest.fixture(autouse=True)
def exact():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize(
  ('objective', 'advantages', 'samples'),
  [
    pytest.param(*row, id=name, marks=[pytest.mark.slow] * (name != 'PPO'))
    for name, row in METHODS.items()
  ],
)
def test_samples_lead_within_two_percent_of_the_optimum(objective, advantages, samples):
  found = learnt(objective, estimators.parse(advantages), samples)
  best, first = WORLD.optimal_policy(BETA), WORLD.reference_log_probs
  values = [np.asarray(WORLD.value(policy, BETA)) for policy in (best, found, first)]
  lost = (values[0] - values[1]) / (values[0] - values[2])
  print(f'{advantages} leaves {lost} of what can be gained')
  assert np.all(lost < 0.02)
