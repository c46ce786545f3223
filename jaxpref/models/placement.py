"""Parameters onto their devices, without holding more of one on the host than need be."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

AT_ONCE = 2**26  # bytes: a stacked parameter above that goes to its devices layer by layer

Read = Callable[[Any], np.ndarray]  # a tuple of slices -> that part of a parameter


def placed(read: Read, shape: tuple[int, ...], dtype, sharding: Sharding | None) -> jax.Array:
  """The parameter of `shape` whose slices `read` gives, on the default device or as sharded.

  A device gets what is its own, read for it alone.
  """
  large = int(np.prod(shape)) * np.dtype(dtype).itemsize > AT_ONCE
  if large and len(shape) > 2 and _layers_lie_together(sharding, shape):
    return _layer_by_layer(read, shape, dtype, sharding)
  if sharding is None:
    return jnp.asarray(read((slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, sharding, read)


def _layer_by_layer(read: Read, shape: tuple[int, ...], dtype, sharding) -> jax.Array:
  whole = jnp.zeros(shape, dtype, device=sharding)
  if isinstance(sharding, NamedSharding):
    spec = PartitionSpec(*sharding.spec[1:])
    sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
  for i in range(shape[0]):
    one = functools.partial(lambda i, index: read((slice(i, i + 1), *index))[0], i)
    whole = _put(whole, placed(one, shape[1:], dtype, sharding), i)
    whole.block_until_ready()  # or the host would read on and hold what is under way
  return whole


def _layers_lie_together(sharding: Sharding | None, shape: tuple[int, ...]) -> bool:
  if isinstance(sharding, NamedSharding):
    return sharding.shard_shape(shape)[0] == shape[0]
  return sharding is None or isinstance(sharding, SingleDeviceSharding)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, layer: jax.Array, index: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0)
