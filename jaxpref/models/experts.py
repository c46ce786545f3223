"""A mixture of experts: every token goes through the few gated MLPs that its router picks.

No expert has a capacity, so no token is dropped: tokens are sorted by expert and meet the weights
in one ragged matrix product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpref.models.layers import PROJECTION, Linear, ragged_linear
from jaxpref.typing import Array


class Routing(NamedTuple):
  """What the routers of all layers did with the real tokens of each group G.

  All are sums over tokens: they add over microbatches, groups and hosts.
  """

  picks: Array  # float32 [layers, G, E]: tokens that picked each expert
  probs: Array  # float32 [layers, G, E]: the routers' probabilities
  tokens: Array  # float32 [layers, G]

  def balance(self) -> Array:
    """The load-balancing loss E · Σₑ fₑ · pₑ, a float32 scalar, at its least k for even loads.

    fₑ is the share of tokens that picked e (k experts each), pₑ its mean probability, both over
    all layers. See Switch Transformers, Fedus et al., equations 4 to 6:
    https://arxiv.org/abs/2101.03961.
    """
    picks, probs = (x.sum((0, 1)) / jnp.maximum(self.tokens.sum(), 1.0) for x in self[:2])
    return picks.shape[0] * jnp.sum(picks * probs)


class Experts(nnx.Module):
  """The MLPs, as weights [E, width, mlp_width] and back."""

  def __init__(self, key: Array, num: int, width: int, inner: int, *, scale: float):
    gate_key, up_key, down_key = (jax.random.fold_in(key, i) for i in range(3))
    self.gate = Stack(gate_key, (num, width, inner))
    self.up = Stack(up_key, (num, width, inner))
    self.down = Stack(down_key, (num, inner, width), scale=scale)


class Stack(nnx.Module):
  """One projection of every expert: w [E, I, O]."""

  def __init__(self, key: Array, shape: tuple[int, int, int], *, scale: float = 1.0):
    self.w = nnx.Param(jax.random.normal(key, shape) * (scale * shape[1] ** -0.5))

  def __call__(self, x: Array, sizes: Array) -> Array:
    """x [N, I], sorted by expert, `sizes` [E] of each -> [N, O]."""
    return ragged_linear(x, self.w.get_value(), sizes)


class Mixture(nnx.Module):
  """Router and experts: Σ over the k likeliest experts of probability · expert(x)."""

  def __init__(
    self,
    key: Array,
    *,
    num: int,
    picked: int,
    normalize: bool,
    width: int,
    inner: int,
    activation: Callable,
    scale: float,
  ):
    router_key, experts_key = (jax.random.fold_in(key, i) for i in range(2))
    self.picked, self.normalize, self.activation = picked, normalize, activation
    self.router = Linear(router_key, (width, num), bias=False)
    self.experts = Experts(experts_key, num, width, inner, scale=scale)

  def __call__(self, x: Array, real: Array) -> tuple[Array, Routing]:
    """x [G, S, D] -> the same, and the routing of the tokens that are `real`, bool [G, S]."""
    # Near ties must not be decided by bfloat16's rounding.
    scores = checkpoint_name(self.router(x, jnp.float32), PROJECTION)
    probs = jax.nn.softmax(scores, axis=-1)
    # By sorting: jax.lax.top_k would gather the tokens of all devices.
    chosen = jnp.argsort(-probs, axis=-1, stable=True)[..., : self.picked]  # [G, S, k]
    weights = jnp.take_along_axis(probs, chosen, axis=-1)
    if self.normalize:
      weights = weights / weights.sum(-1, keepdims=True)
    num = probs.shape[-1]
    sizes = jnp.sum(jax.nn.one_hot(chosen, num, dtype=jnp.int32), axis=2)  # [G, S, E]
    counted = real[..., None].astype(jnp.float32)
    routing = Routing(
      jnp.sum(sizes * counted, axis=1), jnp.sum(probs * counted, axis=1), counted.sum((1, 2))
    )
    return self._mix(x, weights, chosen, sizes.sum(1)), routing

  def _mix(self, x: Array, weights: Array, chosen: Array, sizes: Array) -> Array:
    graphdef, params = nnx.split(self.experts)

    def group(params, x, weights, chosen, sizes):
      experts = nnx.merge(graphdef, params)
      order = jnp.argsort(chosen.reshape(-1), stable=True)  # of [S * k] token-expert pairs
      rows = x[order // self.picked]
      inner = self.activation(experts.gate(rows, sizes)) * experts.up(rows, sizes)
      out = experts.down(inner, sizes)[jnp.argsort(order)].reshape(*chosen.shape, -1)
      return jnp.einsum('skd,sk->sd', out, weights.astype(out.dtype))

    groups = x.shape[0]
    if groups == 1:
      return group(params, *(y[0] for y in (x, weights, chosen, sizes)))[None]
    # Groups live on different devices: sorted apart, they need not talk. Each has the weights
    # there already, so nothing is copied; ragged_dot can be mapped over all its operands only.
    params = jax.tree.map(lambda w: jnp.broadcast_to(w[None], (groups, *w.shape)), params)
    return jax.vmap(group)(params, x, weights, chosen, sizes)
