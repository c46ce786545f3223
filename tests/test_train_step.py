"""The step: exact for any microbatch, packing and mesh; safe when something is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import masked, sharding
from jaxpref.data.batches import Batches, Packing
from jaxpref.models import init, preset
from jaxpref.objectives import Loss, dpo, objective, router_balance, sft
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from tests.steps import scalars
from tests.worlds import PairData, random_pairs

SCALARS = scalars(0.1)


@objective(coupled=True)
def contrast(logps, mask, *, scale=0.3):
  """Every example against the mean of the batch: not separable."""
  totals = masked.sum(logps, mask, axis=-1)[:, 0]
  centred = totals - jnp.mean(totals)
  ones = jnp.ones_like(totals)
  return Loss(jnp.tanh(scale * centred) ** 2, ones, jnp.sum(ones))


OBJECTIVES = {
  'dpo': dpo(beta=0.3),
  'sum': dpo(beta=0.3, label_smoothing=0.1) + 0.2 * sft(),
  'coupled': contrast() + 0.5 * dpo(),
}


class Noise:
  """A made-up reference table."""

  def __init__(self, data):
    self.data = data

  def __getitem__(self, i):
    rng = np.random.default_rng(i)
    return tuple(rng.normal(-3, 1, len(c)).astype(np.float32) for c in self.data[i].candidates)


@pytest.fixture(scope='module')
def tiny():
  return init(preset('tiny', vocab_size=50, width=32, num_layers=1), jax.random.key(0))


@functools.cache
def compiled(model, optimizer):
  """One program for all tests that take the same batches."""
  return jax.jit(make_step(model, optimizer))


def run(
  tiny, objective, *, steps=1, optimizer=None, scalars=SCALARS, mesh=None, data=None, **options
):
  """(state, metrics) after a few steps over the same examples, whatever `options` of Batches."""
  model, params = tiny
  data = data or random_pairs(16, seed=4)
  optimizer = optimizer or Optimizer('sgd')
  tables = {'ref_logps': Noise(data)}
  batches = Batches(data, 8, seed=0, tables=tables, **options)
  state = jax.jit(lambda p: init_state(p, optimizer.init(scalars, p)))(params)
  step = compiled(model, optimizer)
  hparams = Hparams(objective, scalars)
  if mesh is not None:
    state = jax.device_put(state, sharding.params_sharding(mesh, state))
  for i in range(steps):
    batch = batches[i]
    if mesh is not None:
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, metrics = step(state, batch, hparams)
  return state, metrics


def assert_same(left, right, tolerance=1e-5):
  (left_state, left_metrics), (right_state, right_metrics) = left, right
  for name in ('loss', 'grad_norm', 'rewards/margins', 'logps/chosen'):
    if name in left_metrics:
      np.testing.assert_allclose(
        left_metrics[name], right_metrics[name], rtol=tolerance, err_msg=name
      )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-4, atol=tolerance
    ),
    left_state.params,
    right_state.params,
  )


@pytest.mark.parametrize('name', ['sum', 'coupled', pytest.param('dpo', marks=pytest.mark.slow)])
def test_microbatches_and_groups_do_not_matter(tiny, name):
  whole = run(tiny, OBJECTIVES[name])
  for micro, groups in ((2, 1), (4, 2)):
    assert_same(whole, run(tiny, OBJECTIVES[name], microbatches=micro, groups=groups))


def test_router_balance_is_that_of_the_whole_batch():
  """With experts: exact under microbatches and groups, and what the model's own statistic says."""
  config = preset('tiny', vocab_size=50, width=32, num_layers=2, num_experts=4, experts_per_token=2)
  experts = init(config, jax.random.key(1))
  weighted = sft() + 0.5 * router_balance()
  whole = run(experts, weighted)
  assert_same(whole, run(experts, weighted, microbatches=2, groups=1))
  model, params = experts
  batch = jax.tree.map(lambda x: x[0], Batches(random_pairs(16, seed=4), 8, seed=0)[0])
  rows = tuple(zip(*((r.tokens, r.layout) for r in batch.rows), strict=True))
  _, routing = model.hidden_with_aux(params, *rows)
  np.testing.assert_allclose(whole[1]['loss/router_balance'], routing.balance(), rtol=1e-5)
  plain, _ = run(experts, sft())
  router = ('layers', 'mlp', 'router', 'w')
  assert not np.allclose(_get(plain.params, router), _get(whole[0].params, router), atol=1e-6)
  with pytest.raises(ValueError, match='this model has none'):
    run(init(preset('tiny', vocab_size=50), jax.random.key(0)), weighted)


