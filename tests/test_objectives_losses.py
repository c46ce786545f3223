"""Every loss, by one table: a new loss is one row of OBJECTIVES and gets all the tests below.

A row holds an objective, the number of candidates it takes, its value derived again in float64
numpy, and the known losses it reduces to. Random batches are ragged, with unscored tokens inside
completions, a missing candidate and an empty example.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpref.masked import fixed_length, sequence_mean, token_mean
from jaxpref.objectives import Objective, dpo, linear, parse, reduce_metrics, sft

B, T = 8, 7
OUTPUTS = ('logps',)  # what the model computes; all else comes with the batch


@dataclasses.dataclass(frozen=True)
class Row:
  objective: Objective
  golden: Callable[..., float]  # the fields, by name and in float64 -> loss
  reductions: tuple[Callable, ...] = ()  # fields -> (value, expected value)
  candidates: int = 2


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def sft_golden(candidate=0, weigh=lambda length: (1.0, length)):
  """`weigh(length)` -> (weight of each token, what the sequence adds to the norm)."""

  def golden(logps, ref_logps, mask):
    total = norm = 0.0
    for row, scored in zip(logps[:, candidate], mask[:, candidate], strict=True):
      if scored.any():
        weight, add = weigh(scored.sum())
        total += weight * -row[scored].sum()
        norm += add
    return total / norm

  return golden


def dpo_golden(beta, smoothing):
  def golden(logps, ref_logps, mask):
    terms = []
    for policy, reference, scored in zip(logps, ref_logps, mask, strict=True):
      if scored.any(axis=-1).all():
        log_ratio = [(policy[k] - reference[k])[scored[k]].sum() for k in (0, 1)]
        margin = beta * (log_ratio[0] - log_ratio[1])
        terms.append(
          -(1 - smoothing) * np.log(sigmoid(margin)) - smoothing * np.log(sigmoid(-margin))
        )
    return np.mean(terms)

  return golden


@jax.jit
def evaluated(objective, fields, step=0):
  """The loss and its metrics, and the loss's gradient in the log-probabilities [B, K, T]."""

  def loss(logps):
    return objective(fields | {'logps': logps}, step)

  return jax.value_and_grad(loss, has_aux=True)(fields['logps'])


@jax.jit
def norms_of(objective, fields):
  return objective.norms(fields)


@jax.jit
def share(objective, fields, norms):
  """A microbatch's share of the loss and the metrics, and the share's gradient."""

  def loss(logps):
    return objective.partial(fields | {'logps': logps}, norms)

  return jax.value_and_grad(loss, has_aux=True)(fields['logps'])


def value(objective, fields):
  return evaluated(objective, fields)[0][0]


def full(fields):
  return fields | {'mask': jnp.ones_like(fields['mask'])}


def swapped(fields):
  return {name: field[:, ::-1] for name, field in fields.items()}


def dpo_at_the_reference(fields):
  return value(dpo(beta=0.7), fields | {'ref_logps': fields['logps']}), np.log(2)


def dpo_is_bradley_terry_without_a_reference(fields):
  totals = jnp.sum(fields['logps'], axis=-1)
  logits = 0.5 * (totals[:, 0] - totals[:, 1])
  fields = full(fields) | {'ref_logps': jnp.zeros_like(fields['logps'])}
  return value(dpo(beta=0.5), fields), jnp.mean(jax.nn.softplus(-logits))


def smoothing_mixes_in_the_swapped_pairs(fields):
  right, wrong = value(dpo(beta=0.5), fields), value(dpo(beta=0.5), swapped(fields))
  smooth = dpo(beta=0.5, label_smoothing=0.2)
  return value(smooth, fields), 0.8 * right + 0.2 * wrong


def equal_lengths_make_reductions_equal(reduce):
  return lambda fields: (value(sft(reduce=reduce), full(fields)), value(sft(), full(fields)))


def candidate_one_is_candidate_zero_swapped(fields):
  return value(sft(candidate=1), fields), value(sft(), swapped(fields))


