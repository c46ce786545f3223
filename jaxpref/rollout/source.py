"""The online source: samples, scores and packs, then hands out a rollout's minibatches.

`next(step, params, carry) -> (batch, carry)` is a function of its arguments: all that it knows
between two steps is the carry, a pytree of fixed shapes that checkpoints hold. So a run that is
killed in the middle of PPO's epochs goes on from there, bit for bit.
"""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import advantages, hosts, sharding
from jaxpref.log_probs import (
  DRAWN,
  ActorCritic,
  logp_difference,
  policy_of,
  policy_params,
  stacked,
)
from jaxpref.models import Model, brought_in, without
from jaxpref.objectives import Objective, truncated_importance
from jaxpref.rollout.estimators import Inputs
from jaxpref.rollout.layout import Group, pack, unpack
from jaxpref.rollout.rounds import Rounds
from jaxpref.rollout.samples import Sampler, Scored, Scorer, chosen, differ
from jaxpref.sampling import Samples, Sampling
from jaxpref.typing import Batch, Params

Carry = dict[str, Any]
TOKENS = ('old_logps', 'sampler_logps', DRAWN, 'ref_logps', 'advantages', 'returns', 'old_values')
COLLAPSED = 0.9  # share of groups without any difference in reward that is worth a warning

log = logging.getLogger(__name__)


