"""Blocked attention: its values and gradients are those of dense attention under the same mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import blocked
from jaxpref.models.blocked import Form, attend_rows, spans
from tests.attentions import HEADS, WIDTH, dense, drawn


@pytest.mark.parametrize('length', [7, 130, 300])
@pytest.mark.parametrize('limit', [None, 2.0])
@pytest.mark.parametrize('window', [None, 9])
def test_values_and_gradients_are_those_of_dense_attention(length, limit, window):
  (q, k, v, given), layout = drawn(length, length)
  window = None if window is None else jnp.int32(window)
  real = (layout.examples > 0)[:, None, :, None]

  def weighted(how, q, k, v):
    out = how(Form(float(WIDTH), limit), q, k, v, layout, window) * real
    return jnp.sum(out * given), out

  results = [
    jax.jit(jax.value_and_grad(functools.partial(weighted, how), argnums=(0, 1, 2), has_aux=True))(
      q, k, v
    )
    for how in (attend_rows, dense)
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), *results)


def test_padding_gets_nothing_and_gives_nothing():
  (q, k, v, given), layout = drawn(0, 140)
  padding = (layout.examples == 0)[:, None, :, None]
  assert bool(padding.any())
  out, pull = jax.vjp(lambda *x: attend_rows(Form(8.0), *x, layout, None), q, k, v)
  np.testing.assert_array_equal(np.where(padding, out, 0), 0)
  # Even a cotangent at padding, which nobody reads, goes nowhere.
  for cotangent in pull(given * padding):
    np.testing.assert_array_equal(cotangent, 0)


def test_nothing_as_large_as_all_scores_is_kept_or_held():
  length = 1024
  (q, k, v, _), layout = drawn(1, length, count=1)
  loss = lambda *x: attend_rows(Form(8.0), *x, layout, None).sum()  # noqa: E731
  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
  largest = max(
    var.aval.size for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, 'size')
  )
  assert largest <= HEADS * length * length // blocked.BLOCKS


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_it_lowers_for_accelerators_without_scores_of_whole_rows(platform):
  """Long rows, value and gradient: the widest block is an eighth of the queries by all keys."""
  length = 2048
  (q, k, v, _), layout = drawn(2, length, count=1)
  q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
  loss = lambda *x: attend_rows(Form(8.0), *x, layout, None).astype(jnp.float32).sum()  # noqa: E731
  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
  text = jax.export.export(gradient, platforms=[platform])(q, k, v).mlir_module()
  assert f'{length // blocked.BLOCKS}x{length}x' in text and f'{length}x{length}x' not in text


@pytest.mark.parametrize('length', [1, 128, 129, 1024, 1500, 8192])
def test_blocks_cover_a_row_once_and_are_few(length):
  found = spans(length)
  assert [i for start, stop in found for i in range(start, stop)] == list(range(length))
  assert len(found) <= blocked.BLOCKS
