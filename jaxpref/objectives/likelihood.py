"""Losses that raise the likelihood of given completions."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxpref import masked
from jaxpref.objectives.base import Loss, Metric, objective
from jaxpref.typing import Array


@objective
def sft(
  logps: Array, mask: Array, *, reduce: Callable = masked.token_mean, candidate: int = 0
) -> Loss:
  """Supervised fine-tuning: negative log-likelihood of one candidate.

    L = - Σₜ wₜ log π(yₜ | x, y₍<ₜ₎) / norm,   (w, norm) = reduce(mask)

  With the default reduction every scored token of the batch counts the same. `nll` is that token
  mean whatever the reduction, so exp(nll) is the perplexity.

  Args:
    logps: [B, K, T] log-probabilities of the tokens.
    mask: [B, K, T] True on scored tokens.
    reduce: `mask -> (weights, norm)`: token_mean, sequence_mean, fixed_length(n).
    candidate: which of the K candidates; 0 is the best.
  """
  if not 0 <= candidate < mask.shape[1]:  # jax would clamp the index
    raise ValueError(f'sft(candidate={candidate}): the batch has K={mask.shape[1]} candidates')
  terms, mask = -logps[:, candidate], mask[:, candidate]
  weights, norm = reduce(mask)
  lengths = jnp.sum(mask, axis=-1)
  return Loss(terms, weights, norm, {'nll': Metric(masked.mean(terms, mask, axis=-1), lengths)})
