"""Attention within packed rows in blocks of queries, with a gradient of its own.

A block of queries meets the keys up to its end only, so the half of the scores that lies ahead of
them is never computed; and nothing of the size of the scores is kept for the gradient, which makes
them again, block by block, from what the softmax added up to. The scores of one block are all that
is ever held.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpref.models.attention import visible, within
from jaxpref.models.layers import cap
from jaxpref.typing import Array, Layout

SHORTEST = 128  # queries of a block, at least
BLOCKS = 8  # of a row, at most: the program grows with them; 8 leave 9/16 of the scores

ATTENDED = 'attended'  # what a checkpoint's policy may know outputs and their sums as
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Form(NamedTuple):
  """What of attention is static: scores are divided by √scalar and capped at `limit`."""

  scalar: float
  limit: float | None = None

  def scores(self, products: Array) -> tuple[Array, Any]:
    """Scores of float32 products q·k, and the slope of their cap."""
    scores = cap(products * self.scalar**-0.5, self.limit)
    return scores, 1.0 if self.limit is None else 1.0 - jnp.square(scores / self.limit)

  def gradient(
    self, scores: Array, slope: Any, log_sums: Array, of_weights: Array, inner: Array
  ) -> tuple[Array, Array]:
    """The softmax's weights, and the cotangent of the products from that of the weights.

    `inner` is `inner_product` of the output and its cotangent.
    """
    weights = jnp.exp(scores - log_sums)
    return weights, weights * (of_weights - inner) * (slope * self.scalar**-0.5)


def spans(length: int) -> list[tuple[int, int]]:
  """Where the blocks of a row of `length` begin and end."""
  size = max(SHORTEST, -(-length // BLOCKS))
  return [(start, min(start + size, length)) for start in range(0, length, size)]


class Flat:
  """Attention within packed rows whose tokens lie end to end, S = sum of R * L over the layouts.

  Args:
    attend: `attend` of this file or another, its form given.
    layouts: one for each row length, int32 [G, R, L].
  """

  def __init__(self, attend: Callable, layouts: tuple[Layout, ...]):
    self.attend, self.layouts = attend, layouts

  def __call__(self, q, k, v, window, index, memory):
    """q [G, S, H, head_dim], k and v [G, S, kv heads, head_dim] -> [G, S, H, head_dim]."""
    return self.attend(q, k, v, self.layouts, window), memory


@dataclasses.dataclass(frozen=True)
class ByRows:
  """`attend_rows` of this file or another, for rows of several lengths that lie end to end."""

  attend_rows: Callable

  def __call__(self, form: Form, q: Array, k: Array, v: Array, layouts: tuple[Layout, ...], window):
    """As `spans.attend`."""
    outs, start = [], 0
    for layout in layouts:
      groups, rows, length = layout.positions.shape
      stop = start + rows * length
      parts = (
        x[:, start:stop].reshape(groups, rows, length, *x.shape[2:]).swapaxes(2, 3)
        for x in (q, k, v)
      )
      out = self.attend_rows(form, *parts, layout, window).swapaxes(2, 3)
      outs.append(out.reshape(groups, rows * length, *q.shape[2:]))
      start = stop
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_rows(
  form: Form, q: Array, k: Array, v: Array, layout: Layout, window: Array | None
) -> Array:
  """Softmax attention of every token to those before it that it may see; float32 inside.

  oᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √scalar) vⱼ, blocked as in "FlashAttention", Dao et al., section 3.1:
  https://arxiv.org/abs/2205.14135. A token that sees nothing (padding) gets 0.

  Args:
    form: see `Form`.
    q: [..., H, L, head_dim].
    k, v: [..., kv heads, L, head_dim]; H is a multiple of the kv heads.
    layout: of the rows, int32 [..., L].
    window: int32 scalar, keys at positions that far before a query's and further are not seen;
      None: all are.

  Returns:
    [..., H, L, head_dim].
  """
  return _forward(form, q, k, v, layout, window)[0]


def _forward(form, q, k, v, layout, window):
  outs, sums = [], []
  for start, stop in spans(q.shape[-2]):
    own, keys = (Layout(*(x[..., at:stop] for x in layout)) for at in (start, 0))
    queries = q[..., start:stop, :]
    seen = sees(own, keys, start, window)
    out, log_sum = block(form, queries, k[..., :stop, :], v[..., :stop, :], seen)
    outs.append(out)
    sums.append(log_sum)
  out, log_sums = named(jnp.concatenate(outs, axis=-2), jnp.concatenate(sums, axis=-2))
  return out, (q, k, v, layout, window, out, log_sums)


def _backward(form, kept, given):
  q, k, v, layout, window, out, log_sums = kept
  inner = inner_product(given, out)
  to_q, to_k, to_v = [], [], []
  length = q.shape[-2]
  for start, stop in spans(length):
    own, keys = (Layout(*(x[..., at:stop] for x in layout)) for at in (start, 0))
    seen = sees(own, keys, start, window)
    parts = (x[..., start:stop, :] for x in (q, log_sums, inner, given))
    of_q, of_k, of_v = block_gradient(form, *parts, k[..., :stop, :], v[..., :stop, :], seen)
    ahead = ((0, 0),) * (k.ndim - 2) + ((0, length - stop), (0, 0))
    to_q.append(of_q)
    for sums, part in ((to_k, of_k), (to_v, of_v)):
      sums.append(jnp.pad(part.swapaxes(-1, -2), ahead))
  return (
    jnp.concatenate(to_q, axis=-2).astype(q.dtype),
    functools.reduce(jnp.add, to_k).astype(k.dtype),
    functools.reduce(jnp.add, to_v).astype(v.dtype),
    None,
    None,
  )


attend_rows.defvjp(_forward, _backward)


def sees(own: Layout, keys: Layout, start: Array | int, window: Array | None) -> Array:
  """Who sees whom, bool [..., block, C]: queries that stand at key `start` and on."""
  seen = visible(own, keys, start)
  return seen if window is None else seen & within(own, keys, window)


def block(form: Form, q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array]:
  """What one block of queries gets, [..., H, block, head_dim], and log Σⱼ of it, float32 [..., 1].

  Args:
    q: [..., H, block, head_dim].
    k, v: [..., kv heads, C, head_dim].
    seen: bool [..., block, C].
  """
  scores, _ = _scores(form, q, k, seen)
  # Not below half the lowest number: all of what padding sees is then 0, with a sum of 0.
  top = jnp.maximum(scores.max(-1, keepdims=True), 0.5 * _LOWEST)
  weights = jnp.exp(scores - top)
  total = jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  out = _product('...qk,...kd->...qd', weights.astype(v.dtype), v) / total
  return _apart(out, q).astype(q.dtype), _apart(top + jnp.log(total), q)


def block_gradient(
  form: Form,
  q: Array,
  log_sums: Array,
  inner: Array,
  given: Array,
  k: Array,
  v: Array,
  seen: Array,
) -> tuple[Array, Array, Array]:
  """float32 cotangents of a block's q, and of the k and v that it met, from that of its output.

  Those of k and v are [..., kv heads, head_dim, C]: as products in this order XLA on a CPU takes a
  fifth of the time for them.

  Args:
    q, k, v, seen: as in `block`.
    log_sums: what `block` gave.
    inner: `inner_product` of the output and its cotangent `given`.
  """
  own, above = _together(q, k).astype(k.dtype), _together(given, k).astype(v.dtype)
  scores, slope = _scores(form, q, k, seen)
  of_weights = _product('...qd,...kd->...qk', above, v)
  log_sums, inner = _together(log_sums, k), _together(inner, k)
  weights, of_scores = form.gradient(scores, slope, log_sums, of_weights, inner)
  of_scores = of_scores.astype(k.dtype)
  return (
    _apart(_product('...qk,...kd->...qd', of_scores, k), q),
    _product('...qd,...qk->...dk', own, of_scores),
    _product('...qd,...qk->...dk', above, weights.astype(v.dtype)),
  )


def named(*found: Array) -> tuple[Array, ...]:
  """What a forward pass found and its gradient reads, for a checkpoint's policy to keep."""
  return tuple(checkpoint_name(x, ATTENDED) for x in found)


