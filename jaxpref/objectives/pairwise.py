"""Losses on pairs of completions: candidate 0 was preferred to candidate 1.

Reward here means the implicit reward β log π(y|x) / π_ref(y|x), with completions' log-probabilities
summed over scored tokens. A pair counts when both of its candidates have scored tokens.
"""

import jax
import jax.numpy as jnp

from jaxpref import masked
from jaxpref.objectives.base import Loss, Metric, objective
from jaxpref.typing import Array


def log_ratios(logps: Array, ref_logps: Array, mask: Array) -> Array:
  """log π(y|x) - log π_ref(y|x) of every candidate, [B, K], from per-token fields [B, K, T]."""
  return masked.sum(masked.widened(logps) - masked.widened(ref_logps), mask, axis=-1)


def complete_pairs(mask: Array) -> Array:
  """Which examples have scored tokens in both candidates, float32 [B].

  Raises:
    ValueError: the batch does not hold pairs.
  """
  if mask.shape[1] != 2:
    raise ValueError(f'a pairwise loss needs K=2 candidates, got mask [B, K, T] = {mask.shape}')
  return jnp.all(jnp.any(mask, axis=-1), axis=-1).astype(jnp.float32)


def pair_metrics(rewards: Array, logps: Array, mask: Array, pairs: Array) -> dict[str, Metric]:
  """The diagnostics of pairs under their usual names; `rewards` [B, 2], `logps` [B, 2, T]."""
  totals = masked.sum(logps, mask, axis=-1)
  margins = rewards[:, 0] - rewards[:, 1]
  return {
    'rewards/chosen': Metric(rewards[:, 0], pairs),
    'rewards/rejected': Metric(rewards[:, 1], pairs),
    'rewards/margins': Metric(margins, pairs),
    'rewards/accuracies': Metric((margins > 0).astype(jnp.float32), pairs),
    'logps/chosen': Metric(totals[:, 0], pairs),
    'logps/rejected': Metric(totals[:, 1], pairs),
  }


@objective(ranges={'beta': '(0, inf)', 'label_smoothing': '[0, 0.5)'})
def dpo(
  logps: Array, ref_logps: Array, mask: Array, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Loss:
  """Direct preference optimization; conservative DPO with label smoothing.

    L = - (1 - ε) log σ(m) - ε log σ(-m),   m = β (log π/π_ref (y₀) - log π/π_ref (y₁))

  Mean over pairs. log σ is taken in its stable form, linear for large |m|, so nothing is clamped.

  See "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", Rafailov et
  al., eq. 7: https://arxiv.org/abs/2305.18290; for ε, "A note on DPO with noisy preferences &
  relationship to IPO", Mitchell: https://ericmitchell.ai/cdpo.pdf.

  Args:
    logps: [B, 2, T] log-probabilities of the tokens under the policy π.
    ref_logps: [B, 2, T] under the reference π_ref.
    mask: [B, 2, T] True on scored tokens.
    beta: β > 0, how strongly the policy is held to the reference.
    label_smoothing: 0 <= ε < 0.5, the share of labels taken to be wrong.
  """
  pairs = complete_pairs(mask)
  rewards = beta * log_ratios(logps, ref_logps, mask)
  margins = rewards[:, 0] - rewards[:, 1]
  right, wrong = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
  terms = -(1 - label_smoothing) * right - label_smoothing * wrong
  return Loss(terms, pairs, jnp.sum(pairs), pair_metrics(rewards, logps, mask, pairs))
