"""The decoder's properties, for configs that together move every field: causality by gradient,
packed rows, cache, remat, jit and dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpref.models import LinearScaling, LongScaling, Model, Rope, init, mask_layout, preset
from jaxpref.typing import Layout

SMALL = functools.partial(preset, 'tiny', vocab_size=31, width=16, mlp_width=24, max_positions=64)
CONFIGS = {
  'llama': SMALL(rope=Rope.llama3(theta=100.0, factor=4.0, original_max_positions=16)),
  'gpt2': SMALL(
    rope=None,
    norm='layer',
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation='gelu_tanh',
    num_kv_heads=4,
  ),
  'qwen3': SMALL(qk_norm=True, head_dim=6, windows=(None, 3), tied=False),
  'gemma': SMALL(
    norm_placement='both',
    norm_offset=1.0,
    windows=(3, None),
    rope=Rope(900.0, LinearScaling(2.0)),
    local_rope=Rope(20.0),
    query_scalar=3.0,
    attention_cap=1.5,
    logit_cap=2.0,
    embed_scale=4.0,
    activation='gelu',
  ),
  'olmo': SMALL(
    norm_placement='post',
    qk_norm=True,
    qk_norm_span='all',
    activation='relu',
    windows=(2, 4),
    head_dim=8,
    rope=Rope(50.0, LongScaling((1.0, 2.0), (3.0, 4.0), 32, 1.2), fraction=0.5),
  ),
  'experts': SMALL(num_experts=5, experts_per_token=2, normalize_experts=True),
}
EVERY = pytest.mark.parametrize('name', CONFIGS)
TOLERANCE = dict(rtol=2e-5, atol=2e-5)


@functools.cache
def made(name):
  """The model, and parameters of which none is neutral: no scale 1, no bias 0."""
  model, random = Model(CONFIGS[name]), np.random.default_rng(0)

  def draw(path, leaf):
    x = random.standard_normal(leaf.shape, np.float32)
    x = x * leaf.shape[-2] ** -0.5 if path[-1].key == 'w' else 0.3 * x
    return jnp.array(x + (path[-1].key == 'scale'))

  return model, jax.tree.map_with_path(draw, model.param_shapes())


def packed():
  """One row of 16: example 1 with a prompt of 3 and branches of 4 and 2, example 2 with a prompt of
  2 and a branch of 3, padding of 2."""
  examples = [1] * 9 + [2] * 5 + [0] * 2
  branches = [0, 0, 0, 1, 1, 1, 1, 2, 2, 0, 0, 1, 1, 1, 0, 0]
  positions = [0, 1, 2, 3, 4, 5, 6, 3, 4, 0, 1, 2, 3, 4, 0, 0]
  tokens = np.random.default_rng(0).integers(0, 31, 16)
  row = (np.array(x, np.int32)[None] for x in (positions, examples, branches))
  return jnp.array(tokens[None], jnp.int32), Layout(*map(jnp.array, row))


def alone(tokens, layout, example, branch):
  """The prompt and one branch of a packed example as a row of their own, and where they stood."""
  own = (layout.examples[0] == example) & (
    (layout.branches[0] == 0) | (layout.branches[0] == branch)
  )
  where = np.flatnonzero(own)
  return tokens[:, where], where


@EVERY
def test_a_packed_branch_is_the_same_as_alone(name):
  model, params = made(name)
  tokens, layout = packed()
  states = model.hidden(params, tokens, layout)
  for example, branch in ((1, 1), (1, 2), (2, 1)):
    row, where = alone(tokens, layout, example, branch)
    row = np.pad(row, ((0, 0), (0, 16 - row.shape[1])))
    expected = model.hidden(params, row, mask_layout(jnp.arange(16)[None] < where.size))
    np.testing.assert_allclose(states[:, where], expected[:, : where.size], **TOLERANCE)


@EVERY
def test_a_state_depends_on_what_it_may_see_and_on_nothing_else(name):
  model, params = made(name)
  tokens, layout = packed()
  # A table with a row for every place, so that its gradient tells places apart.
  table = params['embed']['w'][tokens[0]]
  direction = jnp.sin(jnp.arange(model.config.width))

  def states(table):
    places = {**params, 'embed': {'w': table}}
    return model.hidden(places, jnp.arange(16)[None], layout)[0] @ direction

  def pulled(table):  # row by row: jax's ragged products cannot be mapped over
    back = jax.vjp(states, table)[1]
    return jax.lax.map(lambda row: back(row)[0], jnp.eye(16))

  moved = np.abs(np.asarray(jax.jit(pulled)(table))).sum(-1)  # [query, key]
  positions, examples, branches = (np.asarray(x[0]) for x in layout)
  query, key = np.arange(16)[:, None], np.arange(16)[None]
  seen = (key <= query) & (examples[key] == examples[query]) & (examples[query] != 0)
  seen &= (branches[key] == 0) | (branches[key] == branches[query])
  real = examples != 0
  assert np.all(moved[real][~seen[real]] == 0)
  if model.config.windows is None:
    assert np.all(moved[real][seen[real]] > 0)
  else:  # Two layers of windows reach as far as their sum.
    reach = sum((w or 64) - 1 for w in model.config.windows)
    near = positions[query] - positions[key] <= reach
    assert np.all(moved[real][(seen & near)[real]] > 0)
    assert np.all(moved[real][(seen & ~near)[real]] == 0)


@EVERY
def test_rows_of_several_lengths_are_the_same_as_single_rows(name):
  model, params = made(name)
  tokens, layout = packed()
  pairs = [(tokens, layout), jax.tree.map(lambda x: jnp.flip(x, 0), (tokens, layout))]
  long = jax.tree.map(lambda *x: jnp.stack(x)[:, :], *pairs)  # [G=2, R=1, 16]
  short = jax.tree.map(lambda x: jnp.concatenate([x[..., :9], x[..., :9]], axis=1), long)
  short = (jnp.flip(short[0], -2), short[1])  # other tokens in the same places
  states = model.hidden(params, (long[0], short[0]), (long[1], short[1]))
  assert [x.shape for x in states] == [(2, 1, 16, 16), (2, 2, 9, 16)]
  for got, (part, part_layout) in zip(states, (long, short), strict=True):
    np.testing.assert_allclose(got, model.hidden(params, part, part_layout), **TOLERANCE)
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (part, part_layout))
    rows = model.hidden(params, *flat).reshape(got.shape)
    np.testing.assert_allclose(got, rows, **TOLERANCE)


@EVERY
@pytest.mark.parametrize('side', ['left', 'right'])
def test_cached_decoding_is_the_full_forward_at_every_step(name, side):
  model, params = made(name)
  lengths, prompt, steps = jnp.array([5, 3, 1]), 5, 6
  place = jnp.arange(prompt)[None]
  mask = place < lengths[:, None] if side == 'right' else place >= prompt - lengths[:, None]
  tokens = jnp.array(np.random.default_rng(3).integers(0, 31, mask.shape), jnp.int32)
  cache = model.init_cache(3, prompt + steps)
  layout = mask_layout(mask)
  states, cache = model.hidden(params, tokens, layout, cache)
  last = prompt - 1 if side == 'left' else lengths - 1
  state = states[jnp.arange(3), last]
  for step in range(steps):
    # The whole sequences so far, without padding between prompt and answer.
    whole = [
      jnp.concatenate([tokens[b, :prompt][mask[b, :prompt]], tokens[b, prompt:]]) for b in range(3)
    ]
    size = prompt + steps
    padded = jnp.stack([jnp.pad(row, (0, size - row.size)) for row in whole])
    real = jnp.arange(size)[None] < (lengths + step)[:, None]
    expected = model.logits(params, padded, real)[jnp.arange(3), lengths + step - 1]
    logits = model.unembed(params, state)
    np.testing.assert_allclose(logits, expected, **TOLERANCE)
    token = jnp.argmax(logits, axis=-1)[:, None]
    np.testing.assert_array_equal(token[:, 0], jnp.argmax(expected, axis=-1))
    tokens = jnp.concatenate([tokens, token], axis=1)
    one = Layout((lengths + step)[:, None], *(jnp.full((3, 1), x) for x in (1, 0)))
    state, cache = model.hidden(params, token, one, cache)
    state = state[:, 0]
  assert int(cache.fill) == prompt + steps


@EVERY
def test_both_padding_sides_and_none_agree(name):
  model, params = made(name)
  tokens = jnp.array([[3, 1, 4, 1, 5, 9]])
  plain = model.logits(params, tokens, jnp.ones((1, 6), bool))
  zeros = jnp.zeros((1, 3), jnp.int32)
  for parts, start in (((zeros, tokens), 3), ((tokens, zeros), 0)):
    mask = jnp.concatenate([part if part is zeros else part * 0 + 1 for part in parts], 1) > 0
    logits = model.logits(params, jnp.concatenate(parts, axis=1), mask)
    assert logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())
    np.testing.assert_allclose(logits[:, start : start + 6], plain, **TOLERANCE)


def size_of(x):
  return float(jnp.abs(x).max())


@pytest.mark.parametrize('name', ['gpt2', 'qwen3'])
def test_remat_and_jit_change_nothing(name):
  model, params = made(name)
  tokens, layout = packed()

  def loss(model, params):
    return jnp.sum(jnp.square(model.unembed(params, model.hidden(params, tokens, layout))))

  grad = jax.value_and_grad(loss, argnums=1)
  expected = grad(model, params)  # the loss outside of jit
  same = functools.partial(
    np.testing.assert_allclose, rtol=0, atol=1e-6 * max(map(size_of, jax.tree.leaves(expected)))
  )
  for remat in (None, 'full', 'offload', 'dots'):
    got = jax.jit(grad, static_argnums=0)(model.replace(remat=remat), params)
    jax.tree.map(same, got, expected)


@EVERY
def test_every_parameter_matters(name):
  model, params = made(name)
  tokens, layout = packed()

  def total(params):
    logits = model.unembed(params, model.hidden(params, tokens, layout))
    return jnp.sum(jnp.sin(logits))

  for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(total))(params)):
    where = '/'.join(key.key for key in path)
    # Without rope a key's bias adds the same to all scores of a query: nothing, by the softmax.
    if where != 'layers/attention/k/b':
      assert size_of(grad) > 1e-6, where


def test_bfloat16_compute_keeps_float32_masters_and_logits():
  model, params = made('llama')
  tokens, layout = packed()
  low = model.replace(dtype=jnp.bfloat16)
  states = low.hidden(params, tokens, layout)
  logits = low.unembed(params, states)
  assert states.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  expected = model.unembed(params, model.hidden(params, tokens, layout))
  assert float(jnp.abs(logits - expected).max()) < 0.1 * float(jnp.abs(expected).max())
  stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  states = model.hidden(stored, tokens, layout)
  assert states.dtype == jnp.float32
  grads = jax.grad(lambda p: low.hidden(p, tokens, layout).astype(jnp.float32).sum())(params)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))


def test_init_is_a_function_of_its_key_and_starts_near_uniform():
  model, params = init(preset('tiny'), jax.random.key(7))
  again = init(preset('tiny'), jax.random.key(7))[1]
  other = init(preset('tiny'), jax.random.key(8))[1]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
  assert not bool((params['embed']['w'] == other['embed']['w']).all())
  q = params['layers']['attention']['q']['w']
  assert not bool((q[0] == q[1]).all())
  tokens = jnp.arange(40)[None]
  logps = jax.nn.log_softmax(model.logits(params, tokens, tokens >= 0))
  assert abs(-float(logps.mean()) - np.log(259)) < 0.2
  assert init(preset('tiny'), jax.random.key(7), jnp.bfloat16)[1]['embed']['w'].dtype == 'bfloat16'


def test_a_full_cache_and_wrong_shapes_are_refused():
  model, params = made('llama')
  tokens, layout = packed()
  with pytest.raises(ValueError, match='8 slots, 0 in use: no room for 16 more'):
    model.hidden(params, tokens, layout, model.init_cache(1, 8))
  _, cache = model.hidden(params, tokens, layout, model.init_cache(1, 20))
  with pytest.raises(ValueError, match='20 slots, 16 in use'):
    model.hidden(params, tokens, layout, cache)
  with pytest.raises(ValueError, match=r'got tokens \(1, 15\), layout \(\(1, 16\)'):
    model.hidden(params, tokens[:, :15], layout)


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_a_token_or_learned_position_out_of_range_is_not_silent(name):
  model, params = made(name)
  tokens = jnp.array([[1, 2, 31]])
  assert bool(jnp.isnan(model.logits(params, tokens, tokens > 0)[0, 2]).all())
  if name == 'gpt2':
    long = jnp.ones((1, 65), jnp.int32)
    assert bool(jnp.isnan(model.logits(params, long, long > 0)[0, 64]).all())


def test_groups_on_different_devices_do_not_talk():
  model, params = made('qwen3')
  tokens, layout = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, 2, 16)), packed())
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  apart = NamedSharding(mesh, PartitionSpec('data'))
  rows = jax.device_put((tokens, tokens[:, :1, :8]), apart)
  layouts = jax.device_put((layout, jax.tree.map(lambda x: x[:, :1, :8], layout)), apart)
  everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  with jax.set_mesh(mesh):
    compiled = jax.jit(model.hidden).lower(everywhere, rows, layouts).compile()
  text = compiled.as_text()
  for collective in ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text
  states = compiled(everywhere, rows, layouts)
  assert [x.sharding.spec[0] for x in states] == ['data', 'data']