def sum_golden(*scaled):
  return lambda **fields: sum(scale * golden(**fields) for scale, golden in scaled)


OBJECTIVES = {
  'sft': Row(sft(), sft_golden(), candidates=1),
  'sft_second': Row(
    sft(candidate=1), sft_golden(candidate=1), (candidate_one_is_candidate_zero_swapped,)
  ),
  'sft_sequence_mean': Row(
    sft(reduce=sequence_mean),
    sft_golden(weigh=lambda length: (1 / length, 1)),
    (equal_lengths_make_reductions_equal(sequence_mean),),
  ),
  'sft_fixed_length': Row(
    sft(reduce=fixed_length(T)),
    sft_golden(weigh=lambda length: (1 / T, 1)),
    (equal_lengths_make_reductions_equal(fixed_length(T)),),
  ),
  'dpo': Row(
    dpo(beta=0.5),
    dpo_golden(0.5, 0.0),
    (dpo_at_the_reference, dpo_is_bradley_terry_without_a_reference),
  ),
  'cdpo': Row(
    dpo(beta=0.5, label_smoothing=0.2),
    dpo_golden(0.5, 0.2),
    (smoothing_mixes_in_the_swapped_pairs,),
  ),
  'dpo_with_sft': Row(
    dpo(beta=linear(0.5, 0.1, 10)) + 0.2 * sft(),
    sum_golden((1.0, dpo_golden(0.5, 0.0)), (0.2, sft_golden())),
  ),
}
every = pytest.mark.parametrize('row', OBJECTIVES.values(), ids=OBJECTIVES.keys())
separable = pytest.mark.parametrize(
  'row',
  [row for row in OBJECTIVES.values() if not row.objective.coupled],
  ids=[name for name, row in OBJECTIVES.items() if not row.objective.coupled],
)


