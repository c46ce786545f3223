"""Attention within packed rows as a Pallas kernel for GPUs, forward and backward; see `kernel`.

A program of the kernel has one block of queries of one head, or one block of keys of one key head,
and goes through the blocks that this one meets, as many as there are. Queries lie along the rows of
a tile, keys along its columns.

cuDNN's attention is not used: it takes a mask as a bias of the size of the scores, or lengths of
plain causal sequences, and whether a row of ours is one is not known while tracing.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxpref.models.blocked import Form
from jaxpref.models.kernel import (
  BOTTOM,
  FORWARD,
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


def available() -> bool:
  """Whether jax has the part of Pallas that compiles it, which 0.12 means to drop, and every GPU
  here the shared memory that it takes: NVIDIA's since sm_80 do."""
  if importlib.util.find_spec('jax.experimental.pallas.triton') is None:
    return False
  here = jax.local_devices() if jax.default_backend() == 'gpu' else []
  return all(re.match(r'([89]|\d\d)\.', device.compute_capability) for device in here)


def _tiling(queries: int, keys: int, q: Array, k: Array) -> Tiling:
  """Tiles of so many tokens, fewer where heads are wide or in float32.

  Compiled for sm_80, sm_89, sm_90 and sm_120, with heads of 32 to 256, they take at most the 99 KB
  of shared memory that all of these have, and hardly a register spills; sm_100 takes more, and has.
  """
  width, size = max(16, pl.next_power_of_2(q.shape[4])), k.dtype.itemsize
  wide = max(size // 2, width * size // 256)
  return Tiling(q, k, max(16, queries // wide), max(16, keys // wide), width)


def _forward(form: Form, call: Call) -> tuple[Array, ...]:
  q = call.arrays[0]
  given = [('q', q.shape, q.dtype), ('q', q.shape[:-1], jnp.float32)]
  return _call(_forward_block, form, call, 'q', given, FORWARD)


def _to_queries(form: Form, call: Call) -> tuple[Array, ...]:
  q = call.arrays[0]
  return _call(_queries_block, form, call, 'q', [('q', q.shape, q.dtype)], TO_QUERIES)


def _to_keys(form: Form, call: Call) -> tuple[Array, ...]:
  _, k, v, *_ = call.arrays
  given = [('k', k.shape, k.dtype), ('k', v.shape, v.dtype)]
  return _call(_keys_block, form, call, 'k', given, TO_KEYS)


attend_rows = attention(
  Pass(functools.partial(_tiling, 128, 64), 'q', _forward),
  Pass(functools.partial(_tiling, 64, 64), 'q', _to_queries),
  Pass(functools.partial(_tiling, 64, 64), 'k', _to_keys),
)


def _call(
  block: Callable,
  form: Form,
  call: Call,
  outer: str,
  outputs: list[tuple[str, tuple[int, ...], Any]],
  name: str,
) -> tuple[Array, ...]:
  """Runs `block` for every block of `outer`, every head of its own, every row."""
  from jax.experimental.pallas import triton  # on its way out of jax: only who needs it asks for it

  tiling, met, who = call.tiling, call.met, call.who
  each = tiling.shared if outer == 'q' else 1
  q, k, v, *more = call.arrays
  inputs = [('q', who.query), ('q', who.position), ('k', who.key), ('k', who.position)]
  inputs += [('q', q), ('k', k), ('k', v), *(('q', x) for x in more)]

  def spec(of: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    """What is `outer`: this block, of its own head. What it meets: the row, of all those heads."""
    size = tiling.queries if of == 'q' else tiling.keys
    if len(shape) == 2:  # who they are, which all heads share
      if of == outer:
        return pl.BlockSpec((None, size), lambda i, h, n: (n, i))
      return pl.BlockSpec((None, tiling.padded), lambda i, h, n: (n, 0))
    tail = shape[4:]
    if of == outer:
      return pl.BlockSpec(
        (None, None, None, size, *tail),
        lambda i, h, n: (n, jax.lax.div(h, each), jax.lax.rem(h, each), i, *(0,) * len(tail)),
      )
    return pl.BlockSpec(
      (None, None, *shape[2:]),
      lambda i, h, n: (n, jax.lax.div(h, each), *(0,) * len(shape[2:])),
    )

  blocks, most = met.order.shape[1:]
  warps = 4 if tiling.width * k.dtype.itemsize <= 128 else 8
  found = pl.pallas_call(
    functools.partial(_program, block, form, tiling, call.window is not None),
    grid=(blocks, tiling.kv_heads * each, tiling.rows_in_all),
    in_specs=[
      pl.BlockSpec((None, None, most), lambda i, h, n: (n, i, 0)),
      pl.BlockSpec((None, 1), lambda i, h, n: (n, i)),
      pl.BlockSpec((1,), lambda i, h, n: (0,)),
      *(spec(of, x.shape) for of, x in inputs),
    ],
    out_specs=[spec(of, shape) for of, shape, _ in outputs],
    out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
    name=name,
  )(
    met.order,
    met.counts,
    jnp.zeros(1, jnp.int32) if call.window is None else call.window.reshape(1),
    *(x for _, x in inputs),
  )
  return tuple(found)


class _Given(NamedTuple):
  """What a program reads."""

  tiling: Tiling
  order: Any
  count: Any
  window: Array | None
  query: tuple[Any, Any]  # code and position
  key: tuple[Any, Any]
  q: Any
  k: Any
  v: Any


def _program(block, form, tiling, windowed, order, count, window, *refs):
  query, key, (q, k, v), more = refs[:2], refs[2:4], refs[4:7], refs[7:]
  near = window[0] if windowed else None
  block(form, _Given(tiling, order, count, near, query, key, q, k, v), *more)


def _forward_block(form: Form, given: _Given, out_ref, log_sums_ref):
  tiling = given.tiling
  q = given.q[...].astype(given.k.dtype)
  query = _own(given, given.query, tiling.queries, 0)

  def add(head, where, first, sums):
    top, total, out = sums
    scores, _ = form.scores(product(q, given.k[head, where, :], (1, 1)))
    key = _tokens(given, given.key, where, first, 1)
    top, weights, fade = risen(top, scores + hidden(query, key, given.window), 1)
    v = given.v[head, where, :]
    total = fade * total + weights.sum(1, keepdims=True)
    return top, total, fade * out + product(weights.astype(v.dtype), v, (1, 0))

  top, total = (jnp.full((tiling.queries, 1), x, jnp.float32) for x in (BOTTOM, 0))
  sums = top, total, _zeros(tiling.queries, tiling.width)
  top, total, out = _walk(given, add, 1, tiling.keys, sums)
  total = jnp.maximum(total, TINY)
  out_ref[...] = (out / total).astype(out_ref.dtype)
  log_sums_ref[...] = (top + jnp.log(total))[:, 0]


def _queries_block(form: Form, given: _Given, above_ref, log_sums_ref, inner_ref, to_q_ref):
  tiling = given.tiling
  q, above = given.q[...].astype(given.k.dtype), above_ref[...]
  log_sums, inner = log_sums_ref[...][:, None], inner_ref[...][:, None]
  query = _own(given, given.query, tiling.queries, 0)

  def add(head, where, first, to_q):
    k, v = given.k[head, where, :], given.v[head, where, :]
    unseen = hidden(query, _tokens(given, given.key, where, first, 1), given.window)
    raw, of_weights = product(q, k, (1, 1)), product(above, v, (1, 1))
    _, of_scores = _slopes(form, unseen, raw, of_weights, log_sums, inner)
    return to_q + product(of_scores.astype(k.dtype), k, (1, 0))

  to_q = _walk(given, add, 1, tiling.keys, _zeros(tiling.queries, tiling.width))
  to_q_ref[...] = to_q.astype(to_q_ref.dtype)


def _keys_block(form: Form, given: _Given, above_ref, log_sums_ref, inner_ref, to_k_ref, to_v_ref):
  """Its tiles are turned, keys by queries: operands of a product come as they lie in memory."""
  tiling = given.tiling
  k, v = given.k[...], given.v[...]
  key = _own(given, given.key, tiling.keys, 0)

  def add(head, where, first, sums):
    to_k, to_v = sums
    q, above = given.q[head, where, :].astype(k.dtype), above_ref[head, where, :]
    log_sums, inner = (x[head, where][None, :] for x in (log_sums_ref, inner_ref))
    unseen = hidden(_tokens(given, given.query, where, first, 1), key, given.window)
    raw, of_weights = product(k, q, (1, 1)), product(v, above, (1, 1))
    weights, of_scores = _slopes(form, unseen, raw, of_weights, log_sums, inner)
    to_v += product(weights.astype(v.dtype), above, (1, 0))
    return to_k + product(of_scores.astype(k.dtype), q, (1, 0)), to_v

  nothing = _zeros(tiling.keys, tiling.width)
  to_k, to_v = _walk(given, add, tiling.shared, tiling.queries, (nothing, nothing))
  to_k_ref[...], to_v_ref[...] = to_k.astype(to_k_ref.dtype), to_v.astype(to_v_ref.dtype)


def _slopes(form, unseen, raw, of_weights, log_sums, inner) -> tuple[Array, Array]:
  """The softmax's weights and the loss's slope in the raw scores, from two products."""
  scores, slope = form.scores(raw)
  return form.gradient(scores + unseen, slope, log_sums, of_weights, inner)


def _zeros(*shape: int) -> Array:
  return jnp.zeros(shape, jnp.float32)


def _walk(given: _Given, add: Callable, heads: int, size: int, sums):
  """`add(head, its tokens, the first of them, sums)` for all heads of each block that is met."""

  def step(t, sums):
    first = given.order[jax.lax.div(t, heads)] * size
    return add(jax.lax.rem(t, heads), pl.ds(first, size), first, sums)

  return jax.lax.fori_loop(0, given.count[0] * heads, step, sums)


def _own(given: _Given, refs, size: int, axis: int) -> Tokens:
  return _tokens(given, refs, slice(None), pl.program_id(0) * size, axis)


def _tokens(given: _Given, refs, where, first, axis: int) -> Tokens:
  code = jnp.expand_dims(refs[0][where], 1 - axis)
  at = first + jax.lax.broadcasted_iota(jnp.int32, code.shape, axis)
  near = None if given.window is None else jnp.expand_dims(refs[1][where], 1 - axis)
  return Tokens(code, at, near)
