"""The critic of online training: what it is, and whether there is one to train."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxpref.data.tokenizer import Tokenizer
from jaxpref.log_probs import VALUES, ActorCritic
from jaxpref.models import Model
from jaxpref.objectives import Objective
from jaxpref.rollout import estimators
from jaxpref.train import policy

SHARED = 'shared'  # rollout.critic: one score on the policy's own states


def with_critic(
  config: ConfigDict, actor: Model, describe: Callable[[str], Model]
) -> Model | ActorCritic:
  """What `config` trains: `actor`, and a critic where its advantages read values.

  `describe`: finds the model that `rollout.critic` calls by a name.
  """
  c = config.rollout
  if not estimators.parse(c.advantages).critic:
    return actor
  if c.critic == SHARED:
    return ActorCritic(actor, policy.scored(actor), shared=True)
  critic = describe(c.critic or config.model).replace(
    dtype=actor.dtype, remat=actor.remat, attention=actor.attention
  )
  return ActorCritic(actor, policy.scored(critic))


def check_values(c: ConfigDict, objective: Objective, estimator: Any) -> None:
  """Raises ValueError unless values are both learnt and used, or neither."""
  learns = VALUES in objective.fields
  if estimator.critic and not learns:
    raise ValueError(
      f'rollout.advantages={c.advantages} reads values, and nothing in objective={objective} '
      'trains them: add 0.1*value_loss()'
    )
  if learns and not estimator.critic:
    raise ValueError(
      f'objective={objective} trains values, and rollout.advantages={c.advantages} has no returns '
      'for them: take gae()'
    )
  if c.critic and not learns:
    raise ValueError(f'rollout.critic={c.critic}, and nothing reads values: leave it out')


def check(spec: str, tokenizer: Tokenizer) -> None:
  """Raises ValueError where the critic cannot read the policy's tokens, or has several scores."""
  critic = policy.describe(spec, tokenizer)
  if not spec.startswith(policy.PRESET):  # that has no tokenizer of its own
    theirs = policy.find_tokenizer(spec)
    if theirs.vocabulary != tokenizer.vocabulary:
      raise ValueError(
        f'rollout.critic={spec} has another tokenizer ({theirs.name!r}) than the policy '
        f'({tokenizer.name!r}), and a critic reads token ids: give one trained with the same'
      )
  if critic.config.num_labels > 1:
    raise ValueError(
      f'rollout.critic={spec} has {critic.config.num_labels} scores, and a critic one: give a '
      'reward model with one head, or a policy'
    )
  if critic.config.vocab_size < tokenizer.vocab_size:
    raise ValueError(
      f'rollout.critic={spec} knows {critic.config.vocab_size} tokens, the policy '
      f'{tokenizer.vocab_size}'
    )
