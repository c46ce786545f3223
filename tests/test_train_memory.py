"""What saves memory changes where numbers live or how they are rounded, not what is learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.data.batches import Batches
from jaxpref.log_probs import head
from jaxpref.models import Lora, init, mask_layout, preset
from jaxpref.models import model as model_file
from jaxpref.models.model import REMAT
from jaxpref.objectives import sft
from jaxpref.plan import costs
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from tests.steps import scalars
from tests.worlds import random_pairs

SCALARS = scalars(3e-3, b1=0.9, clip=1.0)


@pytest.fixture(scope='module')
def tiny():
  return init(preset('tiny', vocab_size=50, width=32), jax.random.key(0))


def step_of(tiny, remat):
  """(a jitted step, its arguments) on a batch of pairs."""
  model, params = tiny
  optimizer = Optimizer('sgd')
  batch = Batches(random_pairs(8, seed=4), 8)[0]
  state = init_state(params, optimizer.init(SCALARS, params))
  step = make_step(model.replace(remat=remat), optimizer)
  return jax.jit(step), (state, batch, Hparams(sft(), SCALARS))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in REMAT if name != 'offload']


@pytest.mark.parametrize('remat', ['offload', *SLOW])
def test_what_is_computed_again_is_the_same(tiny, remat):
  step, arguments = step_of(tiny, None)
  expected, before = step(*arguments)
  step, arguments = step_of(tiny, remat)
  got, after = step(*arguments)
  np.testing.assert_allclose(after['loss'], before['loss'], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got.params, expected.params
  )


def test_offloading_leaves_no_layer_input_on_the_device(tiny):
  """What the backward pass reads of the layers' inputs is in the host's memory."""
  step, arguments = step_of(tiny, 'offload')
  tokens = sum(rows.tokens[0].size for rows in arguments[1].rows)
  config = tiny[0].config
  kept = f'f32<host>[{config.num_layers},1,{tokens},{config.width}]'
  assert kept in str(jax.make_jaxpr(step)(*arguments))
  step, arguments = step_of(tiny, 'full')
  assert '<host>' not in str(jax.make_jaxpr(step)(*arguments))


def test_what_is_computed_again_is_what_the_policy_says(tiny):
  """By the FLOPs of compiled gradients: all of a layer, or little but attention, or nothing."""
  model, params = tiny
  tokens = jnp.ones((1, 2, 64), jnp.int32)
  layout = mask_layout(tokens == 1)

  def flops(remat):
    loss = lambda p: jnp.sum(model.replace(remat=remat).hidden(p, tokens, layout))  # noqa: E731
    return costs.count(jax.jit(jax.grad(loss)).lower(params).compile().as_text()).flops

  none, dots, full = map(flops, (None, 'dots', 'full'))
  config = model.config
  keys = 64  # rows this short are one block, of all its keys
  attention = 4 * tokens.size * keys * config.num_heads * config.head_dim * config.num_layers
  projections = tokens.size * (model.flops_per_token(keys)) - attention
  assert none < full <= none + attention + projections
  assert none <= dots <= none + attention
  assert full - dots > 0.5 * projections  # a layer's last product is not needed again


@pytest.mark.parametrize('kind', ['plain', 'experts', 'adapters'])
def test_without_remat_no_product_is_computed_twice(kind, monkeypatch):
  """As many FLOPs as where all that a gradient reads is kept, in less memory."""
  mixed = {'num_experts': 4, 'experts_per_token': 2} if kind == 'experts' else {}
  model, params = init(preset('tiny', vocab_size=50, **mixed), jax.random.key(0))
  lora = Lora(rank=2, alpha=4.0)
  adapters = lora.init(params, jax.random.key(1))
  tokens = jnp.ones((1, 2, 64), jnp.int32)
  layout = mask_layout(tokens == 1)

  def compiled(model):
    def loss(trained):
      whole = lora.join(params, trained) if kind == 'adapters' else trained
      return jnp.sum(model.hidden(whole, tokens, layout))

    trained = adapters if kind == 'adapters' else params
    return jax.jit(jax.grad(loss)).lower(trained).compile()

  ours = compiled(model)
  monkeypatch.setattr(model_file, '_checkpoint', lambda remat: lambda layer: layer)
  everything = compiled(model.replace(temperature=2.0))  # or jit would remember the layers
  flops, most = (costs.count(x.as_text()).flops for x in (ours, everything))
  assert flops == most > 0
  used, all_of_it = (x.memory_analysis().temp_size_in_bytes for x in (ours, everything))
  assert used < 0.8 * all_of_it


def descend(optimizer, steps):
  """Optimizer states and parameters on the way down Σ (w - 1)² from 0, by its own gradient."""
  params = {'layers': {'up': {'w': jnp.zeros((2, 4, 8))}}}

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda w: 2 * (w - 1.0), params)
    updates, state = optimizer.transform(SCALARS, 0, params).update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  states, found = [optimizer.init(SCALARS, params)], [params]
  for _ in range(steps):
    params, state = step(params, states[-1])
    states.append(state)
    found.append(params)
  return states, [float(p['layers']['up']['w'].mean()) for p in found]


def floats(state):
  return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize('name', ['adamw', 'lion', 'sgd', 'adafactor'])
def test_moments_in_bfloat16_are_rounded_and_nothing_else(name):
  wide, positions = descend(Optimizer(name), 1)
  narrow, same = descend(Optimizer(name, dtype='bfloat16'), 1)
  for begun, before, after in zip(*map(floats, (narrow[0], wide[1], narrow[1])), strict=True):
    assert begun.dtype == after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after, before.astype(jnp.bfloat16))
  assert same == positions  # the first step reads moments of 0, which are exact


def test_moments_in_bfloat16_still_train():
  _, wide = descend(Optimizer('adamw'), 400)
  _, narrow = descend(Optimizer('adamw', dtype='bfloat16'), 400)
  assert wide[-1] > 0.8
  np.testing.assert_allclose(narrow[-1], wide[-1], rtol=0.02)


def test_a_dtype_of_moments_that_is_not_known():
  with pytest.raises(ValueError, match=r"one of .*'bfloat16'.* got 'float8'"):
    Optimizer(dtype='float8')


@pytest.mark.parametrize('cap', [None, 5.0])
def test_kept_logits_save_one_product_of_the_head(cap):
  """Forward, both cotangents and no second forward, for the same values and gradients."""
  model, params = init(preset('tiny', vocab_size=50, logit_cap=cap), jax.random.key(0))
  states = jax.random.normal(jax.random.key(1), (1, 64, model.config.width))
  targets = jnp.arange(64)[None] % 50

  def run(keep):
    def loss(params, states):
      kept = model.replace(keep_logits=keep)
      found = head(kept, params, states, targets, ('logps', 'entropy'), chunk=16)
      return jnp.sum(found['logps'] * targets + jnp.square(found['entropy']))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, states).compile()
    return compiled(params, states), costs.count(compiled.as_text()).flops

  (expected, more), (got, less) = run(False), run(True)
  product = 64 * model.head_flops_per_token
  assert (more, less) == (4 * product, 3 * product)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)
