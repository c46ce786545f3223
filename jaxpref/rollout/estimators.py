"""From scores to what policy losses read: each estimator is an `Inputs -> fields` of arrays.

  gae()                            PPO: rewards per token less β times KL, a critic's baseline
  leave_one_out()                  RLOO
  group_baseline(scale=group_std)  GRPO; Dr. GRPO with scale=no_scale
  whitened_returns()               REINFORCE++, one sample a prompt will do
  whitened_group()                 REINFORCE++ with the group's mean as baseline
  each_reward(scale=group_std)     every reward normalised by itself, then summed
  plain_returns()                  REINFORCE without a baseline
  remax()                          ReMax: the baseline is a greedy completion's score

β (`Inputs.beta`) weighs the KL penalty in the reward, k1 per token; 0 leaves KL to the loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from jaxpref import advantages, masked
from jaxpref.objectives.parse import read
from jaxpref.typing import AnyArray, Array

Found = dict[str, Array]  # 'advantages' [B, K, T], and 'returns' where there is a critic


class Inputs(NamedTuple):
  """What is known of a rollout."""

  scores: AnyArray  # [B, K], the weighted sum of the rewards
  rewards: AnyArray  # [B, K, J], each of them
  weights: AnyArray  # [J]
  valid: AnyArray  # bool [B, K]: no reward failed
  mask: AnyArray  # bool [B, K, T], False throughout for a sample that is not valid
  kl: AnyArray  # [B, K, T] k1: log π_old - log π_ref of the sampled token; 0 without a reference
  beta: AnyArray  # []
  values: AnyArray | None = None  # [B, K, T] of the critic
  # [B] scores of the prompts' greedy completions and whether they count, for who says `greedy`.
  greedy: tuple[AnyArray, AnyArray] | None = None


def unchanged(values: Array, mask: Array) -> Array:
  """The values as they are."""
  return values


def _spread(sequence: Array, mask: Array) -> Found:
  return {'advantages': advantages.broadcast_to_tokens(sequence, mask)}


def _penalised(x: Inputs) -> Array:
  return advantages.sequence_rewards(x.scores, x.kl, x.mask, beta=x.beta)


@dataclasses.dataclass(frozen=True)
class gae:
  """PPO's advantages (see `advantages.gae`); `rewards` and `advantages` may be whitened."""

  critic: ClassVar[bool] = True
  gamma: float = 1.0
  lam: float = 0.95
  rewards: Callable = unchanged
  advantages: Callable = masked.whiten

  def __call__(self, x: Inputs) -> Found:
    rewards = advantages.token_rewards(x.scores, x.kl, x.mask, beta=x.beta)
    rewards = self.rewards(rewards, x.mask)
    assert x.values is not None
    found, returns = advantages.gae(rewards, x.values, x.mask, gamma=self.gamma, lam=self.lam)
    return {'advantages': self.advantages(found, x.mask), 'returns': returns}


@dataclasses.dataclass(frozen=True)
class leave_one_out:
  """RLOO's."""

  critic: ClassVar[bool] = False
  group: ClassVar[bool] = True

  def __call__(self, x: Inputs) -> Found:
    return _spread(advantages.leave_one_out(_penalised(x), x.valid), x.mask)


@dataclasses.dataclass(frozen=True)
class group_baseline:
  """GRPO's, and Dr. GRPO's with scale=no_scale."""

  critic: ClassVar[bool] = False
  group: ClassVar[bool] = True
  scale: Callable = advantages.group_std

  def __call__(self, x: Inputs) -> Found:
    found = advantages.group_normalised(_penalised(x), x.valid, scale=self.scale)
    return _spread(found, x.mask)


@dataclasses.dataclass(frozen=True)
class whitened_group:
  """REINFORCE++'s variant for groups."""

  critic: ClassVar[bool] = False
  group: ClassVar[bool] = True

  def __call__(self, x: Inputs) -> Found:
    return _spread(advantages.reinforce_plus_plus_baseline(_penalised(x), x.valid), x.mask)


@dataclasses.dataclass(frozen=True)
class whitened_returns:
  """REINFORCE++'s."""

  critic: ClassVar[bool] = False
  gamma: float = 1.0

  def __call__(self, x: Inputs) -> Found:
    found = advantages.reinforce_plus_plus(x.scores, x.kl, x.mask, beta=x.beta, gamma=self.gamma)
    return {'advantages': found}


@dataclasses.dataclass(frozen=True)
class plain_returns:
  """REINFORCE's: the discounted rewards to come."""

  critic: ClassVar[bool] = False
  gamma: float = 1.0

  def __call__(self, x: Inputs) -> Found:
    rewards = advantages.token_rewards(x.scores, x.kl, x.mask, beta=x.beta)
    return {'advantages': advantages.returns_to_go(rewards, x.mask, gamma=self.gamma)}


@dataclasses.dataclass(frozen=True)
class remax:
  """ReMax's; the penalty is taken off the samples' scores, not off the greedy completion's."""

  critic: ClassVar[bool] = False
  greedy: ClassVar[bool] = True  # one more completion of each prompt is sampled and scored

  def __call__(self, x: Inputs) -> Found:
    assert x.greedy is not None
    return _spread(advantages.remax(_penalised(x), x.valid, *x.greedy), x.mask)


@dataclasses.dataclass(frozen=True)
class each_reward:
  """Every reward normalised within its group, then the weighted sum; KL stays out of it."""

  critic: ClassVar[bool] = False
  group: ClassVar[bool] = True
  scale: Callable = advantages.group_std

  def __call__(self, x: Inputs) -> Found:
    applies = x.valid[..., None] & jnp.isfinite(x.rewards)
    found = advantages.normalise_then_sum(x.rewards, applies, x.weights, scale=self.scale)
    return _spread(found, x.mask)


ESTIMATORS = (
  gae,
  leave_one_out,
  group_baseline,
  whitened_group,
  whitened_returns,
  plain_returns,
  remax,
  each_reward,
)
FUNCTIONS = (
  unchanged,
  masked.whiten,
  masked.whiten_keeping_mean,
  advantages.group_std,
  advantages.batch_std,
  advantages.no_scale,
)
KNOWN: Mapping[str, Any] = {thing.__name__: thing for thing in (*ESTIMATORS, *FUNCTIONS)}


def parse(text: str) -> Any:
  """The estimator that `text` describes, such as 'gae(gamma=1.0, lam=0.95)'.

  Raises:
    ValueError: it describes none.
  """
  estimator = read(text, KNOWN, 'advantages')
  if not isinstance(estimator, ESTIMATORS):
    names = ', '.join(f'{one.__name__}()' for one in ESTIMATORS)
    raise ValueError(f'advantages {text!r}: expected one of {names}')
  return estimator
