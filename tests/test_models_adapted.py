"""A user's own flax module does what a decoder does: packed rows, log-probs, gradients,
sampling."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpref.models import adapt, mask_layout
from jaxpref.sampling import Sampling, sample
from jaxpref.typing import Layout

V, D, P = 19, 8, 16


def look(q, k, v, mask):
  scores = jnp.where(mask, jnp.einsum('nqd,nkd->nqk', q, k), -1e9)
  return jnp.einsum('nqk,nkd->nqd', jax.nn.softmax(scores), v)


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.embed, self.places = nnx.Embed(V, D, rngs=rngs), nnx.Embed(P, D, rngs=rngs)
    self.qkv, self.out = nnx.Linear(D, 3 * D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)

  def trunk(self, tokens, positions, mask):
    x = self.embed(tokens) + self.places(positions)
    return x + look(*jnp.split(self.qkv(x), 3, axis=-1), mask)

  def head(self, states):
    return self.out(states)


class Linen(flax.linen.Module):
  def setup(self):
    self.embed, self.places = flax.linen.Embed(V, D), flax.linen.Embed(P, D)
    self.qkv, self.out = flax.linen.Dense(3 * D), flax.linen.Dense(V)

  def trunk(self, tokens, positions, mask):
    x = self.embed(tokens) + self.places(positions)
    return x + look(*jnp.split(self.qkv(x), 3, axis=-1), mask)

  def head(self, states):
    return self.out(states)

  def __call__(self, tokens, positions, mask):
    return self.head(self.trunk(tokens, positions, mask))


def adapted(kind):
  sizes = dict(vocab_size=V, width=D, max_positions=P)
  if kind == 'nnx':
    return adapt(Nnx(nnx.Rngs(0)), hidden=Nnx.trunk, unembed=Nnx.head, **sizes)
  module, row = Linen(), jnp.zeros((1, 2), jnp.int32)
  variables = module.init(jax.random.key(0), row, row, jnp.ones((1, 2, 2), bool))
  return adapt(module, variables, hidden=Linen.trunk, unembed=Linen.head, **sizes)


EVERY = pytest.mark.parametrize('kind', ['nnx', 'linen'])


@EVERY
def test_packed_branches_are_what_they_are_alone(kind):
  model, params = adapted(kind)
  # A prompt of 2 with branches of 2 and 1, then another example and padding.
  layout = Layout(*(jnp.array([x]) for x in (
    [0, 1, 2, 3, 2, 0, 1, 0], [1, 1, 1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 2, 0, 1, 0],
  )))  # fmt: skip
  tokens = jnp.array([[5, 6, 7, 8, 9, 10, 11, 0]])
  states = jax.jit(model.hidden)(params, tokens, layout)
  for where in ([0, 1, 2, 3], [0, 1, 4], [5, 6]):
    row = tokens[:, jnp.array(where)]
    alone = model.hidden(params, row, mask_layout(row > 0))
    np.testing.assert_allclose(states[:, jnp.array(where)], alone, rtol=1e-5, atol=1e-5)
  groups = jax.tree.map(lambda x: jnp.stack([x, x]), (tokens, layout))  # [G, R, L]
  short = jax.tree.map(lambda x: x[..., :4], groups)
  several = model.hidden(params, (groups[0], short[0]), (groups[1], short[1]))
  assert [x.shape for x in several] == [(2, 1, 8, D), (2, 1, 4, D)]
  np.testing.assert_allclose(several[0][1], states, rtol=1e-5, atol=1e-5)


@EVERY
def test_parameters_are_a_plain_tree_with_gradients(kind):
  model, params = adapted(kind)
  tokens = jnp.array([[3, 1, 4, 1, 5]])

  @jax.jit
  def loss(params):
    logps = jax.nn.log_softmax(model.logits(params, tokens, tokens > 0))
    return -logps[:, :-1, 3].mean()

  grads = jax.grad(loss)(params)
  assert type(params) is dict and jax.tree.structure(grads) == jax.tree.structure(params)
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
  assert hash(model) == hash(model.replace()) and model == model.replace()


@EVERY
def test_the_sampler_takes_it(kind):
  model, params = adapted(kind)
  prompts = jnp.array([[0, 0, 3, 4], [5, 6, 7, 8]])
  greedy = Sampling(temperature=0.0)
  got = sample(model, params, prompts, prompts > 0, seed=0, max_new_tokens=5, sampling=greedy)
  rows = [[3, 4], [5, 6, 7, 8]]
  for row, new in zip(rows, np.asarray(got.tokens), strict=True):
    for token in new:
      tokens = jnp.array([row + [0] * (9 - len(row))])
      real = jnp.arange(9)[None] < len(row)
      logits = model.logits(params, tokens, real)[0, len(row) - 1]
      assert token == int(logits.argmax())
      row.append(int(token))


def test_what_is_no_module_of_parameters_is_refused():
  functions = dict(hidden=Nnx.trunk, unembed=Nnx.head, vocab_size=V, width=D)
  with pytest.raises(TypeError, match=r'expected a flax\.nnx or flax\.linen module, got dict'):
    adapt({}, **functions)
  with pytest.raises(TypeError, match='comes with its variables'):
    adapt(Linen(), **functions)
  with pytest.raises(ValueError, match='more than parameters: batch_stats'):
    adapt(Linen(), {'params': {}, 'batch_stats': {}}, **functions)
  module = Nnx(nnx.Rngs(0))
  module.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match='more than parameters: drop/'):
    adapt(module, **functions)