def test_packing_does_not_matter(tiny):
  shared = run(tiny, OBJECTIVES['sum'], steps=2)
  for packing in (Packing(share_prompts=False), Packing(alone=True), Packing(row_lengths=(40, 80))):
    assert_same(shared, run(tiny, OBJECTIVES['sum'], steps=2, packing=packing))


@pytest.mark.parametrize(
  'sizes',
  [{'data': 2, 'fsdp': 2, 'tensor': 2}, pytest.param({'data': 8}, marks=pytest.mark.slow)],
)
def test_eight_devices_equal_one(tiny, sizes):
  one = run(tiny, OBJECTIVES['sum'], steps=2)
  mesh = sharding.make_mesh(sizes)
  many = run(tiny, OBJECTIVES['sum'], steps=2, mesh=mesh, groups=sharding.groups(mesh))
  assert_same(one, many)


def test_gradient_matches_a_hand_written_loss(tiny):
  """sft on the plain model, no packing, no chunks, one SGD step."""
  model, params = tiny
  data = random_pairs(16, seed=4)
  tokens, scored = np.zeros((2, 8, 32), np.int32)
  for row, i in enumerate(Batches(data, 8, seed=0).indices(0)):
    sequence = np.concatenate([data[i].prompt, data[i].candidates[0]])
    tokens[row, : len(sequence)] = sequence
    scored[row, len(data[i].prompt) : len(sequence)] = 1

  @jax.jit
  def loss(params):
    logps = jax.nn.log_softmax(model.logits(params, tokens, tokens > 0))[:, :-1]
    picked = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(picked * scored[:, 1:]) / scored.sum()

  state, metrics = run(tiny, sft())
  value, grads = jax.value_and_grad(loss)(params)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  jax.tree.map(
    lambda p, g, n: np.testing.assert_allclose(p - 0.1 * g, n, atol=2e-6),
    params,
    grads,
    state.params,
  )


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_example(tiny):
  data = random_pairs(8, seed=4)
  bad = data[5]
  data.examples[5] = bad._replace(candidates=(bad.candidates[0], np.full(9, 1000, np.int32)))
  data.examples[5] = data.examples[5]._replace(scored=(bad.scored[0], np.ones(9, bool)))
  data = PairData(data.examples)  # token 1000 does not exist: NaN, not some other token's state
  state, metrics = run(tiny, dpo(), data=data, optimizer=Optimizer('adamw'))
  assert metrics['skipped'] == 1 and state.skipped == 1 and state.step == 1
  assert not np.isfinite(metrics['loss'])
  assert metrics['worst']['ids'][0] == 5
  jax.tree.map(np.testing.assert_array_equal, state.params, tiny[1])


def test_frozen_parameters_stay_and_have_no_moments(tiny):
  optimizer = Optimizer('adamw', freeze=('embed', r'layers/mlp'))
  state, _ = run(tiny, sft(), optimizer=optimizer)
  params = tiny[1]
  np.testing.assert_array_equal(state.params['embed']['w'], params['embed']['w'])
  jax.tree.map(
    np.testing.assert_array_equal, state.params['layers']['mlp'], params['layers']['mlp']
  )
  q = ('layers', 'attention', 'q', 'w')
  assert not np.array_equal(_get(state.params, q), _get(params, q))
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  assert moments < 2 * (sum(x.size for x in jax.tree.leaves(params)) - params['embed']['w'].size)
  with pytest.raises(ValueError, match="'embd' matches no parameter"):
    Optimizer(freeze=('embd',)).labels(params)
  with pytest.raises(ValueError, match="did you mean 'adamw'"):
    Optimizer('adamv')


