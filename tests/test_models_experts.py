"""Mixtures of experts: the sum of what each token's router picks, and how even the picks are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpref.models import Model, Routing, init, mask_layout, preset
from jaxpref.models.decoder import Block
from jaxpref.sharding import make_mesh, params_sharding

CONFIG = preset(
  'tiny', vocab_size=31, width=8, num_heads=2, num_kv_heads=2, mlp_width=6, num_layers=1,
  num_experts=5, experts_per_token=2,
)  # fmt: skip


def mixture(params, x, *, picked, normalize):
  """The definition, one token and one expert at a time."""
  mlp = jax.tree.map(lambda w: np.asarray(w[0], np.float64), params['layers']['mlp'])
  out = np.zeros(x.shape)
  for s, token in enumerate(x):
    logits = token @ mlp['router']['w']
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    best = np.argsort(-probs)[:picked]
    weights = probs[best] / (probs[best].sum() if normalize else 1.0)
    for weight, e in zip(weights, best, strict=True):
      gate, up, down = (mlp['experts'][name]['w'][e] for name in ('gate', 'up', 'down'))
      inner = token @ gate
      out[s] += weight * ((inner / (1 + np.exp(-inner)) * (token @ up)) @ down)
  return out


@pytest.mark.parametrize(('picked', 'normalize'), [(1, False), (2, True), (5, False)])
def test_a_mixture_is_the_weighted_sum_of_what_its_router_picks(picked, normalize):
  config = preset(
    'tiny', width=8, num_heads=2, mlp_width=6, num_layers=1, num_experts=5,
    experts_per_token=picked, normalize_experts=normalize,
  )  # fmt: skip
  params = init(config, jax.random.key(0))[1]
  block = Block(config, jax.random.key(0))
  block_params = jax.tree.map(lambda w: w[0], params['layers'])
  nnx.update(block, block_params)
  x = jax.random.normal(jax.random.key(1), (2, 7, 8))
  got = jax.jit(lambda x: block.mlp(x, jnp.ones((2, 7), bool))[0])(x)
  for group in range(2):
    expected = mixture(params, np.asarray(x[group]), picked=picked, normalize=normalize)
    np.testing.assert_allclose(got[group], expected, rtol=1e-4, atol=1e-5)


def test_balance_is_least_when_picks_are_even():
  even = Routing(jnp.full((2, 1, 4), 3.0), jnp.full((2, 1, 4), 1.5), jnp.full((2, 1), 6.0))
  assert float(even.balance()) == pytest.approx(2.0)  # 4 experts · 4 · (1/2 · 1/4) = 2 = k
  one = even._replace(
    picks=jnp.zeros((2, 1, 4)).at[..., :2].set(6.0), probs=jnp.zeros((2, 1, 4)).at[..., 0].set(6.0)
  )
  assert float(one.balance()) == pytest.approx(4.0)  # every token picks experts 0 and 1, sure of 0
  nothing = jax.tree.map(jnp.zeros_like, even)
  assert float(nothing.balance()) == 0.0


def test_routing_counts_real_tokens_and_adds_over_rows():
  model, params = init(CONFIG, jax.random.key(0))
  tokens = jnp.array(np.random.default_rng(0).integers(1, 31, (3, 9)), jnp.int32)
  mask = jnp.arange(9)[None] < jnp.array([9, 4, 6])[:, None]
  states, routing = model.hidden_with_aux(params, tokens, mask_layout(mask))
  np.testing.assert_array_equal(states, model.hidden(params, tokens, mask_layout(mask)))
  assert float(routing.tokens.sum()) == 19 and float(routing.picks.sum()) == 38
  assert float(routing.probs.sum()) == pytest.approx(19, rel=1e-5)
  parts = [
    model.hidden_with_aux(params, tokens[i : i + 1], mask_layout(mask[i : i + 1]))[1]
    for i in range(3)
  ]
  added = jax.tree.map(lambda *x: sum(x), *parts)
  np.testing.assert_allclose(added.balance(), routing.balance(), rtol=1e-5)
  grads = jax.grad(lambda p: model.hidden_with_aux(p, tokens, mask_layout(mask))[1].balance())(
    params
  )
  router = grads['layers']['mlp'].pop('router')['w']
  assert float(jnp.abs(router).max()) > 1e-4
  assert float(jnp.abs(grads['layers']['mlp']['experts']['down']['w']).max()) == 0
  dense, params = init(preset('tiny', vocab_size=31), jax.random.key(0))
  assert dense.hidden_with_aux(params, tokens, mask_layout(mask))[1] is None


def test_groups_of_tokens_are_routed_on_their_own_device():
  model, params = init(CONFIG, jax.random.key(0))
  tokens = jnp.array(np.random.default_rng(0).integers(1, 31, (8, 2, 6)), jnp.int32)
  layout = mask_layout(tokens > 0)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  apart = NamedSharding(mesh, PartitionSpec('data'))
  arguments = (
    jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
    *jax.device_put((tokens, layout), apart),
  )
  with jax.set_mesh(mesh):
    compiled = jax.jit(model.hidden_with_aux).lower(*arguments).compile()
  text = compiled.as_text()
  for collective in ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text
  states, routing = compiled(*arguments)
  expected, alone = model.hidden_with_aux(
    params, tokens.reshape(16, 6), jax.tree.map(lambda x: x.reshape(16, 6), layout)
  )
  np.testing.assert_allclose(states.reshape(16, 6, -1), expected, rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(routing.balance(), alone.balance(), rtol=1e-5)


def test_experts_are_sharded_by_their_own_rules():
  shapes = Model(preset('qwen3-30b-a3b')).param_shapes()
  mesh = make_mesh({'fsdp': 4, 'tensor': 2})
  mlp = params_sharding(mesh, shapes)['layers']['mlp']
  assert mlp['experts']['up']['w'].spec == PartitionSpec(None, None, 'fsdp', 'tensor')
  assert mlp['experts']['down']['w'].spec == PartitionSpec(None, None, 'tensor', 'fsdp')
  assert mlp['router']['w'].spec[:2] == (None, 'fsdp')
