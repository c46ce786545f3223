"""Low-rank adapters: w + (α / r) · A·B where a projection has w, and only A and B train.

    h = x·w + (α / r) · (x·A)·B,  w [I, O] frozen, A [I, r], B [r, O] = 0 at first

"LoRA: Low-Rank Adaptation of Large Language Models", Hu et al., section 4.1:
https://arxiv.org/abs/2106.09685. Matrices multiply from the right here, so A and B stand in the
other order than in the paper. The adapters are a tree of their own, {'layers': {'attention': {'q':
{'w': {'lora_a': ..., 'lora_b': ...}}}}}; joined to the parameters that they adapt they make
parameters of the same model, and those without them are the model that training began with.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.typing import Array, Params

TARGETS = ('q', 'k', 'v', 'out', 'gate', 'up', 'down')  # a layer's projections, experts' included


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('base', 'lora_a', 'lora_b'),
  meta_fields=('scale',),
)
@dataclasses.dataclass(frozen=True)
class LoraWeight:
  """A weight with its adapter: base [..., I, O], lora_a [..., I, r], lora_b [..., r, O]."""

  base: Array
  lora_a: Array
  lora_b: Array
  scale: float  # α / r

  def dense(self) -> Array:
    """The one weight [..., I, O] that does the same, float32."""
    low = [x.astype(jnp.float32) for x in (self.lora_a, self.lora_b)]
    return self.base.astype(jnp.float32) + self.scale * jnp.matmul(*low)


@dataclasses.dataclass(frozen=True)
class Lora:
  """Adapters of some of a model's projections.

  Attributes:
    rank: r.
    alpha: α; what an adapter adds is scaled by α / r. α growing with √r is rank-stabilised LoRA,
      "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", Kalajdzievski:
      https://arxiv.org/abs/2312.03732.
    targets: of `TARGETS`; a model need not have all of them.

  Raises:
    ValueError: a rank below 1, or a target that no layer could have.
  """

  rank: int
  alpha: float = 32.0
  targets: tuple[str, ...] = TARGETS

  def __post_init__(self):
    if self.rank < 1 or not math.isfinite(self.alpha):
      raise ValueError(f'LoRA needs a rank of 1 or more and a finite alpha, got {self}')
    unknown = sorted(set(self.targets) - set(TARGETS))
    if unknown or not self.targets:
      raise ValueError(f'LoRA adapts projections of {TARGETS}; got targets {self.targets}')

  def init(self, params: Params, key: Array) -> Params:
    """Adapters of `params`, float32: A ~ N(0, 1 / 3I), the variance of the usual uniform draw, B 0.

    Args:
      params: a model's parameters, or their shapes.
      key: that A is drawn from.

    Raises:
      ValueError: nothing to adapt, or a projection that is smaller than the rank.
    """
    found = 0

    def adapters(tree: Params, targeted: bool) -> Params:
      nonlocal found
      made: Params = {}
      for name in sorted(tree):
        part = tree[name]
        if isinstance(part, dict):
          if inner := adapters(part, name in self.targets):
            made[name] = inner
        elif targeted and name == 'w':
          made[name] = self._one(part.shape, jax.random.fold_in(key, found))
          found += 1
      return made

    layers = adapters(params.get('layers', {}), targeted=False)
    if not found:
      raise ValueError(f'the model has no layers with any of the projections {self.targets}')
    return {'layers': layers}

  def _one(self, shape: tuple[int, ...], key: Array) -> Params:
    *stacked, wide, narrow = shape
    if self.rank > min(wide, narrow):
      raise ValueError(
        f'LoRA of rank {self.rank} is more than a projection of {wide} by {narrow} has'
      )
    a = jax.random.normal(key, (*stacked, wide, self.rank)) * (3 * wide) ** -0.5
    return {'lora_a': a, 'lora_b': jnp.zeros((*stacked, self.rank, narrow))}

  def join(self, base: Params, adapters: Params) -> Params:
    """`base` with its adapters; what else `adapters` holds is joined as it is."""
    joined = dict(base)
    for name, part in adapters.items():
      if not isinstance(part, dict) or name not in base:
        joined[name] = part
      elif set(part) == {'lora_a', 'lora_b'}:
        joined[name] = LoraWeight(base[name], **part, scale=self.alpha / self.rank)
      else:
        joined[name] = self.join(base[name], part)
    return joined


def is_adapted(x: Any) -> bool:
  return isinstance(x, LoraWeight)


def without(params: Params) -> Params | None:
  """The parameters under their adapters; None where there are none."""
  leaves = jax.tree.leaves(params, is_leaf=is_adapted)
  if not any(map(is_adapted, leaves)):
    return None
  return jax.tree.map(lambda x: x.base if is_adapted(x) else x, params, is_leaf=is_adapted)


def merged(params: Params) -> Params:
  """The same model without adapters: adapted weights become single float32 ones."""
  return jax.tree.map(lambda x: x.dense() if is_adapted(x) else x, params, is_leaf=is_adapted)