def test_clip_decay_and_ema(tiny):
  model, params = tiny
  scalars = SCALARS | {'clip': 1e-3}
  state, metrics = run(tiny, sft(), scalars=scalars)
  moved = jnp.sqrt(
    sum(
      jnp.sum((a - b) ** 2)
      for a, b in zip(*map(jax.tree.leaves, (state.params, params)), strict=True)
    )
  )
  np.testing.assert_allclose(moved, 0.1 * 1e-3, rtol=1e-2)
  assert metrics['grad_norm'] > 1e-2  # reported before the clip

  optimizer = Optimizer('sgd')
  scalars = SCALARS | {'weight_decay': 0.5, 'clip': 0.0}
  state = init_state(params, optimizer.init(scalars, params), ema=True)
  batch = Batches(random_pairs(8, seed=0), 8)[0]
  state, _ = jax.jit(make_step(model, optimizer))(state, batch, Hparams(sft(), scalars, 0.75))
  norm, w = params['norm']['scale'], params['embed']['w']
  np.testing.assert_array_equal(state.params['norm']['scale'], norm)  # norms do not decay
  np.testing.assert_allclose(state.params['embed']['w'], w * (1 - 0.1 * 0.5), rtol=1e-6)
  np.testing.assert_allclose(state.ema['embed']['w'], w * (1 - 0.25 * 0.05), rtol=1e-6)


def test_one_program_serves_a_sweep(tiny):
  """vmap over learning rates and betas equals separate runs."""
  model, params = tiny
  optimizer = Optimizer('adamw')
  data = random_pairs(8, seed=4)
  batch = Batches(data, 8, tables={'ref_logps': Noise(data)})[0]
  step = make_step(model, optimizer)

  def once(beta, rate):
    scalars = SCALARS | {'learning_rate': rate}
    state = init_state(params, optimizer.init(scalars, params))
    state, metrics = step(state, batch, Hparams(dpo(beta=beta), scalars))
    return state.params['norm']['scale'], metrics['loss']

  betas, rates = jnp.array([0.1, 1.0]), jnp.array([1e-3, 1e-2])
  scale, loss = jax.jit(jax.vmap(once))(betas, rates)
  for i in range(2):
    one_scale, one_loss = jax.jit(once)(betas[i], rates[i])
    np.testing.assert_allclose(loss[i], one_loss, rtol=1e-5)
    np.testing.assert_allclose(scale[i], one_scale, atol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'lion', 'sgd', 'adafactor'])
def test_every_optimizer_learns(tiny, name):
  rate = {'sgd': 0.5, 'lion': 1e-3, 'adafactor': 3e-2, 'adamw': 3e-3}[name]
  scalars = SCALARS | {'learning_rate': rate, 'b1': 0.9, 'clip': 1.0}
  data = random_pairs(8, seed=4)
  optimizer = Optimizer(name)
  _, first = run(tiny, sft(), scalars=scalars, data=data, optimizer=optimizer)
  _, last = run(tiny, sft(), scalars=scalars, data=data, optimizer=optimizer, steps=12)
  assert last['loss'] < first['loss'] - 0.1


def test_a_field_nobody_supplies(tiny):
  model, params = tiny
  optimizer = Optimizer('sgd')
  batch = Batches(random_pairs(4, seed=0), 4)[0]
  state = init_state(params, optimizer.init(SCALARS, params))
  with pytest.raises(ValueError, match="'ref_logps'"):
    make_step(model, optimizer)(state, batch, Hparams(dpo(), SCALARS))


def _get(tree, path):
  for key in path:
    tree = tree[key]
  return tree