def inner_product(given: Array, out: Array) -> Array:
  """Over the channels, float32 [..., 1]: as a product, for which XLA on a CPU takes a seventh of
  the time that it takes for a sum here."""
  wide = (x.astype(jnp.float32) for x in (given, out))
  return jnp.einsum('...d,...d->...', *wide, precision='highest')[..., None]


def _scores(form: Form, q: Array, k: Array, seen: Array) -> tuple[Array, Any]:
  """Scores [..., kv heads, H / kv heads * block, C] and the slope of their cap."""
  raw = _product('...qd,...kd->...qk', _together(q, k).astype(k.dtype), k)
  scores, slope = form.scores(raw)
  per_head = (*scores.shape[:-2], -1, *seen.shape[-2:])
  seen = seen[..., None, None, :, :]
  scores = jnp.where(seen, scores.reshape(per_head), _LOWEST).reshape(scores.shape)
  return scores, slope


def _together(x: Array, k: Array) -> Array:
  """[..., H, block, n] -> [..., kv heads, H / kv heads * block, n]: a matrix for each key head."""
  return x.reshape(*x.shape[:-3], k.shape[-3], -1, x.shape[-1])


def _apart(x: Array, q: Array) -> Array:
  """`_together` undone: [..., H, block, n]."""
  return x.reshape(*q.shape[:-1], x.shape[-1])


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
