"""Checksums: the same on device and host, other for any flipped bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.sharding import make_mesh
from jaxpref.train.checksums import checksums

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8, jnp.uint8, jnp.bool_)


@pytest.mark.parametrize('dtype', DTYPES)
def test_any_flipped_bit_shows_wherever_the_array_is(dtype):
  x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)) * 3, dtype))
  expected = checksums({'x': x})['x']
  assert checksums({'x': jnp.asarray(x)})['x'] == expected
  bits = x.dtype.itemsize * 8 if dtype != jnp.bool_ else 1
  for bit in range(bits):
    flipped = x.copy()
    raw = flipped.reshape(-1)[11:12].view(np.uint8)
    raw[bit // 8] ^= np.uint8(1 << bit % 8)
    assert checksums({'x': flipped})['x'] != expected


def test_structure_and_empty_leaves_are_kept():
  tree = {'a': [jnp.ones(3), None], 'b': np.zeros((0, 2), np.float32), 'c': np.float32(2)}
  found = checksums(tree)
  assert jax.tree.structure(found) == jax.tree.structure(tree)
  assert found['b'] == 0
  assert found['c'] == 0x40000000


def test_shards_do_not_matter():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  x = jnp.arange(64.0).reshape(8, 8)
  spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P('x')))
  assert checksums(spread) == checksums(x) == checksums(np.asarray(x))
  # As of another role's arrays, such as a reward model's.
  with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
    assert checksums(spread) == checksums(x)