def batch(row, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  shape = (B, row.candidates, T)
  lengths = rng.integers(1, T + 1, shape[:2])
  mask = (np.arange(T) < lengths[..., None]) & (rng.random(shape) < 0.8)
  mask[..., 0] = True
  mask[1] = False  # an empty example
  mask[2, -1] = False  # a missing candidate
  return {
    'logps': -rng.exponential(size=shape).astype(dtype),
    'ref_logps': -rng.exponential(size=shape).astype(dtype),
    'mask': mask,
  }


def on_device(fields):
  return {name: jnp.asarray(field) for name, field in fields.items()}


def assert_same(got, expected, rtol=2e-6, atol=1e-7):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def spoil(fields, where, junk=np.nan):
  return {
    name: field if name == 'mask' else jnp.where(where, junk, field)
    for name, field in fields.items()
  }


@every
@pytest.mark.parametrize('seed', [0, 1])
def test_golden(row, seed):
  fields = batch(row, seed, np.float64)
  np.testing.assert_allclose(value(row.objective, fields), row.golden(**fields), rtol=2e-6)


REDUCTIONS = [(name, r) for name, row in OBJECTIVES.items() for r in row.reductions]


@pytest.mark.parametrize(('name', 'reduction'), REDUCTIONS)
def test_reduces_to_known_losses(name, reduction):
  got, expected = reduction(on_device(batch(OBJECTIVES[name])))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@every
def test_gradients(row):
  with jax.enable_x64(True):
    fields = on_device(batch(row, dtype=np.float64))

    def loss(logps):
      return value(row.objective, fields | {'logps': logps})

    check_grads(jax.jit(loss), (fields['logps'],), order=1, modes=('fwd', 'rev'), rtol=1e-5)


@every
def test_gradient_is_zero_where_nothing_is_scored(row):
  fields = batch(row)
  _, gradient = evaluated(row.objective, on_device(fields))
  assert np.any(gradient)
  assert not np.any(np.asarray(gradient)[~fields['mask']])


@every
def test_what_is_masked_leaks_nowhere(row):
  fields = on_device(batch(row))
  spoiled = spoil(fields, ~fields['mask'])
  assert_same(evaluated(row.objective, spoiled), evaluated(row.objective, fields))


@every
def test_bare_loss_is_safe_under_its_mask_too(row):
  fields = on_device(batch(row))
  spoiled = spoil(fields, ~fields['mask'])
  for part in row.objective.parts:
    if any(callable(number) for number in part.numbers.values()):
      continue  # a bare function takes numbers, not schedules
    read = [spoiled[name] for name in part.builder.signature.fields]
    terms, weights, norm, _ = part.builder.loss(*read, **part.numbers, **dict(part.static))
    assert np.all(np.isfinite(np.where(weights > 0, terms, 0))) and np.isfinite(norm)


@every
def test_a_nan_that_counts_shows_and_names_its_example(row):
  fields = on_device(batch(row))
  spoiled = fields | {'logps': fields['logps'].at[4, 0, 0].set(jnp.nan)}
  if row.objective.names == ('sft',) and dict(row.objective.parts[0].static)['candidate'] == 1:
    spoiled = fields | {'logps': fields['logps'].at[4, 1, 0].set(jnp.nan)}
  loss, metrics = row.objective.partial(spoiled, row.objective.norms(spoiled))
  assert np.isnan(loss)
  np.testing.assert_array_equal(np.isnan(metrics['loss'].values), np.arange(B) == 4)


@every
def test_mask_equals_deletion(row):
  fields = batch(row)
  order = np.argsort(~fields['mask'], axis=-1, kind='stable')  # scored tokens first
  pushed = {name: np.take_along_axis(field, order, -1) for name, field in fields.items()}
  longest = pushed['mask'].sum(-1).max()
  kept = np.arange(B) != 1  # without the empty example
  deleted = {name: field[kept, :, :longest] for name, field in pushed.items()}
  assert_same(evaluated(row.objective, deleted)[0], evaluated(row.objective, fields)[0])


@every
def test_padding_changes_nothing(row):
  fields = batch(row)
  widths = ((0, 3), (0, 0), (0, 5))
  padded = {name: np.pad(field, widths) for name, field in fields.items()}
  spoiled = spoil(on_device(padded), ~padded['mask'])
  loss_and_metrics, gradient = evaluated(row.objective, spoiled)
  expected = evaluated(row.objective, on_device(fields))
  assert_same((loss_and_metrics, gradient[:B, :, :T]), expected)


@every
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('size', [1e4, -1e4])
def test_extremes_are_finite(row, dtype, size):
  fields = on_device(batch(row))
  fields |= {name: fields[name].astype(dtype) for name in ('logps', 'ref_logps')}
  fields['logps'] = fields['logps'].at[:, 0].add(jnp.asarray(size, dtype))
  for leaf in jax.tree.leaves(evaluated(row.objective, fields)):
    assert np.all(np.isfinite(leaf))


@every
def test_bfloat16_fields_are_accumulated_in_float32(row):
  fields = on_device(batch(row))
  low = fields | {name: fields[name].astype(jnp.bfloat16) for name in ('logps', 'ref_logps')}
  exact = low | {name: low[name].astype(jnp.float32) for name in ('logps', 'ref_logps')}
  loss = value(row.objective, low)
  assert loss.dtype == jnp.float32
  assert_same(loss, value(row.objective, exact), rtol=1e-6)


@every
def test_all_masked_is_zero(row):
  fields = on_device(batch(row))
  fields = spoil(fields | {'mask': jnp.zeros_like(fields['mask'])}, True)
  for leaf in jax.tree.leaves(evaluated(row.objective, fields)):
    assert not np.any(leaf)


@separable
@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_microbatches_change_nothing(row, microbatches):
  fields = on_device(batch(row))
  parts = [
    {name: field[i::microbatches] for name, field in fields.items()} for i in range(microbatches)
  ]
  unseen = [{n: f for n, f in part.items() if n not in OUTPUTS} for part in parts]
  norms = [norms_of(row.objective, part) for part in unseen]
  norms = tuple(sum(each) for each in zip(*norms, strict=True))
  loss, gradient, metrics = 0.0, np.zeros_like(fields['logps']), []
  for i, part in enumerate(parts):
    (more, metric), gradient[i::microbatches] = share(row.objective, part, norms)
    loss, metrics = loss + more, [*metrics, metric]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)
  expected = evaluated(row.objective, fields)
  assert_same(((loss, reduce_metrics(stacked)), gradient), expected)