class Online:
  """Batches of a policy's own samples; see the module.

  Args:
    model: what is trained, a policy or an `ActorCritic`.
    objective: its fields decide what is computed of a rollout.
    sampler, scorer, estimator: samples, their scores, and what becomes of scores.
    rounds: sizes and counts.
    reference: parameters of the policy's reference, which stands still; may be set later. Of a
      policy with adapters it is what they adapt.
    reference_mesh: where it lives; None: where the policy does.
    beta: weight of the KL penalty in the reward, to begin with.
    controller: `(KLState, kl, n) -> KLState`, as in `advantages`.
    cast: parameters -> the sampler's own copy of them.
    show: called with a rollout's number, prompts, texts and scores.
    place: puts a host batch on the devices.
  """

  def __init__(
    self,
    model: Model | ActorCritic,
    objective: Objective,
    sampler: Sampler,
    scorer: Scorer,
    estimator: Callable[[Inputs], Mapping[str, Any]],
    rounds: Rounds,
    *,
    reference: Params | None = None,
    reference_mesh: jax.sharding.Mesh | None = None,
    beta: float = 0.0,
    controller: Callable = advantages.fixed_kl,
    cast: Callable[[Params], Params] = lambda params: params,
    show: Callable[..., None] = lambda *args: None,
    place: Callable[[Batch], Batch] = lambda batch: batch,
  ):
    self.sampler, self.scorer, self.rounds = sampler, scorer, rounds
    self.reference, self._beta, self._controller = reference, beta, controller
    self._cast, self._show, self._place = cast, show, place
    self._reference_mesh = reference_mesh
    self._critic = isinstance(model, ActorCritic)
    self._greedy: Sampler | None = None
    if getattr(estimator, 'greedy', False):
      slots, first = min(sampler.slots, rounds.prompts), Sampling(temperature=0)
      self._greedy = dataclasses.replace(sampler, num_samples=1, slots=slots, sampling=first)
    reads = objective.fields
    if getattr(estimator, 'critic', False) and not self._critic:
      raise ValueError(f'{type(estimator).__name__} needs values: train with a critic')
    # With one step a rollout the policy is the one that sampled: `log_probs` says old_logps itself.
    again = 'old_logps' in reads and (rounds.steps > 1 or rounds.ahead)
    self._names = ('logps',) * bool(again or beta or rounds.target_kl or rounds.importance_cap)
    self._names += ('values',) * self._critic
    self.needs_reference = bool(beta) or 'ref_logps' in reads
    self._compute = jax.jit(functools.partial(_fields, model, self._names))
    self._compute_logps = jax.jit(functools.partial(_fields, policy_of(model), ('logps',)))
    self._estimate = jax.jit(lambda inputs: dict(estimator(inputs)))
    self._report: dict[str, float] = {}
    self._collapses = 0  # rollouts that were warned of, or could have been
    self.row_length = self._row_length()

  def _row_length(self) -> int:
    prompt, sampler = self.sampler.prompts.longest, self.sampler
    least = prompt + sampler.max_new_tokens
    whole = prompt + sampler.num_samples * sampler.max_new_tokens
    length = self.rounds.row_length or max(least, min(whole, 2048))
    if length < least:
      raise ValueError(
        f'batch.row_lengths: rows of {length} tokens do not hold a prompt of {prompt} tokens and '
        f'{sampler.max_new_tokens} new ones'
      )
    return -(-length // 32) * 32

  def begin(self) -> Carry:
    """The carry before the first step: nothing sampled yet."""
    B, K, T = self.rounds.prompts, self.sampler.num_samples, self.sampler.max_new_tokens
    tokens, mask, zeros = (np.zeros((B, K, T), kind) for kind in (np.int32, bool, np.float32))
    carry = {
      'ids': np.zeros(B, np.int32),
      'tokens': tokens,
      'mask': mask,
      'fields': {name: zeros for name in self._stored},
      'cursor': np.int32(self.rounds.steps),
      'rollout': np.int32(0),
      'position': np.int32(0),
      'beta': np.float32(self._beta),
    }
    if self.rounds.ahead:
      carry['flight'] = {
        'ids': np.full(B, -1, np.int32),
        'samples': Samples(*map(jnp.asarray, (tokens, mask, zeros, zeros, mask[..., 0]))),
      }
    return carry

  @property
  def _stored(self) -> tuple[str, ...]:
    """The fields [B, K, T] of a rollout that are kept for its steps."""
    known = {
      'advantages': True,
      'sampler_logps': True,
      'old_logps': 'logps' in self._names,
      # Where no forward pass is paid for, the one step that learns from them compares them.
      DRAWN: 'logps' not in self._names and self.rounds.steps == 1,
      'ref_logps': self.needs_reference,
      'returns': self._critic,
      'old_values': self._critic,
    }
    return tuple(name for name in TOKENS if known[name])

  def report(self) -> dict[str, float]:
    """Metrics of a rollout, once."""
    found, self._report = self._report, {}
    return found

  def next(self, step: int, params: Params, carry: Carry) -> tuple[Batch, Carry]:
    """The batch of optimizer step `step`, with a new rollout where the last one is used up."""
    if carry['cursor'] >= self.rounds.steps or self._strayed(params, carry):
      carry = self._collect(params, carry)
    rows = self.rounds.rows(int(carry['rollout']), int(carry['cursor']))
    return self.packed(carry, rows, self.rounds.shards), {
      **carry,
      'cursor': np.int32(carry['cursor'] + 1),
    }

  def _strayed(self, params: Params, carry: Carry) -> bool:
    """Whether, as a further pass begins, the policy is too far from the one that sampled."""
    if not self.rounds.target_kl or carry['cursor'] % self.rounds.minibatches:
      return False
    now = self._forward(self._compute_logps, policy_params(params), carry)['logps']
    mask = carry['mask']
    away = float(np.sum(np.where(mask, carry['fields']['old_logps'] - now, 0)) / max(mask.sum(), 1))
    self._report |= {'policy/kl_at_epoch': away}
    return away > self.rounds.target_kl

  def _collect(self, params: Params, carry: Carry) -> Carry:
    """A rollout: sampled, scored and turned into fields."""
    began = time.monotonic()
    under = without(policy_params(params))
    reference = self.reference if under is None else under
    if self.needs_reference and reference is None:
      raise ValueError('a KL penalty in the reward, and ref_logps in the loss, need a reference')
    policy = self._cast(policy_params(params))
    carry, ids, samples, scored = self._filled(policy, carry)
    sampled = time.monotonic()
    mask = np.asarray(samples.mask) & scored.valid[..., None]
    if not mask.any():
      raise ValueError(
        'no sample of the rollout counts: every reward failed or does not apply, or all were cut '
        f'off; first failures: {"; ".join(scored.failures[:3]) or "none"}'
      )
    carry = {**carry, 'ids': ids, 'tokens': np.asarray(samples.tokens), 'mask': mask}
    drawn = np.asarray(samples.logps)
    fields = {'sampler_logps': np.asarray(samples.sampling_logps), DRAWN: drawn}
    found = self._forward(self._compute, params, carry) if self._names else {}
    if 'logps' in found:
      fields['old_logps'] = found['logps']
    if 'values' in found:
      fields['old_values'] = found['values']
    if self.needs_reference:
      where = self._reference_mesh
      theirs = self._forward(self._compute_logps, reference, carry, where)
      fields['ref_logps'] = theirs['logps']
    policy_logps = fields.get('old_logps', drawn)
    kl = np.where(mask, policy_logps - fields.get('ref_logps', policy_logps), 0)
    inputs = Inputs(
      scored.scores,
      scored.rewards,
      np.array([term.weight for term in self.scorer.terms], np.float32),
      mask.any(-1),
      mask,
      kl,
      carry['beta'],
      found.get('values'),
      self._baseline(policy, ids),
    )
    fields |= hosts.whole(self._estimate(inputs))
    if 'old_logps' in fields:
      away = logp_difference(drawn, fields['old_logps'], mask)
      self._report |= {name: float(value) for name, value in away.items()}
    if cap := self.rounds.importance_cap:
      logps = map(jnp.asarray, (fields['old_logps'], fields['sampler_logps'], mask))
      weights = np.asarray(truncated_importance(*logps, cap=cap))
      fields['advantages'] = fields['advantages'] * weights
      self._report['sampling/importance'] = float(weights[mask].mean())
    carry['fields'] = {name: np.where(mask, fields[name], 0) for name in self._stored}
    per_completion = kl.sum(-1)[mask.any(-1)].mean()
    state = advantages.KLState(jnp.float32(carry['beta']))
    carry['beta'] = np.float32(self._controller(state, per_completion, mask.any(-1).sum()).beta)
    self._monitor(scored, mask, per_completion if self.needs_reference else None, carry)
    done = time.monotonic()
    self._report |= {
      'rollout/seconds': done - began,
      'rollout/sampling_seconds': sampled - began,
      'rollout/tokens_per_second': float(np.asarray(samples.mask).sum()) / (sampled - began),
    }
    texts = [self.sampler.prompts.texts[i] for i in ids]
    self._show(int(carry['rollout']), texts, scored.texts, scored.scores)
    return {**carry, 'cursor': np.int32(0), 'rollout': np.int32(carry['rollout'] + 1)}

  def _filled(self, policy: Params, carry: Carry) -> tuple[Carry, np.ndarray, Samples, Scored]:
    """Sampled and scored groups, and the carry with its position in the prompts moved on."""
    if self.rounds.ahead:
      landed = carry['flight']
      if landed['ids'][0] < 0:  # the first rollout
        carry, *landed = self._start(policy, carry)
        landed = dict(zip(('ids', 'samples'), landed, strict=True))
      carry, ids, samples = self._start(policy, carry)
      carry = {**carry, 'flight': {'ids': ids, 'samples': samples}}
      samples = hosts.whole(landed['samples'])
      return carry, landed['ids'], samples, self._score(landed['ids'], samples)
    kept: list[tuple[np.ndarray, Samples, Scored]] = []
    for _ in range(self.rounds.tries):
      carry, ids, samples = self._start(policy, carry)
      samples = hosts.whole(samples)
      kept.append((ids, samples, self._score(ids, samples)))
      if sum(int(differ(scored).sum()) for *_, scored in kept) >= self.rounds.prompts:
        break
    if len(kept) == 1:
      return carry, *kept[0]
    useful = np.concatenate([differ(scored) for *_, scored in kept])
    first = np.argsort(~useful, kind='stable')[: self.rounds.prompts]  # then the earliest others
    ids = np.concatenate([ids for ids, *_ in kept])[first]
    samples = jax.tree.map(lambda *xs: np.concatenate(xs)[first], *(s for _, s, _ in kept))
    self._report['rollout/tries'] = float(len(kept))
    return carry, ids, samples, chosen([scored for *_, scored in kept], first)

  def _start(self, policy: Params, carry: Carry) -> tuple[Carry, np.ndarray, Samples]:
    """Starts sampling the next B prompts."""
    ids, keys = self.rounds.draw(len(self.sampler.prompts), int(carry['position']))
    carry = {**carry, 'position': np.int32(carry['position'] + self.rounds.prompts)}
    return carry, ids, self.sampler(policy, ids.tolist(), keys)

  def _score(self, ids: np.ndarray, samples: Samples) -> Scored:
    scored = self.scorer(self.sampler.prompts, ids.tolist(), samples)
    if self.rounds.mask_truncated:  # before groups are chosen by what counts in them
      scored = scored._replace(valid=scored.valid & np.asarray(samples.finished))
    return scored

  def _baseline(self, policy: Params, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of the prompts' greedy completions, and whether they count, each [B]."""
    if self._greedy is None:
      return None
    samples = hosts.whole(self._greedy(policy, ids.tolist(), ids))
    scored = self.scorer(self.sampler.prompts, ids.tolist(), samples)
    return scored.scores[:, 0], scored.valid[:, 0]

  def _forward(
    self, compute: Callable, params: Params, carry: Carry, mesh: jax.sharding.Mesh | None = None
  ) -> dict[str, np.ndarray]:
    """Fields [B, K, T] of a rollout under `params`, in the batches that steps would have.

    `mesh`: of `params`, where they live apart from what trains.
    """
    place, shards, parts = self._place, self.rounds.shards, []
    if mesh is not None:
      place = functools.partial(hosts.place, sharding=sharding.batch_sharding(mesh))
      shards = sharding.groups(mesh)
    for rows in np.array_split(np.arange(self.rounds.prompts), self.rounds.minibatches):
      batch = self.packed(carry, rows, shards)
      with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        found = hosts.whole(compute(params, place(batch)))
      parts.append({name: unpack(value, batch, rows.tolist()) for name, value in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def packed(self, carry: Carry, rows: np.ndarray, shards: int) -> Batch:
    """Some rows of a rollout, as a step gets them."""
    groups = []
    for row in rows.tolist():
      pairs = zip(carry['tokens'][row], carry['mask'][row], strict=True)
      candidates = [tokens[: int(mask.sum())] for tokens, mask in pairs]  # scored ones come first
      scored = tuple(np.ones(len(c), bool) for c in candidates)
      prompt = self.sampler.prompts.tokens[int(carry['ids'][row])]
      groups.append(Group(prompt, tuple(candidates), scored))
    return pack(
      groups,
      rows.tolist(),
      {name: values[rows] for name, values in carry['fields'].items()},
      row_length=self.row_length,
      completion=self.sampler.max_new_tokens,
      microbatches=self.rounds.microbatches,
      shards=shards,
    )

  def _monitor(self, scored: Scored, mask: np.ndarray, kl: float | None, carry: Carry) -> None:
    # Samples that have no group are compared with those of the other prompts.
    alone = self.sampler.num_samples == 1
    same = 1 - float(differ(scored, axis=None if alone else 1).mean())
    self._report |= scored.metrics | {'frac_reward_zero_std': same}
    if kl is not None:
      self._report |= {'kl': float(kl), 'kl_coef': float(carry['beta'])}
    if same > COLLAPSED:
      self._collapses += 1
      if self._collapses in (1, 10, 100, 1000):
        log.warning(
          'rollout %d: in %s all samples have one reward, so there is nothing to learn from '
          'them%s; look at the samples, and at the rewards',
          carry['rollout'],
          'this batch' if alone else f'{100 * same:.0f} % of the groups',
          f', for the {self._collapses}th time' if self._collapses > 1 else '',
        )


def _fields(model: Model | ActorCritic, names: tuple[str, ...], params: Params, batch: Batch):
  """Model fields of a batch, [M*G*B, K, T]."""
  found = stacked(model, brought_in(params), batch, names)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), found)
