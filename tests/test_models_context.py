"""Rows divided over `context`: the same fields and gradients, and a share of the memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import sharding
from jaxpref.data.batches import Batches, Packing
from jaxpref.log_probs import log_probs
from jaxpref.models import context, init, preset, row_attention
from jaxpref.models.context import Division
from jaxpref.typing import Layout
from tests.worlds import random_pairs

SHAPE = dict(vocab_size=50, width=32, num_layers=2, mlp_width=48)
CONFIGS = {
  'plain': preset('tiny', **SHAPE, num_heads=4, num_kv_heads=2),
  'windows, capped': preset('tiny', **SHAPE, windows=(5, None), attention_cap=2.0),
  'experts': preset('tiny', **SHAPE, num_experts=4, experts_per_token=2),
  'scores': preset('tiny', **SHAPE, num_labels=1),
}
FIELDS = {
  'experts': ('logps', 'router_picks', 'router_probs', 'router_tokens'),
  'scores': ('rewards', 'values'),
}
# 36, 52 and 96 are no multiples of twice the parts: rows are filled up.
DATA = random_pairs(8, seed=1)
BATCH = Batches(DATA, 8, seed=0, groups=2, packing=Packing(row_lengths=(36, 52, 96)))[0]
MICRO = jax.tree.map(lambda x: x[0], BATCH)


def on(mesh, call, params, micro):
  """`call` under jit with the groups on the mesh."""
  with jax.set_mesh(mesh):
    params = jax.device_put(params, sharding.params_sharding(mesh, params))
    over_groups = jax.NamedSharding(mesh, jax.P(sharding.GROUPS))
    return jax.device_get(jax.jit(call)(params, jax.device_put(micro, over_groups)))


def fields_and_gradients(model, fields, params, micro):
  def total(params):
    found = log_probs(model, params, micro, fields, chunk=16)
    waves = (jnp.sum(x * jnp.sin(jnp.arange(x.size)).reshape(x.shape)) for x in found.values())
    return sum(waves), found

  (_, found), grads = jax.value_and_grad(total, has_aux=True)(params)
  return found, grads


@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('windows, capped', {'data': 2, 'context': 2, 'tensor': 2}),
    pytest.param('windows, capped', {'data': 2, 'context': 4}, marks=pytest.mark.slow),
    pytest.param('plain', {'context': 8}, marks=pytest.mark.slow),
    pytest.param('plain', {'fsdp': 2, 'context': 2, 'tensor': 2}, marks=pytest.mark.slow),
    pytest.param('experts', {'data': 2, 'context': 4}, marks=pytest.mark.slow),
    pytest.param('scores', {'data': 2, 'context': 4}, marks=pytest.mark.slow),
  ],
)
def test_fields_and_gradients_are_those_of_whole_rows(name, sizes, monkeypatch):
  monkeypatch.setattr(context, 'BLOCK', 5)  # of queries: pieces have several
  model, params = init(CONFIGS[name], jax.random.key(0))
  call = functools.partial(fields_and_gradients, model, FIELDS.get(name, ('logps', 'entropy')))
  fields, grads = jax.device_get(jax.jit(call)(params, MICRO))
  found, theirs = on(sharding.make_mesh(sizes), call, params, MICRO)
  assert found.keys() == fields.keys()
  for field, values in fields.items():
    np.testing.assert_allclose(found[field], values, rtol=1e-5, atol=2e-5, err_msg=field)
  for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(
      b, a, atol=2e-5 * max(1e-3, np.abs(a).max()), err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize('block', [256, 4])
def test_rows_are_divided_and_put_together_again(block, monkeypatch):
  monkeypatch.setattr(context, 'BLOCK', block)
  division = Division(((3, 21), (2, 48)), 4)
  for _, length in division.rows:
    assert division.piece(length) % context._blocks(division.piece(length)) == 0
  rows = [jnp.arange(1, 2 * r * n + 1).reshape(2, r, n) for r, n in division.rows]
  divided = division.divide(rows)
  assert divided.shape[0] == 8
  for whole, again in zip(rows, division.unite(divided), strict=True):
    np.testing.assert_array_equal(whole, again)
  first = np.concatenate([x[0].reshape(-1) for x in rows])  # of group 0, end to end
  np.testing.assert_array_equal(divided[:4].reshape(-1)[division.places()], first)
  # Each device has an early piece and the late one that makes up for it.
  length = division.piece(48)
  np.testing.assert_array_equal(
    np.asarray(divided[1])[-2 * 2 * length :][: 2 * length],
    np.concatenate([rows[1][0, 0, length : 2 * length], rows[1][0, 0, 6 * length : 7 * length]]),
  )


L = 1024


@functools.cache
def compiled(parts):
  """The gradient of the log-probs of one row of L tokens, on `parts` devices, in blocks on each."""
  config = preset('tiny', vocab_size=50, width=16, num_layers=3, num_heads=2, mlp_width=24)
  model, params = init(config, jax.random.key(0))
  model = model.replace(attention=row_attention('blocked', 'tpu'))
  mesh = sharding.make_mesh({'context': parts}, jax.devices()[:parts])
  ids = jax.ShapeDtypeStruct((1, 1, L), jnp.int32)
  slots = jnp.arange(L // 2, dtype=jnp.int32)[None]
  with jax.set_mesh(mesh):

    def loss(params, tokens, layout):
      states, _ = model.states(params, (tokens,), (layout,))
      return jnp.sum(jnp.square(states.at(slots + L // 2)))

    return jax.jit(jax.grad(loss)).lower(params, ids, Layout(ids, ids, ids)).compile()


def test_activations_of_a_device_fall_with_the_axis():
  one, four = (compiled(n).memory_analysis().temp_size_in_bytes for n in (1, 4))
  assert four < 0.4 * one


def test_no_device_holds_all_scores_or_states_of_a_row():
  """Keys are whole, [.., L, head_dim = 8]; nothing as wide as a state (16) or a row is."""
  shapes = [
    [int(n) for n in dims.split(',')]
    for dims in re.findall(r'(?:f32|pred|s32|bf16)\[([\d,]+)\]', compiled(4).as_text())
  ]
  assert any(shape[-2:] == [L, 8] for shape in shapes)
  for shape in shapes:
    assert shape.count(L) < 2 and not (L in shape and {16, 24} & set(shape)), shape
