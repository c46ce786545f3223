"""Packed rows -> per-token fields [B, K, T], without ever holding logits for all tokens.

Hidden states of the scored tokens' predecessors are gathered, cut into chunks, and each chunk
meets the LM head under `jax.checkpoint`: its logits live only while the chunk does, in the forward
pass and again in the backward one (`Model.keep_logits` trades memory for this product). Every
requested field comes from that one pass.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref import masked
from jaxpref.models import Model, States, fold, held, unfold
from jaxpref.models.decoder import LOGITS
from jaxpref.typing import AnyArray, Array, Batch, Params

CHUNK = 256  # scored tokens whose logits are held at once, per group


class Logits(NamedTuple):
  """What a chunk function may use; float32 over C tokens.

  Of a live reference, where a field in `DIVERGENCES` is asked for, `ref_logps` are the log-probs of
  the whole vocabulary.
  """

  logits: Array  # [..., C, V]
  logsumexp: Array  # [..., C]
  targets: Array  # int32 [..., C]
  ref_logps: Array | None = None  # [..., C, V]


def _target_logits(x: Logits) -> Array:
  return jnp.take_along_axis(x.logits, x.targets[..., None], axis=-1)[..., 0]


def logps(x: Logits) -> Array:
  """log π(target) = logit[target] - logsumexp(logits)."""
  return _target_logits(x) - x.logsumexp


def old_logps(x: Logits) -> Array:
  """`logps` without a gradient: of the policy that sampled, where that is the one being trained.

  Batches of samples that are used more than once bring their own.
  """
  return jax.lax.stop_gradient(logps(x))


def entropy(x: Logits) -> Array:
  """H(π) = logsumexp - Σᵥ πᵥ · logitᵥ, in nats."""
  probs = jnp.exp(x.logits - x.logsumexp[..., None])
  return x.logsumexp - jnp.sum(probs * x.logits, axis=-1)


def logsumexp(x: Logits) -> Array:
  """log Z, what z-loss regularises."""
  return x.logsumexp


def log_sum_sq_probs(x: Logits) -> Array:
  """log Σᵥ πᵥ², the log-probability that two draws agree (WPO's alignment of on-policyness)."""
  return jax.nn.logsumexp(2 * x.logits, axis=-1) - 2 * x.logsumexp


def reverse_kl(x: Logits) -> Array:
  """KL(π ‖ π_ref) = Σᵥ πᵥ (log πᵥ - log π_refᵥ) over the vocabulary, in nats."""
  ours = x.logits - x.logsumexp[..., None]
  return jnp.sum(jnp.exp(ours) * (ours - _reference(x)), axis=-1)


def forward_kl(x: Logits) -> Array:
  """KL(π_ref ‖ π) = Σᵥ π_refᵥ (log π_refᵥ - log πᵥ) over the vocabulary, in nats."""
  ours, theirs = x.logits - x.logsumexp[..., None], _reference(x)
  return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def _reference(x: Logits) -> Array:
  assert x.ref_logps is not None
  return x.ref_logps


DIVERGENCES = {'reverse_kl': reverse_kl, 'forward_kl': forward_kl}  # of a live reference
FIELDS = {
  'logps': logps,
  'old_logps': old_logps,
  'entropy': entropy,
  'logsumexp': logsumexp,
  'log_sum_sq_probs': log_sum_sq_probs,
  **DIVERGENCES,
}
REWARDS = 'rewards'  # what a model with scores says at every scored token, itself included
VALUES = 'values'  # what a critic says before every scored token
DRAWN = 'drawn_logps'  # of a batch: what the sampler made of the tokens, under the policy itself
# What the routers of a mixture of experts did, [G, B, E] and [G, B]: sums over a group's tokens and
# layers, standing at its first example.
ROUTER = {'router_picks': 'picks', 'router_probs': 'probs', 'router_tokens': 'tokens'}
KNOWN = (*FIELDS, REWARDS, VALUES, *ROUTER)


class ActorCritic(NamedTuple):
  """A policy and its critic, models with parameters {'policy': ..., 'critic': ...}.

  The critic is a model with one score, of any size, that reads the same tokens; or, `shared`, one
  score on the policy's own states, and that score's are all of the critic's parameters.
  """

  policy: Model
  critic: Model
  shared: bool = False

  @property
  def config(self):
    return self.policy.config

  def param_shapes(self) -> Params:
    critic = self.critic.param_shapes()
    own = {'score': critic['score']} if self.shared else critic
    return {'policy': self.policy.param_shapes(), 'critic': own}


def policy_of(model: Model | ActorCritic) -> Model:
  return model.policy if isinstance(model, ActorCritic) else model


def policy_params(params: Params) -> Params:
  """Of a policy with a critic the policy's parameters; else all."""
  return params['policy'] if set(params) == {'policy', 'critic'} else params


def log_probs(
  model: Model | ActorCritic,
  params: Params,
  batch: Batch,
  fields: Sequence[str] = ('logps',),
  *,
  chunk: int = CHUNK,
  reference: Params | None = None,
) -> dict[str, Array]:
  """Per-token fields of one microbatch.

  Args:
    batch: without its leading M: rows [G, R, L], scored [G, N], mask [G, B, K, T].
    fields: names in `KNOWN`.
    chunk: scored tokens of a group that meet the head at once.
    reference: parameters of a live reference, for the fields in `DIVERGENCES`; no gradient.

  Returns:
    name -> float32 [G, B, K, T], 0 where `mask` is False; rewards of a model with n > 1 scores are
    [G, B, K, T, n]; for those of `ROUTER` see there.

  Raises:
    ValueError: for an unknown field, a router's of a model without experts, a divergence without
      a reference, rewards of a model without scores, or values of one with other than one.
  """
  unknown = [name for name in fields if name not in KNOWN]
  if unknown:
    raise ValueError(f'log_probs cannot compute {unknown}; it knows {sorted(KNOWN)}')
  if not isinstance(model, ActorCritic):
    scorer, score_params = model, params
  elif model.shared:
    both = {**params['policy'], **params['critic']}
    scorer, score_params = model.critic, {name: both[name] for name in model.critic.param_shapes()}
    model, params = model.policy, params['policy']
  else:
    ours = [name for name in fields if name != VALUES]
    found = {}
    if ours:
      found = log_probs(
        model.policy, params['policy'], batch, ours, chunk=chunk, reference=reference
      )
    if VALUES in fields:
      found |= log_probs(model.critic, params['critic'], batch, (VALUES,))
    return found
  routed = {name: ROUTER[name] for name in fields if name in ROUTER}
  divergences = [name for name in fields if name in DIVERGENCES]
  if divergences and reference is None:
    raise ValueError(f'{divergences} are divergences from a live reference, and none is given')
  scores = [name for name in fields if name in (REWARDS, VALUES)]
  labels = scorer.config.num_labels
  if scores and (not labels or (VALUES in scores and labels > 1)):
    raise ValueError(
      f'{scores} come from a model with one score (num_labels=1); this one has '
      f'{labels or "none, but a language-model head"}'
    )
  states, routing = hidden(model, params, batch)
  if routed and routing is None:
    raise ValueError(f'{sorted(routed)} are of mixtures of experts; this model has none')
  shape, parts = batch.fields['mask'].shape, states.division.parts
  asked = [name for name in fields if name in FIELDS]
  if asked or VALUES in scores:
    before = states.at(batch.scored.before)
  values = {}
  if asked:
    tokens = _flat([rows.tokens for rows in batch.rows])
    targets = fold(jnp.take_along_axis(tokens, batch.scored.at, axis=1), parts)
    theirs = None
    if divergences:
      frozen = jax.lax.stop_gradient(reference)
      theirs = frozen, hidden(model, frozen, batch)[0].at(batch.scored.before)
    values = head(model, params, before, targets, asked, chunk=chunk, reference=theirs)
  if REWARDS in scores:
    rewards = scorer.scores(score_params, states.at(batch.scored.at))
    values[REWARDS] = rewards if labels > 1 else rewards[..., 0]
  if VALUES in scores:
    values[VALUES] = scorer.scores(score_params, before)[..., 0]
  slots = batch.scored.cell.shape[1]
  values = {name: unfold(value, parts, slots) for name, value in values.items()}
  out = {name: scatter(value, batch.scored.cell, shape) for name, value in values.items()}
  for name, part in routed.items():
    sums = getattr(routing, part).sum(0)  # over layers: [G, E] or [G]
    out[name] = jnp.zeros((shape[0], shape[1], *sums.shape[1:])).at[:, 0].set(sums)
  return out


def stacked(
  model: Model | ActorCritic,
  params: Params,
  batch: Batch,
  fields: Sequence[str] = ('logps',),
  *,
  chunk: int = CHUNK,
  reference: Params | None = None,
) -> dict[str, Array]:
  """`log_probs` of a batch's M microbatches one after the other: name -> [M, G, B, K, T]."""

  def one(_: None, micro: Batch) -> tuple[None, dict[str, Array]]:
    return None, log_probs(model, params, micro, fields, chunk=chunk, reference=reference)

  return jax.lax.scan(one, None, batch)[1]


def hidden(model: Model, params: Params, batch: Batch) -> tuple[States, Any]:
  """The states of all tokens, and what routers did, if there are any."""
  tokens = tuple(rows.tokens for rows in batch.rows)
  return model.states(params, tokens, tuple(rows.layout for rows in batch.rows))


def head(
  model: Model,
  params: Params,
  states: Array,
  targets: Array,
  fields: Sequence[str],
  *,
  chunk: int = CHUNK,
  reference: tuple[Params, Array] | None = None,
) -> dict[str, Array]:
  """Fields [G, N] of states [G, N, D] and targets int32 [G, N], `chunk` tokens at a time.

  `reference` are a live reference's parameters and its states, like `states`.
  """
  groups, slots = states.shape[:2]
  count = -(-slots // chunk)
  chunk = -(-slots // (8 * count)) * 8  # equally full, a multiple of 8
  pad = count * chunk - slots

  def chunks(x: Array) -> Array:  # [G, N, ...] -> [N / chunk, G, chunk, ...]
    padded = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
    return padded.reshape(groups, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

  kept = jax.checkpoint_policies.save_only_these_names(LOGITS) if model.keep_logits else None

  @functools.partial(jax.checkpoint, policy=kept)
  def one(
    params: Params, ref_params: Params, states: Array, targets: Array, theirs: Any
  ) -> Mapping:
    logits = model.unembed(held(params), states)
    ref_logps = None if theirs is None else jax.nn.log_softmax(model.unembed(ref_params, theirs))
    x = Logits(logits, jax.nn.logsumexp(logits, axis=-1), targets, ref_logps)
    return {name: FIELDS[name](x) for name in fields}

  ref_params, theirs = reference or (None, None)
  xs = jax.tree.map(chunks, (states, targets, theirs))
  _, values = jax.lax.scan(lambda _, xs: (None, one(params, ref_params, *xs)), None, xs)
  return {name: v.swapaxes(0, 1).reshape(groups, -1)[:, :slots] for name, v in values.items()}


def scatter(values: Array, cell: Array, shape: tuple[int, ...]) -> Array:
  """Puts values [G, N, ...] at flat cells [G, N] of [G, B, K, T, ...]; others are dropped."""
  flat = jnp.zeros((shape[0], shape[1] * shape[2] * shape[3], *values.shape[2:]), values.dtype)
  put = jax.vmap(lambda f, c, v: f.at[c].set(v, mode='drop'))
  return put(flat, cell, values).reshape(*shape, *values.shape[2:])


def _flat(rows: Sequence[Array]) -> Array:
  """Rows [G, R_i, L_i, ...] end to end: [G, S, ...]."""
  return jnp.concatenate([r.reshape(r.shape[0], -1, *r.shape[3:]) for r in rows], axis=1)


def logp_difference(sampler: AnyArray, training: AnyArray, mask: AnyArray) -> dict[str, Array]:
  """How far the sampler's log-probs of the tokens [B, K, T] are from a training forward's."""
  away = jnp.abs(jnp.asarray(training) - sampler)
  return {
    'sampling/logp_difference/mean': masked.mean(away, mask),
    'sampling/logp_difference/max': masked.max(away, mask),
  }
