"""Reward models with several heads: every loss of rewards is the mean over the heads' losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.objectives.candidates import last_scored, present
from jaxpref.objectives.loss import Metric
from jaxpref.typing import Array, Fields

REWARDS = 'rewards'  # [B, K, T], of n heads [B, K, T, n]
Share = tuple[Array, dict[str, Metric]]


def joined(fields: Fields) -> Fields:
  """The fields with the heads' mean in place of their scores."""
  return {**fields, REWARDS: jnp.mean(fields[REWARDS], axis=-1)} if _several(fields) else fields


def mean_over_heads(share: Callable[[Any], Share], fields: Fields) -> Share:
  """What `share(fields)` gives for one head, as the mean of the losses of all.

    L = 1/n Σₕ L(rₕ)

  Each head learns as it would alone; what differs is where it began. Metrics other than losses are
  those of the heads' mean score; 'rewards/head_std' is the std of a completion's scores over the
  heads, their disagreement.
  """
  if not _several(fields):
    return share(fields)
  loss, each = jax.vmap(lambda rewards: share({**fields, REWARDS: rewards}), -1)(fields[REWARDS])
  _, metrics = share(joined(fields))
  losses = {name: each[name] for name in each if name.split('/')[0] == 'loss'}
  finals = jax.vmap(last_scored, (-1, None), -1)(fields[REWARDS], fields['mask'])
  spread = Metric(jnp.std(finals, axis=-1), present(fields['mask']))
  averaged = jax.tree.map(lambda x: jnp.mean(x, axis=0), losses)
  return jnp.mean(loss), {**metrics, **averaged, 'rewards/head_std': spread}


def _several(fields: Fields) -> bool:
  return REWARDS in fields and fields[REWARDS].ndim > fields['mask'].ndim
