"""Attention over packed rows and over a cache: who sees whom, and the sum itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxpref.models.layers import cap
from jaxpref.typing import Array, Layout


class Cache(NamedTuple):
  """Keys and values of what was read so far: `fill` of C slots are in use, from the left.

  Padding takes slots too, which no one sees.
  """

  k: Array  # [layers, B, kv heads, C, head_dim]
  v: Array
  layout: Layout  # of every slot, int32 [B, C]; an empty slot is padding
  fill: Array  # int32 scalar


def visible(queries: Layout, keys: Layout, start: Array | int = 0) -> Array:
  """Who sees whom: bool [..., Q, C] for queries [..., Q] and keys [..., C].

  Query i stands at key start + i. It sees the keys up to there, of its own example, that are
  prompt or its own branch. Padding (example 0) neither sees nor is seen.
  """
  example, branch = queries.examples[..., :, None], queries.branches[..., :, None]
  key_example, key_branch = keys.examples[..., None, :], keys.branches[..., None, :]
  own = (key_example == example) & (example != 0) & ((key_branch == 0) | (key_branch == branch))
  query = start + jax.lax.broadcasted_iota(jnp.int32, own.shape, own.ndim - 2)
  return own & (jax.lax.broadcasted_iota(jnp.int32, own.shape, own.ndim - 1) <= query)


def within(queries: Layout, keys: Layout, window: Array) -> Array:
  """Whether a key's position is fewer than `window` before the query's: bool [..., Q, C]."""
  return queries.positions[..., :, None] - keys.positions[..., None, :] < window


def attend(
  q: Array, k: Array, v: Array, mask: Array, *, scalar: float, limit: float | None = None
) -> Array:
  """Scaled dot-product attention; the softmax is in float32.

  A query that sees nothing (padding) gets the mean of the values: finite, and of no use.

  Args:
    q: [..., H, Q, head_dim].
    k, v: [..., kv heads, C, head_dim]; H is a multiple of the kv heads.
    mask: bool [..., Q, C].
    scalar: scores are divided by its square root.
    limit: scores are capped at it, see `layers.cap`.

  Returns:
    [..., H, Q, head_dim].
  """
  *lead, heads, length, head_dim = q.shape
  kv_heads, slots = k.shape[-3:-1]
  # The queries that share a key head lie one after another: one matrix product for each key head.
  q = q.reshape(*lead, kv_heads, heads // kv_heads * length, head_dim)
  scores = jnp.einsum('...qd,...kd->...qk', q, k, preferred_element_type=jnp.float32)
  scores = scores.reshape(*lead, kv_heads, heads // kv_heads, length, slots)
  scores = cap(scores * scalar**-0.5, limit)
  scores = jnp.where(mask[..., None, None, :, :], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  weights = weights.reshape(*lead, kv_heads, heads // kv_heads * length, slots)
  return jnp.einsum('...qk,...kd->...qd', weights, v).reshape(*lead, heads, length, head_dim)


class Flat:
  """Attention within packed rows whose tokens lie end to end, S = sum of R * L over the layouts.

  Args:
    attend: `attend`, its scalar and limit given.
    layouts: one for each row length, int32 [G, R, L].
  """

  def __init__(self, attend: Callable, layouts: tuple[Layout, ...]):
    self.attend, self.layouts = attend, layouts
    self.masks = [visible(layout, layout) for layout in layouts]

  def __call__(self, q, k, v, window, index, memory):
    """q [G, S, H, head_dim], k and v [G, S, kv heads, head_dim] -> [G, S, H, head_dim]."""
    outs, start = [], 0
    for layout, mask in zip(self.layouts, self.masks, strict=True):
      groups, rows, length = layout.positions.shape
      stop = start + rows * length
      parts = (
        x[:, start:stop].reshape(groups, rows, length, *x.shape[2:]).swapaxes(2, 3)
        for x in (q, k, v)
      )
      seen = mask if window is None else mask & within(layout, layout, window)
      out = self.attend(*parts, seen).swapaxes(2, 3)
      outs.append(out.reshape(groups, rows * length, *q.shape[2:]))
      start = stop
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0], memory


class Cached:
  """Attention of new tokens [B, L], laid end to end, to a cache, which they join at its fill."""

  def __init__(self, attend: Callable, cache: Cache, layout: Layout):
    self.attend, self.start, self.new = attend, cache.fill, layout
    self.layout = jax.tree.map(
      lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, cache.fill)),
      cache.layout,
      layout,
    )
    self.mask = visible(layout, self.layout, cache.fill)

  def __call__(self, q, k, v, window, index, memory):
    """As `Flat`, of one group; `memory` is the cache's k and v of all layers, `index` ours."""
    rows = self.new.positions.shape
    q, k, v = (x.reshape(*rows, *x.shape[2:]).swapaxes(1, 2) for x in (q, k, v))
    # Carried whole through the scan and written in place: one slot a token, not one cache a layer.
    memory = tuple(
      jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (index, 0, 0, self.start, 0))
      for old, new in zip(memory, (k, v), strict=True)
    )
    k, v = (jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in memory)
    seen = self.mask if window is None else self.mask & within(self.new, self.layout, window)
    out = self.attend(q, k.astype(q.dtype), v.astype(q.dtype), seen)
    return out.swapaxes(1, 2).reshape(1, -1, *out.shape[1::2]), memory


def checked_fill(cache: Any, length: int):
  """Raise ValueError if `length` more tokens do not fit, as far as that is known while tracing."""
  slots = cache.layout.positions.shape[1]
  fill = 0 if isinstance(cache.fill, Tracer) else int(cache.fill)
  if fill + length > slots:
    raise ValueError(
      f'the cache has {slots} slots, {fill} in use: no room for {length} more tokens; '
      'make it longer with init_cache(batch, length)'
    )
