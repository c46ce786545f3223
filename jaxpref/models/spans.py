"""Attention within packed rows on a CPU: a block of queries meets only the span of keys it needs.

The tokens of an example lie together, so whatever a block sees lies between the first tile of keys
that it needs (see `tiles`) and its own end. Spans are rounded up to a few widths, and the blocks of
a width go one after another, as many as the data has: strangers' examples cost nothing, and what
one block holds stays in the processor's cache. All rows are taken as one long one, so that rows of
several lengths share a program.

An accelerator would do too little at a time in this way, and no plan can tell how often such a
loop turns: `blocked` is for them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models.blocked import Form, block, block_gradient, inner_product, named, sees
from jaxpref.models.placement import divided, spread
from jaxpref.models.tiles import needed
from jaxpref.typing import Array, Layout

BLOCK = 64  # queries; spans begin at multiples, too
STEPS = (1.0, 1.5)  # widths of spans: 128, 192, 256, 384, ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
  form: Form,
  q: Array,
  k: Array,
  v: Array,
  layouts: tuple[Layout, ...],
  window: Array | None,
) -> Array:
  """Softmax attention of every token to those before it that it may see; float32 inside.

  oᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √scalar) vⱼ, its gradient as in "FlashAttention", Dao et al.,
  algorithm 4: https://arxiv.org/abs/2205.14135. A token that sees nothing (padding) gets 0. Under
  `jax.set_mesh` groups stay on their devices and heads are divided over `tensor`; without it arrays
  that lie on several devices are gathered.

  Args:
    form: see `Form`.
    q: [G, S, H, head_dim], rows end to end.
    k, v: [G, S, kv heads, head_dim]; H is a multiple of the kv heads.
    layouts: of the rows of each length, int32 [G, R, L]; S is the sum of R * L.
    window: int32 scalar, keys at positions that far before a query's and further are not seen;
      None: all are.

  Returns:
    As q.
  """
  return _forward(form, q, k, v, layouts, window)[0]


def _forward(form, q, k, v, layouts, window):
  call = functools.partial(_forward_blocks, form)
  keys, values = spread(q, k, v)
  # Strangers' values weigh 0, which does not help against NaN. Who sees a key that is no number has
  # scores that are none, so its value need not be: a broken example breaks no other.
  values = jnp.where(jnp.isfinite(keys.sum(-1, keepdims=True)), values, 0)
  out, log_sums = named(*divided(call, (q, keys, values), (layouts, window), ranks=(4, 4)))
  return out, (q, k, v, layouts, window, out, log_sums)


def _backward(form, kept, given):
  q, k, v, layouts, window, out, log_sums = kept
  (keys, values), pull = jax.vjp(lambda k, v: spread(q, k, v), k, v)
  call = functools.partial(_backward_blocks, form)
  operands = q, keys, values, log_sums, inner_product(given, out), given
  to_q, to_k, to_v = divided(call, operands, (layouts, window), ranks=(4, 4, 4))
  return to_q, *pull((to_k, to_v)), None, None


attend.defvjp(_forward, _backward)


def _forward_blocks(form, q, k, v, layouts, window):
  def one(sums, seen, own, keys):
    queries, met = _cut(q_rows, own), (_cut(x, keys) for x in (k_rows, v_rows))
    return [_put(x, y, own) for x, y in zip(sums, block(form, queries, *met, seen), strict=True)]

  q_rows, k_rows, v_rows = map(_end_to_end, (q, k, v))
  sums = [jnp.zeros_like(q_rows), jnp.zeros((*q_rows.shape[:2], 1), jnp.float32)]
  return tuple(_apart(x, q) for x in _over_blocks(one, sums, layouts, window))


def _backward_blocks(form, q, k, v, log_sums, inner, given, layouts, window):
  def one(sums, seen, own, keys):
    parts, met = (_cut(x, own) for x in queries), (_cut(x, keys) for x in (k_rows, v_rows))
    of_q, *more = block_gradient(form, *parts, *met, seen)
    to_q, *to_keys = sums
    return [_put(to_q, of_q, own), *map(lambda x, y: _added(x, y, keys), to_keys, more)]

  queries = list(map(_end_to_end, (q, log_sums, inner, given)))
  k_rows, v_rows = map(_end_to_end, (k, v))
  sums = [jnp.zeros(x.shape, jnp.float32) for x in (queries[0], k_rows, v_rows)]
  found = _over_blocks(one, sums, layouts, window)
  return tuple(_apart(x, like).astype(like.dtype) for x, like in zip(found, (q, k, v), strict=True))


def _over_blocks(one: Callable, carry: Any, layouts: Sequence[Layout], window) -> Any:
  """Turns `one(carry, seen, own, keys)` over all blocks of queries that see anything.

  `own` and `keys` are (start, size) of the block and of its span.
  """
  layout = joined(layouts)
  flat = Layout(*(x.reshape(-1) for x in layout))
  longest = max(x.examples.shape[-1] for x in layouts)
  sizes = widths(longest, flat.examples.shape[0])
  found = needed(layout, window, BLOCK, BLOCK)
  first = jnp.argmax(found, axis=-1) * BLOCK
  stop = (jnp.arange(found.shape[1]) + 1)[None] * BLOCK
  span = jnp.where(found.any(-1), stop - first, 0).reshape(-1)
  kind = jnp.where(span > 0, (span[:, None] > np.array(sizes)[None]).sum(-1), len(sizes))
  order = jnp.argsort(kind).astype(jnp.int32)
  ends = (kind[:, None] <= np.arange(len(sizes))[None]).sum(0, dtype=jnp.int32)
  begin = jnp.int32(0)
  for i, size in enumerate(sizes):

    def body(at, carry, size=size):
      start = order[at] * BLOCK
      own, keys = (start, BLOCK), (jnp.maximum(start + BLOCK - size, 0), size)
      queries, met = (Layout(*(_part(x, at) for x in flat)) for at in (own, keys))
      return one(carry, sees(queries, met, start - keys[0], window), own, keys)

    carry = jax.lax.fori_loop(begin, ends[i], body, carry)
    begin = ends[i]
  return carry


def widths(longest: int, tokens: int) -> list[int]:
  """Of spans, ascending, the last of them for any there may be.

  Args:
    longest: row.
    tokens: in all.
  """
  most = longest if longest % BLOCK == 0 else longest + 2 * BLOCK
  most = min(-(-most // BLOCK) * BLOCK, tokens)
  steps = (int(step * 2**n) * BLOCK for n in range(1, 32) for step in STEPS)
  return [*(size for size in steps if size < most), most]


def joined(layouts: Sequence[Layout]) -> Layout:
  """Rows end to end, filled up to whole blocks: int32 [G, N]; no two share an example's number."""
  groups = layouts[0].examples.shape[0]
  apart = functools.reduce(jnp.maximum, (x.examples.max() for x in layouts)) + 1
  ends = np.cumsum([0, *(x.examples.shape[1] for x in layouts)])
  rows = np.arange(groups * ends[-1], dtype=np.int32).reshape(groups, -1, 1)
  parts = []
  for layout, begin, end in zip(layouts, ends, ends[1:], strict=False):
    own = layout.examples + rows[:, begin:end] * apart
    parts.append(layout._replace(examples=jnp.where(layout.examples > 0, own, 0)))
  flat = (
    jnp.concatenate([x.reshape(groups, -1) for x in xs], 1) for xs in zip(*parts, strict=True)
  )
  return Layout(*map(_filled, flat))


def _filled(x: Array) -> Array:
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), *((0, 0),) * (x.ndim - 2)))


def _end_to_end(x: Array) -> Array:
  """[G, S, heads, n] -> [G * filled S, heads, n]."""
  return _filled(x).reshape(-1, *x.shape[2:])


def _apart(x: Array, like: Array) -> Array:
  """`_end_to_end` undone, `like` being of that shape: [G, S, heads, n]."""
  return x.reshape(like.shape[0], -1, *x.shape[1:])[:, : like.shape[1]]


def _part(x: Array, at: tuple[Array, int]) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, *at)


def _cut(x: Array, at: tuple[Array, int]) -> Array:
  """Of tokens [N, heads, n] a part as [heads, size, n]; `_put` writes one there."""
  return _part(x, at).swapaxes(0, 1)


def _added(x: Array, part: Array, at: tuple[Array, int]) -> Array:
  """To tokens [N, heads, n] a part [heads, n, size] added."""
  total = _part(x, at) + jnp.moveaxis(part, -1, 0)
  return jax.lax.dynamic_update_slice_in_dim(x, total, at[0], 0)


def _put(x: Array, part: Array, at: tuple[Array, int]) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(x, part.swapaxes(0, 1), at[0], 0)
