"""Where arrays live: parameters onto their devices part by part, activations with their groups."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpref.typing import Array

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


def grouped(x: Array) -> Array:
  """Holds activations [G, ...] to their groups' devices under `jax.set_mesh`; else does nothing.

  FSDP keeps weights in pieces. Left alone, the compiler may gather activations over all devices to
  meet them there; groups are to stay where they are, and weights to come to them. Parts of divided
  rows (see `context`) are groups of their own.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in ('data', 'fsdp', 'context') if axis in mesh.axis_names)
  if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
    return x
  free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free, None))


def mesh_size(*axes: str) -> int:
  """Over how many devices these axes of the mesh that is set go; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.axis_names)


def divided(
  kernel: Callable, operands: Sequence[Array], rest: Any, ranks: Sequence[int]
) -> tuple[Array, ...]:
  """`kernel(*operands, *rest)` with each device's own groups and heads under `jax.set_mesh`.

  The compiler cannot divide a custom call: left alone, every device would do all of it.

  Args:
    operands: [G, R, heads, ...].
    rest: a pytree of arrays [G, ...] and scalars.
    ranks: of what comes back, arrays [G, R, heads, ...].
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.axis_names:
    return kernel(*operands, *rest)
  groups = tuple(axis for axis in ('data', 'fsdp') if axis in mesh.axis_names)
  groups = groups if operands[0].shape[0] % mesh_size(*groups) == 0 else ()
  even = all(x.shape[2] % mesh_size('tensor') == 0 for x in operands)
  heads = 'tensor' if 'tensor' in mesh.axis_names and even else None

  def spec(rank: int) -> PartitionSpec:
    return PartitionSpec(*(groups or None, None, heads, *(None,) * rank)[:rank])

  rest_specs = jax.tree.map(
    lambda x: PartitionSpec(groups or None) if x.ndim else PartitionSpec(), rest
  )
  return jax.shard_map(
    kernel,
    in_specs=(*(spec(x.ndim) for x in operands), *rest_specs),
    out_specs=tuple(map(spec, ranks)),
    check_vma=False,  # a custom call does not say over which axes its results vary
  )(*operands, *rest)
