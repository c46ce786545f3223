"""Adapters: the same function as one merged weight, gradients by the chain rule, a tree apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import Lora, LoraWeight, init, linear, merged, preset, without
from jaxpref.models.lora import TARGETS
from jaxpref.sharding import make_mesh, params_sharding

LORA = Lora(rank=3, alpha=6.0)
KINDS = {
  'dense': dict(qkv_bias=True),
  'experts': dict(num_experts=4, experts_per_token=2),
}
TOKENS = jax.random.randint(jax.random.key(9), (2, 7), 0, 31)


def made(kind, lora=LORA, seed=1):
  """(model, parameters, adapters that add something)."""
  config = preset('tiny', vocab_size=31, width=16, num_layers=1, mlp_width=12, **KINDS[kind])
  model, params = init(config, jax.random.key(0))
  adapters = lora.init(params, jax.random.key(seed))
  drawn = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
  return model, params, jax.tree.map(drawn, adapters)


def loss(model, params):
  logits = model.logits(params, TOKENS, jnp.ones(TOKENS.shape, bool))
  return jnp.mean(jnp.sin(logits + logits**2))


@pytest.mark.parametrize('kind', KINDS)
def test_adapters_do_what_one_merged_weight_does(kind):
  model, params, adapters = made(kind)
  joined = LORA.join(params, adapters)
  one = merged(joined)
  assert jax.tree.structure(one) == jax.tree.structure(params)
  ones = jnp.ones(TOKENS.shape, bool)
  logits = model.logits(joined, TOKENS, ones)
  np.testing.assert_allclose(logits, model.logits(one, TOKENS, ones), rtol=2e-4, atol=2e-5)
  assert np.abs(logits - model.logits(params, TOKENS, ones)).max() > 0.01


def test_a_merged_weight_is_w_plus_alpha_over_r_times_the_product():
  rng = np.random.default_rng(0)
  w, a, b = (rng.normal(size=shape) for shape in ((2, 5, 4), (2, 5, 3), (2, 3, 4)))
  expected = np.stack([w[i] + 6.0 / 3 * a[i] @ b[i] for i in range(2)])
  found = merged({'w': LoraWeight(*map(jnp.float32, (w, a, b)), LORA.alpha / LORA.rank)})['w']
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  x = rng.normal(size=(3, 5))
  got = linear(jnp.float32(x), LoraWeight(*(jnp.float32(part[1]) for part in (w, a, b)), 2.0))
  np.testing.assert_allclose(got, x @ expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_the_merged_weights_by_the_chain_rule(kind):
  model, params, adapters = made(kind)
  grads = jax.grad(lambda x: loss(model, LORA.join(params, x)))(adapters)
  whole = jax.grad(lambda x: loss(model, x))(merged(LORA.join(params, adapters)))
  for path, found in jax.tree.leaves_with_path(grads):
    names = [key.key for key in path]
    g, own = whole, adapters
    for name in names[:-1]:
      g, own = g[name], own[name]
    if names[-1] == 'lora_a':  # dA = (α / r) g Bᵀ
      expected = 2.0 * g @ own['lora_b'].swapaxes(-1, -2)
    else:  # dB = (α / r) Aᵀ g
      expected = 2.0 * own['lora_a'].swapaxes(-1, -2) @ g
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=2e-4 * scale, err_msg=str(names))


def test_at_first_they_change_nothing_and_are_where_they_are_asked_for():
  model, params, _ = made('dense')
  lora = Lora(rank=2, targets=('q', 'down'))
  adapters = lora.init(params, jax.random.key(0))
  layers = adapters['layers']
  assert set(layers) == {'attention', 'mlp'}
  assert set(layers['attention']) == {'q'} and set(layers['mlp']) == {'down'}
  assert jax.tree.map(jnp.shape, layers['mlp']['down']['w']) == {
    'lora_a': (1, 12, 2),
    'lora_b': (1, 2, 16),
  }
  joined = lora.join(params, adapters)
  assert loss(model, joined) == loss(model, params)
  assert without(params) is None
  jax.tree.map(np.testing.assert_array_equal, without(joined), params)


def test_rows_of_a_draw_have_the_variance_of_the_usual_one():
  draw = Lora(rank=64, targets=('q',)).init({'layers': {'q': {'w': jnp.zeros((96, 80))}}}, KEY)
  std = float(jnp.std(draw['layers']['q']['w']['lora_a']))
  assert std == pytest.approx((3 * 96) ** -0.5, rel=0.05)  # U(-1/√I, 1/√I), 6144 draws


KEY = jax.random.key(3)


def test_every_adapter_has_its_place_on_a_mesh():
  _, params, adapters = made('experts')
  mesh = make_mesh({'fsdp': 4, 'tensor': 2}, jax.devices()[:8])
  joined = params_sharding(mesh, LORA.join(params, adapters))
  for name in TARGETS:
    part = joined['layers']['attention' if name in ('q', 'k', 'v', 'out') else 'mlp']
    part = part.get('experts', part)[name]['w']
    base, a, b = part.base.spec, part.lora_a.spec, part.lora_b.spec
    rank = len(base)
    assert a[-2] == base[-2] and b[-1] == base[-1], name
    assert len(a) == len(b) == rank and a[-1] is None and b[-2] is None


@pytest.mark.parametrize(
  ('lora', 'message'),
  [
    (lambda: Lora(rank=0), 'rank of 1 or more'),
    (lambda: Lora(rank=2, targets=('q_proj',)), r"projections of \('q', .*got targets \('q_proj'"),
    (lambda: Lora(rank=2, targets=()), 'got targets'),
    (
      lambda: Lora(rank=13).init(made('dense')[1], KEY),
      'rank 13 is more than .* 16 by 8',
    ),
    (lambda: Lora(rank=2).init({'embed': {'w': jnp.ones((2, 2))}}, KEY), 'no layers with any'),
  ],
)
def test_mistakes_are_named(lora, message):
  with pytest.raises(ValueError, match=message):
    lora()
