"""Packed rows -> per-token fields [B, K, T], without ever holding logits for all tokens.

Hidden states of the scored tokens' predecessors are gathered, cut into chunks, and each chunk
meets the LM head under `jax.checkpoint`: its logits live only while the chunk does, in the forward
pass and again in the backward one. Every requested field comes from that one pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.models import Model, grouped
from jaxpref.typing import Array, Batch, Params

CHUNK = 256  # scored tokens whose logits are held at once, per group


class Logits(NamedTuple):
  """What a chunk function may use; float32 over C tokens."""

  logits: Array  # [..., C, V]
  logsumexp: Array  # [..., C]
  targets: Array  # int32 [..., C]


def _target_logits(x: Logits) -> Array:
  return jnp.take_along_axis(x.logits, x.targets[..., None], axis=-1)[..., 0]


def logps(x: Logits) -> Array:
  """log π(target) = logit[target] - logsumexp(logits)."""
  return _target_logits(x) - x.logsumexp


def entropy(x: Logits) -> Array:
  """H(π) = logsumexp - Σᵥ πᵥ · logitᵥ, in nats."""
  probs = jnp.exp(x.logits - x.logsumexp[..., None])
  return x.logsumexp - jnp.sum(probs * x.logits, axis=-1)


def logsumexp(x: Logits) -> Array:
  """log Z, what z-loss regularises."""
  return x.logsumexp


FIELDS = {'logps': logps, 'entropy': entropy, 'logsumexp': logsumexp}
# What the routers of a mixture of experts did, [G, B, E] and [G, B]: sums over a group's tokens and
# layers, standing at its first example.
ROUTER = {'router_picks': 'picks', 'router_probs': 'probs', 'router_tokens': 'tokens'}
KNOWN = (*FIELDS, *ROUTER)


def log_probs(
  model: Model,
  params: Params,
  batch: Batch,
  fields: Sequence[str] = ('logps',),
  *,
  chunk: int = CHUNK,
) -> dict[str, Array]:
  """Per-token fields of one microbatch.

  Args:
    batch: without its leading M: rows [G, R, L], scored [G, N], mask [G, B, K, T].
    fields: names in `FIELDS` or `ROUTER`.
    chunk: scored tokens of a group that meet the head at once.

  Returns:
    name -> float32 [G, B, K, T], 0 where `mask` is False; for those of `ROUTER` see there.

  Raises:
    ValueError: for an unknown field, or a router's of a model without experts.
  """
  unknown = [name for name in fields if name not in KNOWN]
  if unknown:
    raise ValueError(f'log_probs cannot compute {unknown}; it knows {sorted(KNOWN)}')
  routed = {name: ROUTER[name] for name in fields if name in ROUTER}
  states, routing = hidden(model, params, batch, with_routing=bool(routed))
  if routed and routing is None:
    raise ValueError(f'{sorted(routed)} are of mixtures of experts; this model has none')
  states = grouped(jnp.take_along_axis(states, batch.scored.before[:, :, None], axis=1))
  tokens = _flat([rows.tokens for rows in batch.rows])
  targets = jnp.take_along_axis(tokens, batch.scored.at, axis=1)
  values = head(model, params, states, targets, [n for n in fields if n in FIELDS], chunk=chunk)
  shape = batch.fields['mask'].shape
  out = {name: scatter(value, batch.scored.cell, shape) for name, value in values.items()}
  for name, part in routed.items():
    sums = getattr(routing, part).sum(0)  # over layers: [G, E] or [G]
    out[name] = jnp.zeros((shape[0], shape[1], *sums.shape[1:])).at[:, 0].set(sums)
  return out


def hidden(
  model: Model, params: Params, batch: Batch, *, with_routing: bool = False
) -> tuple[Array, Any]:
  """The states [G, S, D] of all tokens, rows end to end, and what routers did, if asked."""
  tokens = tuple(rows.tokens for rows in batch.rows)
  layout = tuple(rows.layout for rows in batch.rows)
  if not with_routing:
    return _flat(model.hidden(params, tokens, layout)), None
  states, routing = model.hidden_with_aux(params, tokens, layout)
  return _flat(states), routing


def head(
  model: Model,
  params: Params,
  states: Array,
  targets: Array,
  fields: Sequence[str],
  *,
  chunk: int = CHUNK,
) -> dict[str, Array]:
  """Fields [G, N] of states [G, N, D] and targets int32 [G, N], `chunk` tokens at a time."""
  groups, slots, width = states.shape
  chunk = min(chunk, slots)
  pad = -slots % chunk
  states = jnp.pad(states, ((0, 0), (0, pad), (0, 0))).reshape(groups, -1, chunk, width)
  targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(groups, -1, chunk)

  @jax.checkpoint
  def one(params: Params, states: Array, targets: Array) -> Mapping[str, Array]:
    logits = model.unembed(params, states)
    x = Logits(logits, jax.nn.logsumexp(logits, axis=-1), targets)
    return {name: FIELDS[name](x) for name in fields}

  _, values = jax.lax.scan(
    lambda _, xs: (None, one(params, *xs)), None, (states.swapaxes(0, 1), targets.swapaxes(0, 1))
  )
  return {name: v.swapaxes(0, 1).reshape(groups, -1)[:, :slots] for name, v in values.items()}


def scatter(values: Array, cell: Array, shape: tuple[int, ...]) -> Array:
  """Puts values [G, N] at flat cells [G, N] of [G, B, K, T]; cells out of range are dropped."""
  flat = jnp.zeros((shape[0], shape[1] * shape[2] * shape[3]), values.dtype)
  put = jax.vmap(lambda f, c, v: f.at[c].set(v, mode='drop'))
  return put(flat, cell, values).reshape(shape)


def _flat(rows: Sequence[Array]) -> Array:
  """Rows [G, R_i, L_i, ...] end to end: [G, S, ...]."""
  return jnp.concatenate([r.reshape(r.shape[0], -1, *r.shape[3:]) for r in rows], axis=1)
