"""Terms that are added to a loss to keep a model in order."""

import jax
import jax.numpy as jnp

from jaxpref.objectives.base import Loss, Metric, objective
from jaxpref.typing import Array


@objective(coupled=True)
def router_balance(
  router_picks: Array, router_probs: Array, router_tokens: Array, mask: Array
) -> Loss:
  """Load balance of a mixture of experts: added with a small factor, it spreads tokens evenly.

    L = E · Σₑ fₑ pₑ,   fₑ = tokens that picked e / tokens,   pₑ = mean router probability of e

  Over the real tokens of the whole batch and all layers; at its least k, the number of experts that
  a token picks. fₑ passes no gradient, being a count. Coupled: fₑ is a statistic of the batch.

  See "Switch Transformers", Fedus et al., eqs. 4 to 6: https://arxiv.org/abs/2101.03961.

  Args:
    router_picks: [B, E] how many tokens picked each expert, summed over tokens and layers. Only
      sums over B are read: a group's may all stand at one of its examples.
    router_probs: [B, E] the routers' probabilities, summed alike.
    router_tokens: [B] tokens times layers.
    mask: [B, K, T]; only its shape is used.
  """
  del mask
  tokens = jnp.maximum(jnp.sum(router_tokens), 1.0)
  share = jax.lax.stop_gradient(jnp.sum(router_picks, axis=0)) / tokens
  terms = router_picks.shape[1] * jnp.sum(share[None] * router_probs, axis=1)
  ones = jnp.ones_like(terms)
  most = jnp.broadcast_to(jnp.max(share), ones.shape)
  return Loss(terms, ones, tokens, {'router/largest_share': Metric(most, ones)})
