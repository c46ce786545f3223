"""Attention within packed rows as a Pallas kernel for TPUs, forward and backward; see `kernel`.

Within a tile keys lie along the rows and the queries of all heads that share a key head along the
columns, so that what belongs to a query is a row and nothing but the two outputs is ever
transposed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpref.models.blocked import Form
from jaxpref.models.kernel import (
  BOTTOM,
  FORWARD,
  PRODUCTS,
  TINY,
  TO_KEYS,
  TO_QUERIES,
  Call,
  Pass,
  Tiling,
  Tokens,
  attention,
  hidden,
  product,
  risen,
)
from jaxpref.typing import Array

LANES = 128
TILE = 256  # keys of a tile, and queries of each head
COLUMNS = 1024  # of a tile, all heads together, where a block of queries may still be halved


def _tiling(q: Array, k: Array) -> Tiling:
  length, shared = q.shape[3], q.shape[2] // k.shape[2]
  keys = TILE if length > LANES else LANES
  queries = keys if shared * keys <= COLUMNS else LANES
  return Tiling(q, k, queries, keys, q.shape[4])


def _forward(form: Form, call: Call) -> tuple[Array, ...]:
  tiling, q = call.tiling, call.arrays[0]
  return _call(
    call,
    _forward_tile(form, tiling, call.window is not None),
    outputs=[('q', q.shape, q.dtype), ('q', q.shape[:-1], jnp.dtype('float32'))],
    scratch=[(1, tiling.columns), (1, tiling.columns), (tiling.width, tiling.columns)],
    outer='q',
    name=FORWARD,
  )


def _to_queries(form: Form, call: Call) -> tuple[Array, ...]:
  tiling, q = call.tiling, call.arrays[0]
  return _call(
    call,
    _queries_tile(form, tiling, call.window is not None),
    outputs=[('q', q.shape, q.dtype)],
    scratch=[(tiling.width, tiling.columns)],
    outer='q',
    name=TO_QUERIES,
  )


def _to_keys(form: Form, call: Call) -> tuple[Array, ...]:
  tiling, (_, k, v, *_) = call.tiling, call.arrays
  return _call(
    call,
    _keys_tile(form, tiling, call.window is not None),
    outputs=[('k', k.shape, k.dtype), ('k', v.shape, v.dtype)],
    scratch=[(tiling.keys, tiling.width)] * 2,
    outer='k',
    name=TO_KEYS,
  )


attend_rows = attention(
  Pass(_tiling, 'q', _forward), Pass(_tiling, 'q', _to_queries), Pass(_tiling, 'k', _to_keys)
)


def _call(
  call: Call,
  tile: '_Tile',
  outputs: list[tuple[str, tuple[int, ...], Any]],
  scratch: list[tuple[int, int]],
  outer: str,
  name: str,
) -> tuple[Array, ...]:
  """Runs `tile` for every row, key head, block of `outer` and block that this one visits."""
  tiling, visited, window, who = call.tiling, call.met, call.window, call.who
  q, k, v, *more = call.arrays
  key_ids = jnp.stack([who.key, who.position], axis=2)
  query_ids = jnp.stack([who.query, who.position], axis=1)
  inputs = [('q', query_ids), ('k', key_ids), ('q', q), ('k', k), ('k', v)]
  inputs += [('q', x) for x in more]

  def spec(of: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    size = tiling.queries if of == 'q' else tiling.keys

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
      grid=(tiling.rows_in_all, tiling.kv_heads, blocks, most),
      in_specs=[spec(of, x.shape) for of, x in inputs],
      out_specs=[spec(of, shape) for of, shape, _ in outputs],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=_cost(tiling, name, outer, inputs, outputs),
    name=name,
  )(
    visited.order,
    visited.counts,
    jnp.zeros(1, jnp.int32) if window is None else window.reshape(1),
    *(x for _, x in inputs),
  )
  return tuple(found)


def _cost(tiling: Tiling, name: str, outer: str, inputs, outputs) -> pl.CostEstimate:
  """What the compiler is to plan its messages by: all that no key ahead of a query asks for.

  Which tiles are skipped is not known to it, so this is the most that a call may cost.
  """
  size = tiling.queries if outer == 'q' else tiling.keys
  visits = (tiling.padded // size + 1) / 2  # of a block that is met, in the mean
  scores = tiling.rows_in_all * tiling.heads * tiling.padded * (tiling.padded + size) // 2
  read = sum(x.nbytes * (1 if of == outer else visits) for of, x in inputs)
  written = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in outputs)
  return pl.CostEstimate(
    flops=2 * PRODUCTS[name] * scores * tiling.width,
    transcendentals=scores,
    bytes_accessed=int(read) + written,
  )


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


def _forward_tile(form: Form, tiling: Tiling, windowed: bool) -> _Tile:
  def begin(sums):
    _zeros(sums)
    sums[0][...] = jnp.full_like(sums[0], BOTTOM)

  def add(at, window, ins, sums):
    top, total, out = sums
    scores, _ = _scores(form, tiling, windowed, at, window, ins)
    higher, weights, fade = risen(top[...], scores, 0)
    v = ins[4][0]
    top[...] = higher
    total[...] = fade * total[...] + weights.sum(0, keepdims=True)
    out[...] = fade * out[...] + product(v, weights.astype(v.dtype), (0, 0))

  def end(sums, outs):
    top, total, out = (x[...] for x in sums)
    total = jnp.maximum(total, TINY)
    outs[0][...] = (out / total).T.reshape(outs[0].shape).astype(outs[0].dtype)
    log_sums = top + jnp.log(total)
    for head in range(tiling.shared):
      at = slice(head * tiling.queries, (head + 1) * tiling.queries)
      outs[1][head : head + 1, :] = log_sums[:, at]

  return _Tile(begin, add, end)


def _queries_tile(form: Form, tiling: Tiling, windowed: bool) -> _Tile:
  def add(at, window, ins, sums):
    _, of_scores = _slopes(form, tiling, windowed, at, window, ins)
    sums[0][...] += product(ins[3][0], of_scores, (0, 0))

  def end(sums, outs):
    outs[0][...] = sums[0][...].T.reshape(outs[0].shape).astype(outs[0].dtype)

  return _Tile(_zeros, add, end)


def _keys_tile(form: Form, tiling: Tiling, windowed: bool) -> _Tile:
  def add(at, window, ins, sums):
    to_k, to_v = sums
    weights, of_scores = _slopes(form, tiling, windowed, at[::-1], window, ins)
    q, given = (ins[i][...].reshape(tiling.columns, tiling.width) for i in (2, 5))
    to_k[...] += product(of_scores, q.astype(of_scores.dtype), (1, 0))
    to_v[...] += product(weights.astype(given.dtype), given, (1, 0))

  def end(sums, outs):
    for ref, out in zip(sums, outs, strict=True):
      out[0] = ref[...].astype(out.dtype)

  return _Tile(_zeros, add, end)


def _slopes(form, tiling, windowed, at, window, ins) -> tuple[Array, Array]:
  """The softmax's weights and the loss's slope in the raw scores, [keys, columns]."""
  scores, slope = _scores(form, tiling, windowed, at, window, ins)
  given, log_sums, inner = ins[5:]
  k, v = (ins[i][0] for i in (3, 4))
  of_weights = product(v, given[...].reshape(tiling.columns, tiling.width), (1, 1))
  log_sums, inner = _row(tiling, log_sums), _row(tiling, inner)
  weights, of_scores = form.gradient(scores, slope, log_sums, of_weights, inner)
  return weights, of_scores.astype(k.dtype)


def _scores(form, tiling, windowed, at, window, ins) -> tuple[Array, Any]:
  """Scores [keys, columns], lowest where a key is hidden, and the slope of their cap."""
  query_ids, key_ids, q, k = ins[:4]
  keys = k[0]
  queries = q[...].reshape(tiling.columns, tiling.width).astype(keys.dtype)
  scores, slope = form.scores(product(keys, queries, (1, 1)))
  places = (tiling.keys, tiling.queries)
  query_at = at[0] * tiling.queries + jax.lax.broadcasted_iota(jnp.int32, places, 1)
  key_at = at[1] * tiling.keys + jax.lax.broadcasted_iota(jnp.int32, places, 0)
  query = Tokens(query_ids[0:1, :], query_at, query_ids[1:2, :])
  key = Tokens(key_ids[:, 0:1], key_at, key_ids[:, 1:2])
  unseen = hidden(query, key, window if windowed else None)
  return scores + jnp.concatenate([unseen] * tiling.shared, axis=1), slope


def _row(tiling: Tiling, ref) -> Array:
  """[1, columns] of a ref [shared, queries]."""
  return jnp.concatenate([ref[head : head + 1, :] for head in range(tiling.shared)], axis=1)
