"""Attention within packed rows as a Pallas kernel for TPUs, forward and backward.

Tiles of the scores that no token sees (see `tiles`) are skipped, nothing of the size of the scores
leaves the chip, and the gradient makes them again from what the softmax added up to. Within a tile
keys lie along the rows and the queries of all heads that share a key head along the columns, so
that what belongs to a query is a row and nothing but the two outputs is ever transposed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpref.models.blocked import Form, inner_product
from jaxpref.models.placement import divided, mesh_size
from jaxpref.models.tiles import Visits, needed, visits
from jaxpref.typing import Array, Layout

LANES = 128
TILE = 256  # keys of a tile, and queries of each head
COLUMNS = 1024  # of a tile, all heads together, where a block of queries may still be halved

_LOWEST = float(jnp.finfo(jnp.float32).min)
_TINY = float(jnp.finfo(jnp.float32).tiny)
_BRANCHES = 1 << 16  # example * _BRANCHES + branch is one number


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_rows(
  form: Form, q: Array, k: Array, v: Array, layout: Layout, window: Array | None
) -> Array:
  """As `blocked.attend_rows`, for arrays [G, R, heads, L, head_dim] and layouts [G, R, L].

  oᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √scalar) vⱼ, tiled as in "FlashAttention-2", Dao, algorithms 1 and 2:
  https://arxiv.org/abs/2307.08691. Under `jax.set_mesh` groups stay on their devices and heads are
  divided over `tensor`.
  """
  return _forward(form, q, k, v, layout, window)[0]


def _forward(form, q, k, v, layout, window):
  operands = q, *_spread(q, k, v)
  kernel = functools.partial(_forward_rows, form)
  out, log_sums = divided(kernel, operands, (layout, window), ranks=(5, 4))
  return out, (q, k, v, layout, window, out, log_sums)


def _backward(form, kept, given):
  q, k, v, layout, window, out, log_sums = kept
  inner = inner_product(given, out)[..., 0]
  (keys, values), pull = jax.vjp(lambda k, v: _spread(q, k, v), k, v)
  kernel = functools.partial(_backward_rows, form)
  operands = q, keys, values, given.astype(v.dtype), log_sums, inner
  to_q, to_k, to_v = divided(kernel, operands, (layout, window), ranks=(5, 5, 5))
  return to_q, *pull((to_k, to_v)), None, None


attend_rows.defvjp(_forward, _backward)


def _spread(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """Keys and values with as many heads as the mesh needs to divide them."""
  size = mesh_size('tensor')
  heads, kv_heads = q.shape[2], k.shape[2]
  times = size // math.gcd(size, kv_heads)
  if times == 1 or heads % (kv_heads * times):
    return k, v
  return jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)


class _Plan:
  """Sizes of a call, and how its arrays are cut into tiles."""

  def __init__(self, q: Array, k: Array):
    self.groups, self.rows, self.heads, self.length, self.head_dim = q.shape
    self.kv_heads = k.shape[2]
    self.shared = self.heads // self.kv_heads
    self.keys = TILE if self.length > LANES else LANES
    self.padded = -(-self.length // self.keys) * self.keys
    self.queries = self.keys if self.shared * self.keys <= COLUMNS else LANES
    self.columns = self.shared * self.queries
    self.rows_in_all = self.groups * self.rows

  def cut(self, x: Array) -> Array:
    """[G, R, heads, L, ...] -> [G * R, kv heads, heads / kv heads, padded L, ...]."""
    x = x.reshape(self.rows_in_all, self.kv_heads, -1, *x.shape[3:])
    ahead = (0, self.padded - self.length)
    return jnp.pad(x, ((0, 0),) * 3 + (ahead,) + ((0, 0),) * (x.ndim - 4))

  def joined(self, x: Array) -> Array:
    """`cut` undone."""
    return x[:, :, :, : self.length].reshape(self.groups, self.rows, -1, self.length, *x.shape[4:])

  def ids(self, layout: Layout) -> tuple[Layout, Array, Array]:
    """The layout [N, padded L], and for tiles who a key is [N, L, 2] and a query [N, 2, L]."""
    ahead = ((0, 0), (0, self.padded - self.length))
    flat = Layout(*(jnp.pad(x.reshape(self.rows_in_all, -1), ahead) for x in layout))
    real = flat.examples != 0
    code = flat.examples * _BRANCHES + flat.branches
    # Padding is one number among the keys and another among the queries: they never meet.
    keys = jnp.stack([jnp.where(real, code, -1), flat.positions], axis=2)
    queries = jnp.stack([jnp.where(real, code, -1 - _BRANCHES), flat.positions], axis=1)
    return flat, keys, queries


def _forward_rows(form, q, k, v, layout, window):
  plan = _Plan(q, k)
  flat, key_ids, query_ids = plan.ids(layout)
  visited = visits(needed(flat, window, plan.queries, plan.keys))
  q, k, v = map(plan.cut, (q, k, v))
  out, log_sums = _call(
    plan,
    _forward_tile(form, plan, window is not None),
    visited,
    window,
    inputs=[('q', query_ids), ('k', key_ids), ('q', q), ('k', k), ('k', v)],
    outputs=[('q', q.shape, q.dtype), ('q', q.shape[:-1], jnp.float32)],
    scratch=[(1, plan.columns), (1, plan.columns), (plan.head_dim, plan.columns)],
    outer='q',
  )
  return plan.joined(out), plan.joined(log_sums)


def _backward_rows(form, q, k, v, given, log_sums, inner, layout, window):
  plan = _Plan(q, k)
  flat, key_ids, query_ids = plan.ids(layout)
  found = needed(flat, window, plan.queries, plan.keys)
  q, k, v, given, log_sums, inner = map(plan.cut, (q, k, v, given, log_sums, inner))
  inputs = [('q', query_ids), ('k', key_ids), ('q', q), ('k', k), ('k', v)]
  inputs += [('q', x) for x in (given, log_sums, inner)]
  (to_q,) = _call(
    plan,
    _queries_tile(form, plan, window is not None),
    visits(found),
    window,
    inputs,
    outputs=[('q', q.shape, q.dtype)],
    scratch=[(plan.head_dim, plan.columns)],
    outer='q',
  )
  to_k, to_v = _call(
    plan,
    _keys_tile(form, plan, window is not None),
    visits(found.swapaxes(1, 2)),
    window,
    inputs,
    outputs=[('k', k.shape, k.dtype), ('k', v.shape, v.dtype)],
    scratch=[(plan.keys, plan.head_dim)] * 2,
    outer='k',
  )
  return plan.joined(to_q), plan.joined(to_k), plan.joined(to_v)


def _call(
  plan: _Plan,
  tile: '_Tile',
  visited: Visits,
  window: Array | None,
  inputs: list[tuple[str, Array]],
  outputs: list[tuple[str, tuple[int, ...], Any]],
  scratch: list[tuple[int, int]],
  outer: str,
) -> tuple[Array, ...]:
  """Runs `tile` for every row, key head, block of `outer` and block that this one visits."""

  def spec(of: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    size = plan.queries if of == 'q' else plan.keys

    def block(i, t, n, order):
      return i if of == outer else order[n, i, t]

    if len(shape) == 3:  # ids, which all heads share
      if of == 'q':
        return pl.BlockSpec(
          (None, 2, size), lambda n, h, i, t, order, *_: (n, 0, block(i, t, n, order))
        )
      return pl.BlockSpec(
        (None, size, 2), lambda n, h, i, t, order, *_: (n, block(i, t, n, order), 0)
      )
    tail = shape[4:]
    return pl.BlockSpec(
      (None, None, shape[2], size, *tail),
      lambda n, h, i, t, order, *_: (n, h, 0, block(i, t, n, order), *(0,) * len(tail)),
    )

  most = jnp.maximum(visited.counts.max(), 1)
  blocks = visited.counts.shape[1]
  found = pl.pallas_call(
    functools.partial(_step, tile, len(inputs), len(outputs)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(plan.rows_in_all, plan.kv_heads, blocks, most),
      in_specs=[spec(of, x.shape) for of, x in inputs],
      out_specs=[spec(of, shape) for of, shape, _ in outputs],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
  )(
    visited.order,
    visited.counts,
    jnp.zeros(1, jnp.int32) if window is None else window.reshape(1),
    *(x for _, x in inputs),
  )
  return tuple(found)


def _step(tile: '_Tile', num_in: int, num_out: int, order, counts, window, *refs):
  """One step of the grid: begin at the first visit, add what is visited, end at the last."""
  ins, outs, sums = refs[:num_in], refs[num_in : num_in + num_out], refs[num_in + num_out :]
  n, i, t = (pl.program_id(axis) for axis in (0, 2, 3))
  pl.when(t == 0)(lambda: tile.begin(sums))
  pl.when(t < counts[n, i])(lambda: tile.add((i, order[n, i, t]), window[0], ins, sums))
  pl.when(t == pl.num_programs(3) - 1)(lambda: tile.end(sums, outs))


class _Tile(NamedTuple):
  """What a kernel does for one block: `sums` begin, take up every block that is met, and end."""

  begin: Callable  # (sums)
  add: Callable  # ((this block, the one met), window, ins, sums)
  end: Callable  # (sums, outs)


def _zeros(sums) -> None:
  for ref in sums:
    ref[...] = jnp.zeros_like(ref)


def _forward_tile(form: Form, plan: _Plan, windowed: bool) -> _Tile:
  def begin(sums):
    _zeros(sums)
    # Not the lowest number: what is hidden then weighs 0 also where nothing else is seen.
    sums[0][...] = jnp.full_like(sums[0], 0.5 * _LOWEST)

  def add(at, window, ins, sums):
    top, total, out = sums
    scores, _ = _scores(form, plan, windowed, at, window, ins)
    higher = jnp.maximum(top[...], scores.max(0, keepdims=True))
    weights, fade = jnp.exp(scores - higher), jnp.exp(top[...] - higher)
    v = ins[4][0]
    top[...] = higher
    total[...] = fade * total[...] + weights.sum(0, keepdims=True)
    out[...] = fade * out[...] + _product(v, weights.astype(v.dtype), (0, 0))

  def end(sums, outs):
    top, total, out = (x[...] for x in sums)
    total = jnp.maximum(total, _TINY)
    outs[0][...] = (out / total).T.reshape(outs[0].shape).astype(outs[0].dtype)
    log_sums = top + jnp.log(total)
    for head in range(plan.shared):
      at = slice(head * plan.queries, (head + 1) * plan.queries)
      outs[1][head : head + 1, :] = log_sums[:, at]

  return _Tile(begin, add, end)


def _queries_tile(form: Form, plan: _Plan, windowed: bool) -> _Tile:
  def add(at, window, ins, sums):
    _, of_scores = _slopes(form, plan, windowed, at, window, ins)
    sums[0][...] += _product(ins[3][0], of_scores, (0, 0))

  def end(sums, outs):
    outs[0][...] = sums[0][...].T.reshape(outs[0].shape).astype(outs[0].dtype)

  return _Tile(_zeros, add, end)


def _keys_tile(form: Form, plan: _Plan, windowed: bool) -> _Tile:
  def add(at, window, ins, sums):
    to_k, to_v = sums
    weights, of_scores = _slopes(form, plan, windowed, at[::-1], window, ins)
    q, given = (ins[i][...].reshape(plan.columns, plan.head_dim) for i in (2, 5))
    to_k[...] += _product(of_scores, q.astype(of_scores.dtype), (1, 0))
    to_v[...] += _product(weights.astype(given.dtype), given, (1, 0))

  def end(sums, outs):
    for ref, out in zip(sums, outs, strict=True):
      out[0] = ref[...].astype(out.dtype)

  return _Tile(_zeros, add, end)


def _slopes(form, plan, windowed, at, window, ins) -> tuple[Array, Array]:
  """The softmax's weights and the loss's slope in the raw scores, [keys, columns]."""
  scores, slope = _scores(form, plan, windowed, at, window, ins)
  given, log_sums, inner = ins[5:]
  k, v = (ins[i][0] for i in (3, 4))
  weights = jnp.exp(scores - _row(plan, log_sums))
  of_weights = _product(v, given[...].reshape(plan.columns, plan.head_dim), (1, 1))
  of_scores = weights * (of_weights - _row(plan, inner)) * (slope * form.scalar**-0.5)
  return weights, of_scores.astype(k.dtype)


def _scores(form, plan, windowed, at, window, ins) -> tuple[Array, Any]:
  """Scores [keys, columns], lowest where a key is hidden, and the slope of their cap."""
  query_ids, key_ids, q, k = ins[:4]
  keys = k[0]
  queries = q[...].reshape(plan.columns, plan.head_dim).astype(keys.dtype)
  scores, slope = form.scores(_product(keys, queries, (1, 1)))
  query, key = query_ids[0:1, :], key_ids[:, 0:1]
  seen = (key == query) | (key == (query & -_BRANCHES))
  places = (plan.keys, plan.queries)
  query_at = at[0] * plan.queries + jax.lax.broadcasted_iota(jnp.int32, places, 1)
  seen &= at[1] * plan.keys + jax.lax.broadcasted_iota(jnp.int32, places, 0) <= query_at
  if windowed:
    seen &= query_ids[1:2, :] - key_ids[:, 1:2] < window
  hidden = jnp.where(seen, 0.0, _LOWEST)  # scores may sink to -inf, which weighs 0 too
  return scores + jnp.concatenate([hidden] * plan.shared, axis=1), slope


def _row(plan: _Plan, ref) -> Array:
  """[1, columns] of a ref [shared, queries]."""
  return jnp.concatenate([ref[head : head + 1, :] for head in range(plan.shared)], axis=1)


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
  """a and b [., .] summed over one axis of each, in float32."""
  contracted = ((axes[:1], axes[1:]), ((), ()))
  return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)
