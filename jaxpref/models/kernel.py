"""Attention within packed rows by kernels written by hand: what those of TPUs and GPUs share.

Rows are cut into tiles of queries by keys. Tiles of the scores that no token sees (see `tiles`) are
skipped, nothing of the size of the scores leaves the chip, and the gradient makes them again from
what the softmax added up to. What a tile does is in `kernel_tpu` and `kernel_gpu`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.models.blocked import Form, inner_product, named
from jaxpref.models.placement import divided, spread
from jaxpref.models.tiles import Visits, needed, visits
from jaxpref.typing import Array, Layout

LOWEST = float(jnp.finfo(jnp.float32).min)
# Where a softmax's top begins: what is hidden then weighs 0 also where nothing else is seen.
BOTTOM = 0.5 * LOWEST
TINY = float(jnp.finfo(jnp.float32).tiny)
FORWARD, TO_QUERIES, TO_KEYS = 'attention_forward', 'attention_to_queries', 'attention_to_keys'
PRODUCTS = {FORWARD: 2, TO_QUERIES: 3, TO_KEYS: 4}  # of matrices, in a tile of each call
_BRANCHES = 1 << 16  # example * _BRANCHES + branch is one number


class Tiling:
  """Sizes of a call, and how its arrays are cut into tiles.

  Args:
    q, k: [G, R, heads, L, head_dim].
    queries, keys: tokens of a tile, of each head; powers of two.
    width: of a head within the kernel, at least head_dim.
  """

  def __init__(self, q: Array, k: Array, queries: int, keys: int, width: int):
    self.groups, self.rows, self.heads, self.length, self.head_dim = q.shape
    self.kv_heads = k.shape[2]
    self.shared = self.heads // self.kv_heads
    self.queries, self.keys, self.width = queries, keys, width
    self.columns = self.shared * queries  # queries of a tile, all heads of a key head together
    self.rows_in_all = self.groups * self.rows
    size = max(queries, keys)
    self.padded = -(-self.length // size) * size

  def cut(self, x: Array) -> Array:
    """[G, R, heads, L, ...] -> [G * R, kv heads, heads / kv heads, padded L, ...]."""
    x = x.reshape(self.rows_in_all, self.kv_heads, -1, *x.shape[3:])
    wider = ((0, self.width - self.head_dim),) * (x.ndim - 4)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, self.padded - self.length), *wider))

  def joined(self, x: Array) -> Array:
    """`cut` undone."""
    x = x[:, :, :, : self.length, ...]
    if x.ndim > 4:
      x = x[..., : self.head_dim]
    return x.reshape(self.groups, self.rows, -1, self.length, *x.shape[4:])


class Who(NamedTuple):
  """Of every token, int32 [G * R, padded L]: as a query, as a key, and where it stands."""

  query: Array
  key: Array
  position: Array


class Call(NamedTuple):
  """What a pass is given: `arrays` as `Tiling.cut` makes them."""

  tiling: Tiling
  who: Who
  met: Visits  # which tiles each block meets
  window: Array | None
  arrays: tuple[Array, ...]


class Pass(NamedTuple):
  """A sum over tiles, for each block of queries or of keys over those that it meets.

  Attributes:
    tiling: (q, k) -> `Tiling`.
    outer: 'q' where blocks of queries meet blocks of keys, 'k' where it is the other way round.
    run: (`Form`, `Call`) -> arrays like those it is given.
  """

  tiling: Callable[[Array, Array], Tiling]
  outer: str
  run: Callable[[Form, Call], tuple[Array, ...]]


def attention(forward: Pass, to_queries: Pass, to_keys: Pass) -> Callable:
  """As `blocked.attend_rows`, for arrays [G, R, heads, L, head_dim] and layouts [G, R, L].

  oᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √scalar) vⱼ, tiled as in "FlashAttention-2", Dao, algorithms 1 and 2:
  https://arxiv.org/abs/2307.08691. Under `jax.set_mesh` groups stay on their devices and heads are
  divided over `tensor`.

  Args:
    forward: of q, k and v gives the output and log Σⱼ, float32 [G, R, heads, L].
    to_queries: of q, k, v, the output's cotangent, log Σⱼ and its product with the output gives
      the cotangent of q.
    to_keys: of the same gives those of k and v.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def attend_rows(
    form: Form, q: Array, k: Array, v: Array, layout: Layout, window: Array | None
  ) -> Array:
    return begin(form, q, k, v, layout, window)[0]

  def begin(form, q, k, v, layout, window):
    kernel = functools.partial(_run, (forward,), form)
    found = divided(kernel, (q, *spread(q, k, v)), (layout, window), ranks=(5, 4))
    out, log_sums = named(*found)
    return out, (q, k, v, layout, window, out, log_sums)

  def turn_back(form, kept, given):
    q, k, v, layout, window, out, log_sums = kept
    inner = inner_product(given, out)[..., 0]
    (keys, values), pull = jax.vjp(lambda k, v: spread(q, k, v), k, v)
    kernel = functools.partial(_run, (to_queries, to_keys), form)
    operands = q, keys, values, given.astype(v.dtype), log_sums, inner
    to_q, to_k, to_v = divided(kernel, operands, (layout, window), ranks=(5, 5, 5))
    return to_q, *pull((to_k, to_v)), None, None

  attend_rows.defvjp(begin, turn_back)
  return attend_rows


def _run(passes: tuple[Pass, ...], form: Form, *arguments) -> tuple[Array, ...]:
  *arrays, layout, window = arguments
  found: list[Array] = []
  for one in passes:
    tiling = one.tiling(*arrays[:2])
    ahead = ((0, 0), (0, tiling.padded - tiling.length))
    flat = Layout(*(jnp.pad(x.reshape(tiling.rows_in_all, -1), ahead) for x in layout))
    tiles = needed(flat, window, tiling.queries, tiling.keys)
    met = visits(tiles if one.outer == 'q' else tiles.swapaxes(1, 2))
    call = Call(tiling, _who(flat), met, window, tuple(map(tiling.cut, arrays)))
    found += map(tiling.joined, one.run(form, call))
  return tuple(found)


def _who(layout: Layout) -> Who:
  real = layout.examples != 0
  code = layout.examples * _BRANCHES + layout.branches
  # Padding is one number among the keys and another among the queries: they never meet.
  query, key = jnp.where(real, code, -1 - _BRANCHES), jnp.where(real, code, -1)
  return Who(query, key, layout.positions)


class Tokens(NamedTuple):
  """Of a tile, shaped to broadcast to it: who they are, where in the row, and at which position."""

  code: Array
  at: Array
  position: Any  # None without a window


def hidden(query: Tokens, key: Tokens, window: Array | None) -> Array:
  """What to add to a tile's scores: 0, lowest where the key is hidden from the query.

  `window` is an int32 scalar; None: everything is near, and positions are not read.
  """
  seen = (key.code == query.code) | (key.code == (query.code & -_BRANCHES))
  seen &= key.at <= query.at
  if window is not None:
    seen &= query.position - key.position < window
  return jnp.where(seen, 0.0, LOWEST)  # scores may sink to -inf, which weighs 0 too


def risen(top: Array, scores: Array, axis: int) -> tuple[Array, Array, Array]:
  """A softmax meets more scores: its new top, their weights below it, what is left of others."""
  higher = jnp.maximum(top, scores.max(axis, keepdims=True))
  return higher, jnp.exp(scores - higher), jnp.exp(top - higher)


def product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
  """a and b [., .] summed over one axis of each, in float32."""
  contracted = ((axes[:1], axes[1:]), ((), ()))
  return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)
