"""Config -> optax chain, rebuilt inside the step from traced scalars.

What decides the structure (which algorithm, which parameters decay or freeze) is static; every
number is data. So one compiled step serves any learning rate, schedule value or decay, and vmaps
over them.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpref import sharding
from jaxpref.typing import Array, Params

Scalars = Mapping[str, Any]  # name -> number, array or schedule (a pytree called with the step)


def adamw(s: Scalars) -> optax.GradientTransformation:
  """Adam's direction (Kingma & Ba, arXiv 1412.6980); decay is decoupled (arXiv 1711.05101)."""
  return optax.scale_by_adam(b1=s['b1'], b2=s['b2'], eps=s['eps'])


def lion(s: Scalars) -> optax.GradientTransformation:
  """Sign of the interpolated momentum (arXiv 2302.06675)."""
  return optax.scale_by_lion(b1=s['b1'], b2=s['b2'])


def sgd(s: Scalars) -> optax.GradientTransformation:
  """Gradient with heavy-ball momentum b1 (0: plain)."""
  return optax.trace(decay=s['b1'])


def adafactor(s: Scalars) -> optax.GradientTransformation:
  """Factored second moments, clipped by block, scaled by parameter size (arXiv 1804.04235)."""
  return optax.chain(
    optax.scale_by_factored_rms(epsilon=1e-30),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )


def stored_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner` with its floating-point state kept in `dtype` between steps."""
  if dtype == 'float32':
    return inner

  def cast(state: Any, dtype: str) -> Any:
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, state)

  def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
    updates, state = inner.update(updates, cast(state, 'float32'), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


OPTIMIZERS = {'adamw': adamw, 'lion': lion, 'sgd': sgd, 'adafactor': adafactor}

DTYPES = ('float32', 'bfloat16')

# First match wins: parameters that do not decay. Stacked norms are rank 2, so never by rank.
DECAY = ((r'(norm|/b$|bias|scale)', False), (r'.*', True))


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The static half of an optimizer.

  Attributes:
    name: a key of `OPTIMIZERS`.
    freeze: path patterns of parameters that do not train (they get no moments either).
    dtype: that moments are kept in; the arithmetic is float32. With 'bfloat16' they take half the
      memory, and an average whose rate 1 - b2 is far below 2⁻⁸ stops moving: not with b2 = 0.999.
    decay: path rules, pattern -> whether weight decay applies.

  Raises:
    ValueError: for an unknown name.
  """

  name: str = 'adamw'
  freeze: tuple[str, ...] = ()
  dtype: str = 'float32'
  decay: tuple[tuple[str, bool], ...] = DECAY

  def __post_init__(self):
    if self.name not in OPTIMIZERS:
      near = difflib.get_close_matches(self.name, OPTIMIZERS, 1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(f'unknown optimizer {self.name!r}{hint} Known: {sorted(OPTIMIZERS)}')
    if self.dtype not in DTYPES:
      raise ValueError(f'moments are kept in one of {DTYPES}, got {self.dtype!r}')

  def labels(self, params: Params) -> Params:
    """'train' or 'freeze' for every parameter.

    Raises:
      ValueError: a freeze pattern that matches nothing, or nothing left to train.
    """
    rules = (*((pattern, 'freeze') for pattern in self.freeze), ('', 'train'))
    labels = sharding.by_path(rules, params)
    paths = [sharding.path_of(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in self.freeze:
      if not any(sharding.match(((pattern, True), ('', False)), path) for path in paths):
        raise ValueError(f'freeze pattern {pattern!r} matches no parameter; paths: {sorted(paths)}')
    if 'train' not in jax.tree.leaves(labels):
      raise ValueError(f'freeze={self.freeze} leaves nothing to train')
    return labels

  def trainable(self, params: Params) -> Params:
    """`params` with frozen leaves under stop_gradient: their gradients are never computed."""
    freeze = jax.lax.stop_gradient
    return jax.tree.map(
      lambda x, label: x if label == 'train' else freeze(x), params, self.labels(params)
    )

  def transform(
    self, scalars: Scalars, step: Array | int, params: Params
  ) -> optax.GradientTransformation:
    """The chain at `step`: clip by global norm -> direction -> decoupled decay -> -learning rate.

    The state's structure does not depend on `scalars`, so it may be rebuilt with other values each
    step.
    """
    s = {k: v(step) if callable(v) else v for k, v in scalars.items()}
    decays = sharding.by_path(self.decay, params)
    chain = optax.chain(
      optax.clip_by_global_norm(s['clip']),
      stored_as(self.dtype, OPTIMIZERS[self.name](s)),
      optax.add_decayed_weights(s['weight_decay'], mask=lambda tree: _like(decays, tree)),
      optax.scale(-s['learning_rate']),
    )
    if not self.freeze:
      return chain
    return optax.partition({'train': chain, 'freeze': optax.set_to_zero()}, self.labels(params))

  def init(self, scalars: Scalars, params: Params) -> Any:
    return self.transform(scalars, 0, params).init(params)


def _like(decays: Params, tree: Params) -> Params:
  """`decays` with holes where `tree` has them (optax masks what another partition owns)."""
  hole = optax.MaskedNode
  return jax.tree.map(
    lambda x, d: x if isinstance(x, hole) else d,
    tree,
    decays,
    is_leaf=lambda x: isinstance(x, hole),
  )


def ema_update(ema: Params, params: Params, decay: Array | float) -> Params:
  """ema ← decay · ema + (1 - decay) · params."""
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(e.dtype), ema, params)


def global_norm(tree: Params) -> Array:
  """√Σ x² over all leaves, in float32."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))
