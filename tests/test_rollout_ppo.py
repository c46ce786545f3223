"""PPO on recorded rollouts: what a critic is fed, by hand; the same steps however they are cut."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxpref import models, sharding
from jaxpref.data import load_tokenizer
from jaxpref.log_probs import ActorCritic, log_probs
from jaxpref.objectives import parse
from jaxpref.rewards import Term
from jaxpref.rollout import estimators
from jaxpref.rollout.prompts import Prompts
from jaxpref.rollout.rounds import Rounds
from jaxpref.rollout.samples import Sampler, Scorer
from jaxpref.rollout.source import Online
from jaxpref.sampling import PLAIN, Sampling
from jaxpref.train import policy
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from tests.steps import scalars

QUIET = rich.console.Console(quiet=True)
T = 5  # new tokens at most
STOP = tuple(range(60))  # of 259 tokens, so that completions end at all lengths
TOKENIZER = load_tokenizer('byte')
SHAPE = dict(width=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=24)
POLICY, PARAMS = models.init(models.preset('tiny', **SHAPE), jax.random.key(0))
SCORED = policy.scored(POLICY)
APART, SHARED = ActorCritic(POLICY, SCORED), ActorCritic(POLICY, SCORED, shared=True)
OBJECTIVE = 'ppo_clip() + 0.5*value_loss()'
SCALARS = scalars(1.0, eps=1e-5)


def near(params, scale, seed):
  keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
  return jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape), params)


CRITIC = models.init(SCORED.config, jax.random.key(1))[1]
BOTH = {
  False: {'policy': PARAMS, 'critic': CRITIC},
  True: {'policy': PARAMS, 'critic': {'score': CRITIC['score']}},
}
REFERENCE = near(PARAMS, 0.1, 2)


def digest(prompts, completions, records):
  """Any number, so that samples differ."""
  return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]


def source(
  model=APART,
  *,
  objective=OBJECTIVE,
  advantages='gae(gamma=0.9, lam=0.8)',
  sampling=PLAIN,
  missing_eos=0.0,
  beta=0.3,
  **rounds,
):
  texts = [chr(ord('a') + i) * (1 + i % 4) for i in range(8)]
  tokens = [np.array(TOKENIZER.encode(text), np.int32) for text in texts]
  prompts = Prompts(tokens, texts, [{} for _ in texts], texts)
  return Online(
    model,
    parse(objective),
    Sampler(POLICY, prompts, 2, T, stop_ids=STOP, sampling=sampling),
    Scorer([Term(digest)], TOKENIZER, 10.0, missing_eos),
    estimators.parse(advantages),
    Rounds(prompts=8, **{'epochs': 2, 'minibatches': 1, **rounds}),
    reference=REFERENCE,
    beta=beta,
  )


def recorded(made, params=BOTH[False]):
  """The carry of a rollout, all steps of it to come, and what was said of it."""
  _, carry = made.next(0, params, made.begin())
  return {**carry, 'cursor': np.int32(0)}, made.report()


def texts_of(carry):
  """The completions' texts, without the token that ended them: none here is the tokenizer's own."""
  return [
    [TOKENIZER.decode(tokens[mask].tolist()) for tokens, mask in zip(*group, strict=True)]
    for group in zip(carry['tokens'], carry['mask'], strict=True)
  ]


def by_hand(carry, missing_eos, beta=0.3, gamma=0.9, lam=0.8):
  """(advantages, returns) of a rollout in float64, sequence by sequence and token by token."""
  fields = {name: np.float64(value) for name, value in carry['fields'].items()}
  mask, texts = carry['mask'], texts_of(carry)
  rewards = -beta * (fields['old_logps'] - fields['ref_logps']) * mask
  for b, k in np.ndindex(mask.shape[:2]):
    last = mask[b, k].sum() - 1
    ended = carry['tokens'][b, k, last] in STOP
    rewards[b, k, last] += digest(None, [texts[b][k]], None)[0] - missing_eos * (not ended)
  advantages = np.zeros(mask.shape)
  for b, k in np.ndindex(mask.shape[:2]):
    following = value = 0.0
    for t in reversed(range(mask[b, k].sum())):
      delta = rewards[b, k, t] + gamma * value - fields['old_values'][b, k, t]
      following = delta + gamma * lam * following
      value, advantages[b, k, t] = fields['old_values'][b, k, t], following
  return advantages, np.where(mask, advantages + fields['old_values'], 0)


@pytest.mark.parametrize('model', [APART, SHARED], ids=['apart', 'shared'])
def test_rewards_stand_on_the_last_real_token_and_padding_has_no_value(model):
  made = source(model, missing_eos=0.7, advantages='gae(gamma=0.9, lam=0.8, advantages=unchanged)')
  carry, said = recorded(made, BOTH[model.shared])
  lengths = carry['mask'].sum(-1)
  assert set(lengths.ravel().tolist()) >= {1, T}  # early ends, and samples that were cut off
  advantages, returns = by_hand(carry, missing_eos=0.7)
  np.testing.assert_allclose(carry['fields']['advantages'], advantages, atol=1e-5)
  np.testing.assert_allclose(carry['fields']['returns'], returns, atol=1e-5)
  assert np.abs(carry['fields']['old_values'][carry['mask']]).min() > 0
  for values in carry['fields'].values():
    assert not values[~carry['mask']].any()
  # Left padding for the sampler, packed rows for training: prompts here are of 1 to 4 bytes.
  assert said['sampling/logp_difference/mean'] <= said['sampling/logp_difference/max'] < 1e-4


def test_advantages_are_whitened_over_real_tokens():
  plain = 'gae(gamma=0.9, lam=0.8, advantages=unchanged)'
  raw = recorded(source(advantages=plain))[0]['fields']['advantages']
  carry, _ = recorded(source())
  mask = carry['mask']
  expected = (raw - raw[mask].mean()) / raw[mask].std() * mask
  np.testing.assert_allclose(carry['fields']['advantages'], expected, atol=1e-4)


def test_rewards_may_be_whitened_first_keeping_their_mean():
  text = 'gae(gamma=1.0, lam=1.0, rewards={}, advantages=unchanged)'
  raw, _ = recorded(source(advantages=text.format('unchanged')))
  got, _ = recorded(source(advantages=text.format('whiten_keeping_mean')))
  mask = raw['mask']

  def rewards(carry):  # with γ = λ = 1 a return is what is left to come
    returns = carry['fields']['returns']
    return returns - np.concatenate([returns[..., 1:], np.zeros_like(returns[..., :1])], -1)

  before = rewards(raw)[mask].astype(np.float64)
  expected = (before - before.mean()) / before.std() + before.mean()
  np.testing.assert_allclose(rewards(got)[mask], expected, atol=1e-4)


def test_importance_of_another_distribution_multiplies_advantages():
  options = dict(sampling=Sampling(temperature=0.5), beta=0.0)
  plain, said = recorded(source(**options))
  capped, told = recorded(source(importance_cap=1.2, **options))
  fields, mask = plain['fields'], plain['mask']
  ratio = np.exp(np.float64(fields['old_logps']) - fields['sampler_logps'])
  assert ratio[mask].min() < 1 < 1.2 < ratio[mask].max()
  weights = np.minimum(ratio, 1.2) * mask
  np.testing.assert_allclose(
    capped['fields']['advantages'], fields['advantages'] * weights, rtol=1e-4, atol=1e-6
  )
  np.testing.assert_array_equal(capped['fields']['returns'], fields['returns'])
  assert told['sampling/importance'] == pytest.approx(weights[mask].mean(), rel=1e-5)
  assert 'sampling/importance' not in said
  # The monitor compares arithmetic, so temperature is no difference to it.
  assert said['sampling/logp_difference/max'] < 1e-4


def test_the_monitor_shows_a_sampler_that_is_behind():
  made = source(ahead=1, epochs=1)
  _, carry = made.next(0, BOTH[False], made.begin())
  away = {**BOTH[False], 'policy': near(PARAMS, 0.1, 5)}
  _, carry = made.next(1, away, carry)
  said, mask = made.report(), carry['mask']
  difference = np.abs(carry['fields']['old_logps'] - carry['fields']['sampler_logps'])[mask]
  assert said['sampling/logp_difference/mean'] == pytest.approx(difference.mean(), rel=1e-3)
  assert said['sampling/logp_difference/max'] == pytest.approx(difference.max(), rel=1e-3)
  assert difference.max() > 0.05


def test_exactly_on_policy_the_step_itself_compares_its_log_probs_with_the_samplers():
  options = dict(objective='grpo()', advantages='group_baseline()', beta=0.0, epochs=1)
  made = source(POLICY, sampling=Sampling(temperature=0.5), microbatches=2, **options)
  batch, _ = made.next(0, PARAMS, made.begin())
  said, mask = made.report(), batch.fields['mask']
  assert not [name for name in said if 'logp_difference' in name] and mask.any()
  bare = batch._replace(fields={n: x for n, x in batch.fields.items() if n != 'drawn_logps'})
  hparams = Hparams(parse(options['objective']), SCALARS)
  for params in (PARAMS, near(PARAMS, 0.1, 5)):  # the second as if the sampler were behind
    state = init_state(params, Optimizer('sgd').init(SCALARS, params))
    after, metrics = compiled(POLICY)(state, batch, hparams)
    one = lambda m: jax.tree.map(lambda x: jnp.asarray(x[m]), batch)  # noqa: E731
    logps = np.stack([log_probs(POLICY, params, one(m))['logps'] for m in range(2)])
    away = np.abs(logps - batch.fields['drawn_logps'])[mask]
    assert metrics['sampling/logp_difference/mean'] == pytest.approx(away.mean(), abs=1e-6)
    assert metrics['sampling/logp_difference/max'] == pytest.approx(away.max(), abs=1e-5)
    assert away.max() < 1e-4 if params is PARAMS else away.mean() > 0.05
    without, others = compiled(POLICY)(state, bare, hparams)
    jax.tree.map(np.testing.assert_array_equal, after, without)
    assert metrics.keys() - others.keys() == {
      f'sampling/logp_difference/{m}' for m in ('mean', 'max')
    }


def test_a_shared_critic_is_a_score_on_the_policys_states():
  batch, _ = (made := source(SHARED)).next(0, BOTH[True], made.begin())
  micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
  apart = {'policy': PARAMS, 'critic': {**PARAMS, 'score': CRITIC['score']}}
  apart['critic'].pop('head', None)
  names = ('logps', 'entropy', 'values')
  ours = log_probs(SHARED, BOTH[True], micro, names)
  theirs = log_probs(APART, apart, micro, names)
  for name in names:
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
  slopes = jax.grad(lambda p: log_probs(SHARED, p, micro, ('values',))['values'].sum())(BOTH[True])
  assert jnp.abs(slopes['policy']['layers']['attention']['q']['w']).max() > 0
  assert SHARED.param_shapes()['critic'].keys() == {'score'}
  assert jax.tree.map(jnp.shape, BOTH[True]) == jax.tree.map(
    lambda x: x.shape, SHARED.param_shapes()
  )


@functools.cache
def compiled(model):
  return jax.jit(make_step(model, Optimizer('sgd')))


def steps_of(model, made, carry, mesh=None, count=1, objective=OBJECTIVE):
  """(losses, parameters) of SGD on a recorded rollout: one step's difference is the gradient."""
  params = near(BOTH[model.shared], 0.02, 7)
  state = init_state(params, Optimizer('sgd').init(SCALARS, params))
  place = lambda batch: batch  # noqa: E731
  if mesh is not None:
    state = jax.device_put(state, sharding.params_sharding(mesh, state))
    place = lambda batch: jax.device_put(batch, sharding.batch_sharding(mesh))  # noqa: E731
  losses = []
  for n in range(count):
    batch, carry = made.next(n, state.params, carry)
    state, metrics = compiled(model)(state, place(batch), Hparams(parse(objective), SCALARS))
    losses.append({name: float(metrics[name]) for name in metrics if name != 'worst'})
  return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
  ('model', 'cut'),
  [
    pytest.param(APART, 'microbatches', id='apart, microbatches'),
    pytest.param(APART, 'devices', id='apart, devices', marks=pytest.mark.slow),
    pytest.param(SHARED, 'microbatches', id='shared, microbatches'),
    pytest.param(SHARED, 'devices', id='shared, devices', marks=pytest.mark.slow),
  ],
)
def test_losses_and_gradients_do_not_depend_on_how_a_rollout_is_cut(model, cut):
  carry, _ = recorded(source(model), BOTH[model.shared])
  whole = steps_of(model, source(model), carry)
  if cut == 'microbatches':
    found = steps_of(model, source(model, microbatches=2), carry)
  else:
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    with jax.set_mesh(mesh):
      found = steps_of(model, source(model, shards=4), carry, mesh)
  for ours, theirs in zip(whole[0], found[0], strict=True):
    assert ours.keys() == theirs.keys() > {'value/explained_variance', 'policy/approx_kl'}
    for name, value in ours.items():
      np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert ours['loss'] == pytest.approx(theirs['loss'], abs=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole[1], found[1]
  )


def test_a_value_warm_up_leaves_the_policy_alone():
  objective = 'after(2)*ppo_clip() + value_loss()'
  carry, _ = recorded(source(objective=objective, epochs=3))
  begun = near(BOTH[False], 0.02, 7)
  for count, moves in ((2, False), (3, True)):
    _, params = steps_of(
      APART, source(objective=objective, epochs=3), carry, count=count, objective=objective
    )
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, jax.device_get(begun))
    assert any(jax.tree.leaves(changed['policy'])) == moves
    assert any(jax.tree.leaves(changed['critic']))
