"""Long rows divided over the mesh axis `context`: each device holds a part of every row's tokens.

A row of L tokens, filled up to a multiple of 2C, is cut into 2C pieces, and device c of the C holds
pieces c and 2C-1-c: attention looks backwards only, so the two together are as much work for every
c. Their tokens stand as a group of their own, [G * C, S / C], for all that goes token by token;
only attention and the scored tokens' states cross.

Keys and values of a row are gathered where its queries are, as in "The Llama 3 Herd of Models",
Grattafiori et al., section 3.3.2: https://arxiv.org/abs/2407.21783. With a few key heads they are
small beside the states, and packed rows' masks need no care, as they would in a ring. They are
gathered again for the gradient, so what is kept between the passes is divided. Ids and positions
are a few integers a token: every device has those of whole rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxpref.models.blocked import Form, block, block_gradient, inner_product, named, sees
from jaxpref.models.placement import group_axes, grouped
from jaxpref.typing import Array, Layout

AXIS = 'context'
BLOCK = 256  # queries whose scores are held at once, at most


def fold(x: Array, parts: int) -> Array:
  """[G, N, ...] -> [G * C, N / C, ...], N filled up with zeros to a multiple of C."""
  if parts == 1:
    return x
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % parts), *((0, 0),) * (x.ndim - 2)))
  return x.reshape(x.shape[0] * parts, -1, *x.shape[2:])


def unfold(x: Array, parts: int, count: int) -> Array:
  """`fold` undone: [G, count, ...]."""
  if parts == 1:
    return x
  return x.reshape(x.shape[0] // parts, -1, *x.shape[2:])[:, :count]


class Division(NamedTuple):
  """Rows of which lengths are divided, and over how many devices.

  Attributes:
    rows: (R, L) of each row length.
    parts: C.
  """

  rows: tuple[tuple[int, int], ...]
  parts: int

  def piece(self, length: int) -> int:
    """Tokens of one of the 2C pieces of a row."""
    size = -(-length // (2 * self.parts))
    return -(-size // _blocks(size)) * _blocks(size)

  def divide(self, rows: Sequence[Array]) -> Array:
    """Arrays [G, R, L, ...], one for each row length -> [G * C, S / C, ...]; zeros fill up.

    Undivided they lie end to end.
    """
    if self.parts == 1:
      return jnp.concatenate([x.reshape(x.shape[0], -1, *x.shape[3:]) for x in rows], axis=1)
    out = []
    for x, (_, length) in zip(rows, self.rows, strict=True):
      size = self.piece(length)
      fill = 2 * self.parts * size - length
      x = jnp.pad(x, ((0, 0), (0, 0), (0, fill), *((0, 0),) * (x.ndim - 3)))
      x = x.reshape(*x.shape[:2], 2 * self.parts, size, *x.shape[3:])
      x = jnp.stack([x[:, :, : self.parts], x[:, :, : self.parts - 1 : -1]], axis=3)
      out.append(jnp.moveaxis(x, 2, 1).reshape(x.shape[0], self.parts, -1, *x.shape[5:]))
    whole = jnp.concatenate(out, axis=2)
    return whole.reshape(-1, *whole.shape[2:])

  def unite(self, x: Array) -> tuple[Array, ...]:
    """`divide` undone."""
    if self.parts == 1:
      ends = np.cumsum([count * length for count, length in self.rows])
      pieces = jnp.split(x, ends[:-1], axis=1)
      return tuple(
        y.reshape(y.shape[0], *shape, *y.shape[2:])
        for y, shape in zip(pieces, self.rows, strict=True)
      )
    x, out, start = x.reshape(-1, self.parts, *x.shape[1:]), [], 0
    for count, length in self.rows:
      size = self.piece(length)
      part = x[:, :, start : start + 2 * count * size]
      part = jnp.moveaxis(part.reshape(*x.shape[:2], count, 2, size, *x.shape[3:]), 1, 2)
      both = jnp.concatenate([part[:, :, :, 0], part[:, :, ::-1, 1]], axis=2)
      out.append(both.reshape(*both.shape[:2], -1, *both.shape[4:])[:, :, :length])
      start += 2 * count * size
    return tuple(out)

  def places(self) -> Array:
    """Where the tokens of rows laid end to end, [S], stand in [C * S / C]."""
    size = sum(2 * count * self.piece(length) for count, length in self.rows)
    found = self.unite(jnp.arange(self.parts * size).reshape(self.parts, size))
    return jnp.concatenate([x.reshape(-1) for x in found])


class States(NamedTuple):
  """Final states of rows, [G * C, S / C, D], as `division` lays them."""

  values: Array
  division: Division

  def rows(self) -> tuple[Array, ...]:
    """[G, R, L, D] of each row length."""
    return self.division.unite(self.values)

  def at(self, index: Array) -> Array:
    """Those of tokens int32 [G, N] of the rows laid end to end: `fold`ed, [G * C, N / C, D].

    Divided states go round: each device picks its share of the N from one part after another. To
    gather them would put the states of whole rows on every device, and to add up what each finds,
    those of all scored tokens.
    """
    parts = self.division.parts
    if parts == 1:
      return grouped(jnp.take_along_axis(self.values, index[:, :, None], axis=1))
    index = fold(self.division.places()[index], parts)
    pick = _manual(_pick, 2, 1)
    (found,) = pick(*(x.reshape(-1, parts, *x.shape[1:]) for x in (self.values, index)))
    return grouped(found.reshape(-1, *found.shape[2:]))


class Divided:
  """Attention within rows that are divided, as `blocked.Flat`."""

  def __init__(self, form: Form, division: Division, layouts: tuple[Layout, ...]):
    self.form, self.division = form, division
    fills = (2 * division.parts * division.piece(length) - length for _, length in division.rows)
    self.layouts = [
      jax.tree.map(lambda x, fill=fill: jnp.pad(x, ((0, 0), (0, 0), (0, fill))), layout)
      for layout, fill in zip(layouts, fills, strict=True)
    ]

  def __call__(self, q, k, v, window, index, memory):
    """q [G * C, S / C, H, head_dim], k and v with kv heads -> as q."""
    parts, outs, start = self.division.parts, [], 0
    for layout, (count, length) in zip(self.layouts, self.division.rows, strict=True):
      size = self.division.piece(length)
      stop = start + 2 * count * size
      pieces = (
        x[:, start:stop].reshape(-1, parts, count, 2, size, *x.shape[2:]).swapaxes(4, 5)
        for x in (q, k, v)
      )
      out = attend_divided(self.form, *pieces, layout, window).swapaxes(4, 5)
      outs.append(out.reshape(q.shape[0], -1, *q.shape[2:]))
      start = stop
    return jnp.concatenate(outs, axis=1), memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_divided(
  form: Form, q: Array, k: Array, v: Array, layout: Layout, window: Array | None
) -> Array:
  """`blocked.attend_rows` of rows whose pieces lie on the devices of `context`.

  Args:
    form, window: as there.
    q: [G, C, R, 2, H, L / 2C, head_dim], C over `context`.
    k, v: the same with kv heads.
    layout: of whole rows, int32 [G, R, L].

  Returns:
    As q.
  """
  return _forward(form, q, k, v, layout, window)[0]


def _forward(form, q, k, v, layout, window):
  call = _manual(functools.partial(_forward_part, form), 3, 2)
  out, log_sums = named(*call(q, k, v, layout, window))
  return out, (q, k, v, layout, window, out, log_sums)


def _backward(form, kept, given):
  q, k, v, layout, window, out, log_sums = kept
  call = _manual(functools.partial(_backward_part, form), 6, 3)
  return *call(q, k, v, out, log_sums, given, layout, window), None, None


attend_divided.defvjp(_forward, _backward)


def _forward_part(form, q, k, v, layout, window):
  keys, values = _whole(k), _whole(v)

  def one(_, seen, q):
    return None, block(form, q, *(_until(x, seen) for x in (keys, values)), seen)

  _, out = _over_blocks(one, None, (q,), layout, window)
  return out


def _backward_part(form, q, k, v, out, log_sums, given, layout, window):
  keys, values = _whole(k), _whole(v)

  def one(sums, seen, *own):
    of_q, *more = block_gradient(form, *own, *(_until(x, seen) for x in (keys, values)), seen)
    stop = seen.shape[-1]
    more = (y.swapaxes(-1, -2) for y in more)
    return [x.at[..., :stop, :].add(y) for x, y in zip(sums, more, strict=True)], (of_q,)

  sums = [jnp.zeros(x.shape, jnp.float32) for x in (keys, values)]
  own = q, log_sums, inner_product(given, out), given
  (to_k, to_v), (to_q,) = _over_blocks(one, sums, own, layout, window)
  return to_q.astype(q.dtype), _share(to_k, k), _share(to_v, v)


def _over_blocks(one: Callable, carry: Any, own: Sequence[Array], layout: Layout, window) -> Any:
  """Scans `one(carry, seen, *blocks of own)` over the queries of this device, both its pieces.

  The first piece lies in the first half of its row, so it meets no keys beyond that.
  """
  size, outs = own[0].shape[-2], []
  parts, here = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  count = _blocks(size)
  for half, piece in enumerate((here, 2 * parts - 1 - here)):
    keys = jax.tree.map(lambda x, stop=(half + 1) * parts * size: x[..., :stop], layout)

    def body(carry, scanned, piece=piece, keys=keys):
      i, *blocks = scanned
      start = piece * size + i * (size // count)
      cut = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size // count, axis=-1
      )
      return one(carry, sees(jax.tree.map(cut, layout), keys, start, window), *blocks)

    blocks = (
      jnp.moveaxis(y.reshape(*y.shape[:-2], count, -1, y.shape[-1]), -3, 0)
      for y in (x[:, 0, :, half] for x in own)
    )
    carry, found = jax.lax.scan(body, carry, (jnp.arange(count), *blocks))
    outs.append([jnp.moveaxis(x, 0, -3) for x in found])
  joined = (
    jnp.stack([x.reshape(*x.shape[:-3], size, x.shape[-1]) for x in pair], axis=2)[:, None]
    for pair in zip(*outs, strict=True)
  )
  return carry, tuple(joined)


def _whole(x: Array) -> Array:
  """Rows [G, R, heads, L, head_dim] of all devices' pieces [G, 1, R, 2, heads, n, head_dim]."""
  x = jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
  x = jnp.concatenate([x[:, :, :, 0], x[:, ::-1, :, 1]], axis=1)
  x = jnp.moveaxis(x, 1, 3)
  return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _share(x: Array, like: Array) -> Array:
  """`_whole` transposed: what all devices have for the pieces of this one, added up."""
  parts = jax.lax.axis_size(AXIS)
  x = jnp.moveaxis(x.reshape(*x.shape[:3], 2 * parts, -1, x.shape[-1]), 3, 1)
  x = jnp.stack([x[:, :parts], x[:, : parts - 1 : -1]], axis=3)
  return jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True).astype(like.dtype)


