"""Checksums of arrays, so that a checkpoint whose bits have changed on disk is not trained from."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> Any:
  """For each leaf the sum of its entries' bits modulo 2³², which any one flipped bit changes.

  The same for jax and numpy arrays, whatever devices they are spread over.
  """
  leaves, structure = jax.tree.flatten(tree)
  on_device = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
  meshes = {getattr(leaf.sharding, 'mesh', None) for leaf in on_device.values()}
  mesh = meshes.pop() if len(meshes) == 1 else None
  # Theirs may be another one than the caller has set, and jit runs on that.
  with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
    sums = jax.device_get(_of_device(on_device))
  for i, leaf in enumerate(leaves):
    sums[i] = int(sums[i]) if i in sums else _of_host(np.asarray(leaf))
  return jax.tree.unflatten(structure, [sums[i] for i in range(len(leaves))])


@jax.jit
def _of_device(leaves: dict[int, jax.Array]) -> dict[int, jax.Array]:
  def one(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
      x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * min(x.dtype.itemsize, 4)}'))
    return jnp.sum(bits.astype(jnp.uint32))

  return jax.tree.map(one, leaves)


def _of_host(x: np.ndarray) -> int:
  bits = np.ascontiguousarray(x).view(f'u{min(x.dtype.itemsize, 4)}')
  return int(bits.sum(dtype=np.uint64) % 2**32)
