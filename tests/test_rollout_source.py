"""The online source: a function of its arguments; what samples are worth reaches the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import rewards
from jaxpref.advantages import adaptive_kl, group_normalised
from jaxpref.log_probs import log_probs
from jaxpref.rollout.samples import against_gold
from jaxpref.sampling import Sampling, sample
from tests.rollouts import MODEL, PARAMS, STOP, T, digest, flat, moved, online


def equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
  'rounds',
  [
    {},
    {'epochs': 2, 'minibatches': 2},
    {'ahead': 1, 'minibatches': 2},
    {'tries': 3, 'epochs': 2, 'microbatches': 2, 'shards': 2},
  ],
)
def test_batches_follow_from_step_params_and_carry_alone(rounds):
  path = [PARAMS, PARAMS, moved(), moved(), moved(0.2), moved(0.2)]
  first, carries, batches = online(rounds=rounds), [], []
  carry = first.begin()
  for step, params in enumerate(path):
    carries.append(jax.tree.map(np.array, carry))  # as a checkpoint has it
    batch, carry = first.next(step, params, carry)
    batches.append(batch)
  for step in (5, 2, 3):
    batch, after = online(rounds=rounds).next(step, path[step], carries[step])
    equal(batch, batches[step])
    if step < 5:
      equal(jax.device_get(after), carries[step + 1])
  shapes = [jax.tree.map(np.shape, carry) for carry in carries]
  assert all(shape == shapes[0] for shape in shapes)


def test_a_pass_of_minibatches_is_the_rollout():
  source = online(rounds={'epochs': 2, 'minibatches': 2})
  carry = source.begin()
  ids = []
  for step in range(8):
    batch, carry = source.next(step, PARAMS, carry)
    ids.append(batch.fields['ids'].ravel().tolist())
    rows = sorted(ids[-1])
    np.testing.assert_array_equal(flat(batch, 'advantages'), carry['fields']['advantages'][rows])
    assert carry['rollout'] == 1 + step // 4
  for at in range(0, 8, 2):
    assert sorted(ids[at] + ids[at + 1]) == [0, 1, 2, 3]


def test_old_log_probs_are_those_of_the_policy_that_sampled():
  source = online('grpo() + 0.1*kl()', rounds={'minibatches': 2}, reference=moved(seed=2))
  carry = source.begin()
  for step, params in enumerate((moved(), PARAMS)):
    batch, carry = source.next(step, params, carry)
    for name, theirs in (('old_logps', moved()), ('ref_logps', moved(seed=2))):
      expected = log_probs(MODEL, theirs, jax.tree.map(lambda x: x[0], batch))['logps']
      np.testing.assert_allclose(batch.fields[name][0], expected, atol=1e-5)
    mask = batch.fields['mask']
    assert mask.any() and not np.array_equal(batch.fields['old_logps'], batch.fields['ref_logps'])
    np.testing.assert_allclose(
      np.where(mask, batch.fields['sampler_logps'], 0), batch.fields['old_logps'], atol=1e-4
    )


def test_one_step_a_rollout_leaves_old_log_probs_to_the_loss():
  batch, _ = (source := online()).next(0, PARAMS, source.begin())
  assert 'old_logps' not in batch.fields and 'sampler_logps' in batch.fields
  assert 'drawn_logps' in batch.fields
  again = online('reinforce()', advantages='plain_returns()', rounds={'minibatches': 2})
  assert 'drawn_logps' not in again.begin()['fields']  # its second step would show what it learnt


def test_samples_without_a_score_or_cut_off_are_not_learnt_from():
  def partial(prompts, completions, records):
    scores = digest(prompts, completions, records)
    return [{1: None, 2: float('nan'), 3: ValueError('no')}.get(score, score) for score in scores]

  source = online(reward=partial, samples=8, rounds={'mask_truncated': True})
  batch, carry = source.next(0, PARAMS, source.begin())
  samples = jax.device_get(
    source.sampler(PARAMS, carry['ids'].tolist(), np.arange(4, dtype=np.int32))
  )
  scored = source.scorer(source.sampler.prompts, carry['ids'].tolist(), samples)
  numbers = np.array([digest(None, texts, None) for texts in scored.texts])
  last = np.take_along_axis(samples.tokens, samples.mask.sum(-1, keepdims=True) - 1, -1)[..., 0]
  ended = np.isin(last, STOP)
  counts = ended & ~np.isin(numbers, (1, 2, 3))
  assert 0 < counts.sum() < ended.sum() < ended.size  # every kind is there
  mask = flat(batch, 'mask')
  np.testing.assert_array_equal(mask, np.asarray(samples.mask) & counts[..., None])
  expected = np.asarray(group_normalised(numbers.astype(np.float32), counts))[..., None] * mask
  np.testing.assert_allclose(flat(batch, 'advantages'), expected, atol=1e-6)
  said = source.report()
  assert said['reward/mean'] == pytest.approx(numbers[~np.isin(numbers, (1, 2, 3))].mean())
  assert said['completions/clipped_ratio'] == pytest.approx(1 - ended.mean())
  assert source.report() == {}  # once


def test_a_missing_end_costs_what_it_is_said_to():
  plain, costly = (online(advantages='plain_returns()', missing_eos=m) for m in (0.0, 2.5))
  one, carry = plain.next(0, PARAMS, plain.begin())
  other, _ = costly.next(0, PARAMS, costly.begin())
  cut = (carry['mask'].sum(-1) == T) & ~np.isin(carry['tokens'][..., -1], STOP)
  assert cut.any() and not cut.all()
  difference = flat(one, 'advantages') - flat(other, 'advantages')
  np.testing.assert_allclose(difference, 2.5 * cut[..., None] * carry['mask'], atol=1e-5)


def test_a_rollout_of_which_nothing_counts_says_why():
  def broken(prompts, completions, records):
    raise RuntimeError('the judge is away')

  source = online(reward=broken)
  with pytest.raises(ValueError, match=r"every reward failed.*'broken'.*the judge is away"):
    source.next(0, PARAMS, source.begin())


def test_a_reference_that_is_missing_is_asked_for():
  source = online('grpo() + 0.1*kl()')
  with pytest.raises(ValueError, match='need a reference'):
    source.next(0, PARAMS, source.begin())


def test_values_need_a_critic():
  with pytest.raises(ValueError, match='gae needs values'):
    online(advantages='gae()')


def test_dynamic_sampling_fills_up_with_groups_that_differ():
  def some(prompts, completions, records):
    scores = digest(prompts, completions, records)
    return [s if r['number'] % 2 else 1 for s, r in zip(scores, records, strict=True)]

  source = online(reward=some, samples=8, rounds={'tries': 4})
  carry = source.begin()
  for step in range(2):
    _, carry = source.next(step, PARAMS, carry)
    assert (carry['ids'] % 2 == 1).all()  # half of the prompts, so a round is not enough
    assert (carry['fields']['advantages'].std((1, 2)) > 0).all()
    tries = source.report()['rollout/tries']
    assert 1 < tries <= 4 and carry['position'] <= 16 * (step + 1)
  source = online(reward=lambda p, c, r: [1.0] * len(c), rounds={'tries': 2})
  _, carry = source.next(0, PARAMS, source.begin())  # none differ: what there is, is taken
  assert source.report()['rollout/tries'] == 2 and not carry['fields']['advantages'].any()


def test_what_is_cut_off_makes_no_group_worth_keeping():
  """Only cut-off samples have another score, so with them left out every group is alike."""
  options = {'reward': lambda p, c, r: [1.0] * len(c), 'missing_eos': 1.0, 'samples': 8}
  found = {}
  for masked in (False, True):
    source = online(rounds={'tries': 3, 'mask_truncated': masked}, **options)
    _, carry = source.next(0, PARAMS, source.begin())
    found[masked] = source.report()
    assert carry['fields']['advantages'].any() == (not masked)
  assert found[False].get('rollout/tries', 1) < 3 and found[False]['frac_reward_zero_std'] == 0
  assert found[True]['rollout/tries'] == 3 and found[True]['frac_reward_zero_std'] == 1


def test_sampling_ahead_is_one_rollout_stale():
  path = [PARAMS, moved(), moved(0.2), moved(0.3)]
  ahead, now = online(rounds={'ahead': 1}), online()
  carry, other = ahead.begin(), now.begin()
  for step, params in enumerate(path):
    _, carry = ahead.next(step, params, carry)
    _, other = now.next(step, path[max(step - 1, 0)], other)
    for name in ('ids', 'tokens', 'mask'):
      np.testing.assert_array_equal(carry[name], other[name])
  assert not np.array_equal(carry['tokens'], now.next(4, path[-1], other)[1]['tokens'])


def test_passes_end_where_the_policy_has_moved_too_far():
  source = online(rounds={'epochs': 4, 'minibatches': 2, 'target_kl': 0.01})
  carry, rollouts = source.begin(), []
  # Far away after 3 steps, in the middle of a pass; that pass is finished.
  for step, params in enumerate([PARAMS] * 3 + [moved(0.5)] * 4):
    _, carry = source.next(step, params, carry)
    rollouts.append(int(carry['rollout']))
  assert rollouts == [1, 1, 1, 1, 2, 2, 2]
  assert carry['cursor'] == 3


def test_the_likeliest_completion_of_each_prompt_is_scored_for_a_baseline():
  source = online('reinforce()', advantages='remax()')
  _, carry = source.next(0, PARAMS, source.begin())
  prompts, scorer = source.sampler.prompts, source.scorer
  for b, i in enumerate(carry['ids'].tolist()):
    prompt = prompts.tokens[i]
    row = jnp.asarray(prompt)[None]
    greedy = jax.device_get(
      sample(
        MODEL, PARAMS, row, row >= 0, seed=3, max_new_tokens=T, sampling=Sampling(0), stop_ids=STOP
      )
    )
    texts = [scorer.text(prompt, greedy.tokens[0][greedy.mask[0]])]
    texts += [
      scorer.text(prompt, t[m]) for t, m in zip(carry['tokens'][b], carry['mask'][b], strict=True)
    ]
    baseline, *scores = digest(None, texts, None)
    expected = (np.array(scores) - baseline)[:, None] * carry['mask'][b]
    np.testing.assert_allclose(carry['fields']['advantages'][b], expected, atol=1e-5)


def test_beta_follows_its_controller():
  options = {'reference': moved(0.3), 'beta': 0.5, 'advantages': 'leave_one_out()'}
  source = online(controller=adaptive_kl(target=1e-3, horizon=100), **options)
  _, carry = source.next(0, PARAMS, source.begin())
  # 16 completions of a horizon of 100, an error far above its bound of 0.2.
  assert carry['beta'] == pytest.approx(0.5 * (1 + 0.2 * 16 / 100))
  said = source.report()
  fields = carry['fields']
  kl = np.where(carry['mask'], fields['old_logps'] - fields['ref_logps'], 0).sum((1, 2)).mean() / 4
  assert said['kl'] == pytest.approx(kl, rel=1e-4) and kl > 1e-3
  assert said['kl_coef'] == pytest.approx(carry['beta'])
  fixed = online(**options)
  assert fixed.next(0, PARAMS, fixed.begin())[1]['beta'] == 0.5


def test_groups_without_a_difference_are_warned_of_now_and_then(caplog):
  source = online(reward=lambda p, c, r: [0.0] * len(c))
  carry = source.begin()
  for step in range(12):
    _, carry = source.next(step, PARAMS, carry)
  first, tenth = (record.getMessage() for record in caplog.records)
  assert 'rollout 0: in 100 %' in first and 'nothing to learn' in first
  assert 'rollout 9:' in tenth and 'for the 10th time' in tenth
  assert source.report()['frac_reward_zero_std'] == 1


def test_samples_without_a_group_are_compared_with_each_other(caplog):
  """As of PPO, which takes one of each prompt."""
  for reward, same in ((digest, 0), (lambda p, c, r: [0.5] * len(c), 1)):
    source = online(reward=reward, samples=1, advantages='plain_returns()')
    source.next(0, PARAMS, source.begin())
    assert source.report()['frac_reward_zero_std'] == same
    assert ['this batch all samples have one' in r.getMessage() for r in caplog.records] == [
      True
    ] * same


def test_a_reward_of_weight_0_is_compared_with_what_is_learnt_from():
  proxy = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]])
  gold = np.array([[0.5, 0.5, 0.0], [1.0, np.nan, 2.0]])
  found = rewards.Scores(
    names=('proxy', 'gold'),
    weights=np.array([1, 0], np.float32),
    values=np.stack([proxy.ravel(), gold.ravel()], -1).astype(np.float32),
    combined=proxy.ravel().astype(np.float32),
    valid=np.ones(6, bool),
    failures=(),
  )
  # Pairs: (1, 2) is a tie in gold; (1, 3) and (2, 3) are ordered the other way, (4, 6) alike.
  assert against_gold(found, (2, 3)) == {
    'rewards/gold/gap': pytest.approx((0.5 + 1.5 + 3.0 - 1.0 + 3.0) / 5),
    'rewards/gold/agreement': pytest.approx(1 / 3),
  }
  nothing = dataclasses.replace(found, valid=np.zeros(6, bool))
  assert against_gold(nothing, (2, 3)) == {}
  assert against_gold(dataclasses.replace(found, weights=np.ones(2, np.float32)), (2, 3)) == {}