def _until(x: Array, seen: Array) -> Array:
  return x[..., : seen.shape[-1], :]


def _pick(states: Array, index: Array) -> tuple[Array]:
  """The states [G, 1, N / C, D] at `index` [G, 1, N / C] of [C * n], n of them here at a time."""
  parts, here = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  states, index = states[:, 0], index[:, 0]
  count, found = states.shape[1], jnp.zeros((*index.shape, states.shape[-1]), states.dtype)
  for step in range(parts):
    local = index - (here + step) % parts * count
    mine = (local >= 0) & (local < count)
    own = jnp.take_along_axis(states, jnp.where(mine, local, 0)[:, :, None], axis=1)
    found = jnp.where(mine[:, :, None], own, found)
    if step + 1 < parts:
      states = jax.lax.ppermute(states, AXIS, [(i, (i - 1) % parts) for i in range(parts)])
  return (found[:, None],)


def _manual(call: Callable, ins: int, outs: int) -> Callable:
  """`call` on each device's part along `context` of axis 1 of its first `ins` arguments.

  Groups, axis 0 of all arrays, are divided by hand too: left to the compiler, those of all devices
  would be gathered before their keys are. Heads, over `tensor`, are its own to divide.
  """

  def sharded(*args):
    axes = group_axes(args[0].shape[0])
    split, whole = P(axes or None, AXIS), P(axes or None)

    def spec(i: int, x: Array) -> P:
      return split if i < ins else whole if jnp.ndim(x) else P()

    specs = tuple(jax.tree.map(functools.partial(spec, i), x) for i, x in enumerate(args))
    return jax.shard_map(
      call,
      in_specs=specs,
      out_specs=(split,) * outs,
      axis_names={*axes, AXIS},
      check_vma=False,
    )(*args)

  return sharded


def _blocks(size: int) -> int:
  """Of how many equal blocks of queries a piece consists."""
  return -(-size // BLOCK)
