"""Which tiles of the scores of packed rows anyone sees: the others are neither read nor computed.

A tile is a block of queries by a block of keys. Rows hold examples one after another and branches
within them, so most tiles below the diagonal too lie between strangers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.typing import Array, Layout

_HIGH = np.iinfo(np.int32).max


class Visits(NamedTuple):
  """For each of n blocks which of m others it meets, those first: int32 [N, n, m] and [N, n].

  Beyond `counts` the last one that is met stands again, so that nothing new is fetched for it.
  """

  order: Array
  counts: Array


class Span(NamedTuple):
  """Least and greatest over the real tokens of each block, int32 [N, blocks]; of none: high, -1."""

  low: Array
  high: Array


def _span(values: Array, real: Array, size: int) -> Span:
  shape = (*values.shape[:-1], -1, size)
  low = jnp.where(real, values, _HIGH).reshape(shape).min(-1)
  return Span(low, jnp.where(real, values, -1).reshape(shape).max(-1))


def needed(layout: Layout, window: Array | None, queries: int, keys: int) -> Array:
  """Whether a block of queries may see any of a block of keys: bool [N, L / queries, L / keys].

  Never False where one does; True where none does only if bounds of ids and positions cannot tell.

  Args:
    layout: int32 [N, L].
    window: int32 scalar, see `attention.within`; None: everything is near.
    queries, keys: tokens of a block; they divide L.
  """
  real = layout.examples != 0
  example, branch, position = (
    (_span(x, real, queries), _span(x, real, keys))
    for x in (layout.examples, layout.branches, layout.positions)
  )

  def pairs(of_query: Array, of_key: Array) -> tuple[Array, Array]:
    return of_query[:, :, None], of_key[:, None, :]

  def overlap(both: tuple[Span, Span]) -> Array:
    query_low, key_high = pairs(both[0].low, both[1].high)
    query_high, key_low = pairs(both[0].high, both[1].low)
    return (query_low <= key_high) & (key_low <= query_high)

  shared = (branch[1].low == 0)[:, None, :]
  found = overlap(example) & (shared | overlap(branch))
  last_query = jnp.arange(1, layout.examples.shape[-1] // queries + 1) * queries
  first_key = jnp.arange(layout.examples.shape[-1] // keys) * keys
  found &= (first_key[None, :] < last_query[:, None])[None]
  if window is not None:
    nearest, furthest = pairs(position[0].low, position[1].high)
    found &= nearest - furthest < window
  return found


def visits(found: Array) -> Visits:
  """The columns of each row of `found`, bool [N, n, m], that are True, in order."""
  counts = found.sum(-1, dtype=jnp.int32)
  order = jnp.argsort(~found, axis=-1, stable=True).astype(jnp.int32)
  place = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
  places = jnp.minimum(place, jnp.maximum(counts - 1, 0)[..., None])
  return Visits(jnp.take_along_axis(order, places, axis=-1), counts)
