"""Where arrays live: parameters onto their devices part by part, activations with their groups."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpref import sharding as rules
from jaxpref.typing import Array, Params

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
  axes = group_axes(x.shape[0], (*rules.GROUPS, 'context'))
  if not axes:
    return x
  free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free, None))


def group_axes(count: int, axes: Sequence[str] = rules.GROUPS) -> tuple[str, ...]:
  """Those of `axes` that the mesh that is set has; none where they do not divide `count` groups."""
  names = jax.sharding.get_abstract_mesh().axis_names
  found = tuple(axis for axis in axes if axis in names)
  return () if count % mesh_size(*found) else found


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
  groups = group_axes(operands[0].shape[0])
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


def spread(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """Keys and values, heads on axis 2, with as many of them as the mesh needs to divide them."""
  size = mesh_size('tensor')
  heads, kv_heads = q.shape[2], k.shape[2]
  times = size // math.gcd(size, kv_heads)
  if times == 1 or heads % (kv_heads * times):
    return k, v
  return jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)


def held(params: Params, prefix: str = '') -> Params:
  """Holds parameters, and with them their gradients, to their own pieces under `jax.set_mesh`.

  A gradient is then summed over the groups and cut up in one go. Left alone, the compiler may sum
  it whole on every device, which sends twice as much.

  Args:
    params: a tree whose paths are those of a model's parameters.
    prefix: before the paths; with 'layers', arrays are a single layer's, without the layer axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size == 1 or 'fsdp' not in mesh.axis_names:
    return params

  def one(key_path: tuple, x: Array) -> Array:
    path = f'{prefix}/{rules.path_of(key_path)}'.replace('/value', '')  # flax's variables
    rule = rules.match(rules.PARAMS, path)
    assert isinstance(rule, PartitionSpec)
    spec = tuple(rule)[bool(prefix) :]
    fits = [
      axis if axis and size % mesh.shape[axis] == 0 else None
      for size, axis in zip(x.shape, spec + (None,) * x.ndim, strict=False)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fits)) if any(fits) else x

  return jax.tree_util.tree_map_with_path(one, params)


def brought_in(params: Params | None) -> Params | None:
  """Parameters on the devices, wherever they wait; None stays None."""
  space = jax.memory.Space

  def bring(x: Array) -> Array:
    return jax.device_put(x, space.Device) if jax.typeof(x).memory_space == space.Host else x

  return jax.tree.map(bring, params)


def looked_up(look: Callable[[Array], Array], indices: Array) -> Array:
  """Rows `look(indices)` of a table that lies over `tensor` by rows and over `fsdp` by columns.

  Each device looks its columns up for the groups of all others along `fsdp`, and then they trade
  groups for columns: the table stays where it is. With rows over `tensor` too the compiler does not
  find that by itself, and gathers the activations of all groups instead.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {axis: mesh.shape[axis] for axis in mesh.axis_names}
  both = sizes.get('fsdp', 1) > 1 and sizes.get('tensor', 1) > 1 and sizes.get('context', 1) == 1
  if not both or indices.shape[0] % (sizes['data'] * sizes['fsdp']):
    return look(indices)
  hold = jax.lax.with_sharding_constraint
  found = look(hold(indices, PartitionSpec('data', *(None,) * (indices.ndim - 1))))
  return hold(found, PartitionSpec('data', *(None,) * (found.ndim - 2), 'fsdp'))
