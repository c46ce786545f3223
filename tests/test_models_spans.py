"""Attention in spans: values and gradients of dense attention, and strangers cost nothing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import spans
from jaxpref.models.blocked import ByRows, Form
from jaxpref.models.spans import attend, joined, widths
from jaxpref.sharding import make_mesh
from jaxpref.typing import Layout
from tests.attentions import WIDTH, dense, drawn

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def packed(lengths, groups: int = 2, longest: int = 40):
  """Rows of these lengths, one of each in every group, end to end: q, k, v, given and layouts."""
  arrays, layouts = [], []
  for length in lengths:
    found, layout = drawn(length, length, groups, longest)
    arrays.append([x.swapaxes(1, 2) for x in found])
    layouts.append(jax.tree.map(lambda x: x[:, None], layout))
  return [jnp.concatenate(x, axis=1) for x in zip(*arrays, strict=True)], tuple(layouts)


def results(how, arrays, layouts, window=None, limit=None):
  q, k, v, given = arrays
  examples = jnp.concatenate([x.examples.reshape(len(q), -1) for x in layouts], axis=1)

  def weighted(q, k, v):
    # Dense attention gives padding something, which is of no use.
    out = (
      how(Form(float(WIDTH), limit), q, k, v, layouts, window) * (examples > 0)[:, :, None, None]
    )
    return jnp.sum(out * given), out

  return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize(
  ('lengths', 'longest', 'window', 'limit'),
  [
    ((7,), 4, None, None),
    ((70, 200), 40, 9, 2.0),
    ((128, 320), 150, None, 2.0),
    ((330,), 150, 50, None),
  ],
)
def test_values_and_gradients_are_those_of_dense_attention(lengths, longest, window, limit):
  arrays, layouts = packed(lengths, longest=longest)
  window = None if window is None else jnp.int32(window)
  ours, theirs = (results(how, arrays, layouts, window, limit) for how in (attend, ByRows(dense)))
  jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize(
  'sizes',
  [{'fsdp': 4, 'tensor': 2}, pytest.param({'data': 2, 'tensor': 4}, marks=pytest.mark.slow)],
)
def test_on_a_mesh_no_device_needs_anothers(sizes):
  """Groups and heads stay; two key heads over four devices are repeated, their gradients added."""
  arrays, layouts = packed((130,), groups=4)
  alone = results(ByRows(dense), arrays, layouts)
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    jax.tree.map(close, results(attend, arrays, layouts), alone)
    tokens = jax.NamedSharding(
      mesh, jax.P(('data', 'fsdp'), None, 'tensor' if sizes['tensor'] == 2 else None)
    )
    rows = jax.NamedSharding(mesh, jax.P(('data', 'fsdp')))
    arrays, layouts = jax.device_put(arrays, tokens), jax.device_put(layouts, rows)
    forward = jax.jit(functools.partial(attend, Form(8.0)))
    text = forward.lower(*arrays[:3], layouts, None).compile().as_text()
  assert not any(kind in text for kind in ('all-gather', 'all-reduce', 'all-to-all', 'permute'))


def test_it_maps_over_queries_and_over_layouts():
  arrays, layouts = packed((130,), groups=3)
  q, k, v, _ = arrays
  apart = jax.tree.map(lambda x: x[:, None], (q, k, v, layouts))
  one = functools.partial(attend, Form(8.0))
  mapped = jax.jit(jax.vmap(lambda *x: one(*x, None)))(*apart)
  close(mapped[:, 0], jax.jit(one)(q, k, v, layouts, None))


def test_padding_gets_nothing_and_gives_nothing():
  (q, k, v, given), layouts = packed((70,))
  padding = (layouts[0].examples == 0).reshape(2, -1, 1, 1)
  assert bool(padding.any())
  one = jax.jit(functools.partial(attend, Form(8.0)))
  out, pull = jax.vjp(lambda *x: one(*x, layouts, None), q, k, v)
  np.testing.assert_array_equal(np.where(padding, out, 0), 0)
  for cotangent in pull(given * padding):
    np.testing.assert_array_equal(cotangent, 0)


def test_an_example_of_nan_breaks_no_other():
  (q, k, v, _), layouts = packed((70, 200))
  examples = jnp.concatenate([x.examples.reshape(2, -1) for x in layouts], axis=1)
  row = jnp.arange(270)[None] >= 70
  broken = ((examples == examples[:, 100:101]) & row & (examples > 0))[..., None, None]
  assert bool(broken.any(1).all())
  one = jax.jit(lambda q, k, v: attend(Form(8.0), q, k, v, layouts, None))
  found = one(*(jnp.where(broken, jnp.nan, x) for x in (q, k, v)))
  np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(broken, found.shape))
  np.testing.assert_array_equal(np.where(broken, 0, found), np.where(broken, 0, one(q, k, v)))


def test_a_block_turns_in_the_narrowest_loop_that_holds_what_it_needs(monkeypatch):
  """Five rows' worth of 512 tokens: 64 alone, 320 of one prompt, 64 alone, 64 of padding."""
  turned = []

  def record(carry, seen, own, keys):
    jax.debug.callback(
      lambda at, start: turned.append((int(at), int(start), keys[1])), own[0], keys[0]
    )
    return carry + seen.sum()

  examples = jnp.asarray(np.repeat([3, 1, 2, 0], [64, 320, 64, 64])[None, None], jnp.int32)
  positions = jnp.arange(512, dtype=jnp.int32)[None, None]
  layouts = (Layout(positions, examples, jnp.zeros_like(examples)),)
  seen = jax.jit(lambda: spans._over_blocks(record, jnp.int32(0), layouts, None))()
  jax.effects_barrier()
  assert sorted(turned) == [
    (0, 0, 128), (64, 0, 128), (128, 64, 128), (192, 64, 192), (256, 64, 256), (320, 0, 384),
    (384, 320, 128),
  ]  # fmt: skip
  assert int(seen) == 2 * 64 * 65 // 2 + 320 * 321 // 2


def test_rows_that_use_the_same_numbers_stay_apart():
  layout = Layout(*(jnp.ones((2, 3, 50), jnp.int32) for _ in range(3)))
  numbers = np.asarray(joined((layout, layout)).examples)
  assert numbers.shape == (2, 320)
  assert len(np.unique(numbers)) == 2 * 6 + 1  # padding
  assert (numbers[:, 300:] == 0).all() and (numbers[:, :300] > 0).all()


@pytest.mark.parametrize('longest', [1, 64, 128, 130, 768, 1408, 8192])
def test_widths_hold_any_span_and_are_few(longest):
  found = widths(longest, 2**20)
  assert found == sorted(set(found)) and found[-1] >= longest + (longest % 64 > 0) * 64
  assert len(found) <= 2 + 2 * max(0, np.log2(longest / 64))
  assert all(b <= 1.5 * a for a, b in itertools.pairwise(found))
  assert widths(longest, 64) == [64]


def test_nothing_as_large_as_all_scores_is_kept_or_held():
  (q, k, v, _), layouts = packed((2048,), groups=1)
  loss = lambda *x: attend(Form(8.0), *x, layouts, None).sum()  # noqa: E731
  text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
  assert '64,2048]' in text and '2048,2048' not in text