@separable
def test_weights_and_norm_ignore_the_model(row):
  fields = on_device(batch(row))
  outputs = {name: jnp.full_like(fields[name], jnp.nan) for name in OUTPUTS}
  for part in row.objective.parts:
    real, blind = part.loss(fields, 0), part.loss(fields | outputs, 0)
    assert_same((blind.weights, blind.norm), (real.weights, real.norm), rtol=0, atol=0)
  without = {name: field for name, field in fields.items() if name not in OUTPUTS}
  assert row.objective.norms(without) == row.objective.norms(fields)


@every
def test_jit_equals_eager(row):
  fields = on_device(batch(row))
  assert_same(evaluated(row.objective, fields, 3)[0], row.objective(fields, 3), rtol=1e-5)


@every
def test_vmap_over_every_number(row):
  fields = on_device(batch(row))
  settings = [jax.tree.map(lambda leaf, i=i: leaf + 0.1 * i, row.objective) for i in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.array(leaves), *settings)
  swept = jax.vmap(value, in_axes=(0, None))(stacked, fields)
  assert_same(swept, np.stack([value(each, fields) for each in settings]), rtol=1e-5)
  assert len(jax.tree.leaves(stacked)) == len(jax.tree.leaves(row.objective))


@every
def test_text_round_trip(row):
  assert parse(str(row.objective)) == row.objective


def test_dpo_by_hand():
  # log-ratios: chosen (-1 + 2) + (-2 + 2) = 1, rejected (-3 + 1) = -2, so the margin is
  # 0.1 * (1 - -2) = 0.3 and the loss -log σ(0.3) = log(1 + e^-0.3) = 0.5543552.
  fields = {
    'logps': jnp.array([[[-1.0, -2.0], [-3.0, -9.0]]]),
    'ref_logps': jnp.array([[[-2.0, -2.0], [-1.0, -9.0]]]),
    'mask': jnp.array([[[True, True], [True, False]]]),
  }
  loss, metrics = dpo(beta=0.1)(fields)
  np.testing.assert_allclose(loss, 0.5543552, rtol=1e-6)
  expected = {
    'loss': 0.5543552,
    'rewards/chosen': 0.1,
    'rewards/rejected': -0.2,
    'rewards/margins': 0.3,
    'rewards/accuracies': 1.0,
    'logps/chosen': -3.0,
    'logps/rejected': -3.0,
  }
  assert metrics.keys() == expected.keys()
  for name, number in expected.items():
    np.testing.assert_allclose(metrics[name], number, rtol=1e-6, err_msg=name)


def test_sft_nll_is_the_token_mean_under_any_reduction():
  # Token losses 1, 2, 3 in one sequence and 8 in another: the token mean is 14 / 4.
  fields = {
    'logps': -jnp.array([[[1.0, 2.0, 3.0]], [[8.0, 0.0, 0.0]]]),
    'mask': jnp.array([[[True, True, True]], [[True, False, False]]]),
  }
  assert value(sft(reduce=sequence_mean), fields) == (2.0 + 8.0) / 2
  for reduce in (token_mean, sequence_mean, fixed_length(3)):
    assert sft(reduce=reduce)(fields)[1]['nll'] == 14 / 4


def test_pairs_need_two_candidates():
  fields = {name: jnp.zeros((2, 3, 4)) for name in ('logps', 'ref_logps')}
  with pytest.raises(ValueError, match=r'needs K=2 candidates, got mask \[B, K, T\] = \(2, 3, 4\)'):
    dpo()(fields | {'mask': jnp.ones((2, 3, 4), bool)})


def test_sft_needs_its_candidate():
  fields = {'logps': jnp.zeros((2, 1, 4)), 'mask': jnp.ones((2, 1, 4), bool)}
  with pytest.raises(ValueError, match=r'candidate=1.*K=1'):
    sft(candidate=1)(fields)
