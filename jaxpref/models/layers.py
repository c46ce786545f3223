"""The layers that hold parameters, and `linear`, the one seam every projection goes through."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpref.models.lora import LoraWeight
from jaxpref.models.placement import looked_up
from jaxpref.typing import Array

PROJECTION = 'projection'  # what a checkpoint's policy may know its output as


def linear(x: Array, w: Array | LoraWeight, dtype=None) -> Array:
  """x [..., I] times w [I, O] -> [..., O], computed in x's dtype, returned in `dtype` or x's."""
  if isinstance(w, LoraWeight):
    low = checkpoint_name(_times(x, w.lora_a), PROJECTION)
    y = _times(x, w.base, dtype) + _times(low, w.scale * w.lora_b, dtype)
  else:
    y = _times(x, w, dtype)
  return checkpoint_name(y, PROJECTION) if dtype is None else y


def _times(x: Array, w: Array, dtype=None) -> Array:
  w = w.astype(x.dtype)
  if dtype is None:
    return _product(x, w)
  return jnp.einsum('...i,io->...o', x, w, preferred_element_type=dtype)


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
  """x times w, whose gradient is written so that x is what is transposed for it, unless it is wide.

  By itself jax would transpose the cotangent, which XLA on a CPU fuses with all that made it: an
  eighth of a training step. Projections of one x share its transpose. An x that is much wider than
  its product is an MLP's, whose activation would be computed transposed, one number at a time.
  """
  return jnp.einsum('...i,io->...o', x, w)


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
  return _product(x, w), (x, w)


def _product_backward(kept: tuple[Array, Array], y: Array) -> tuple[Array, Array]:
  x, w = kept
  if x.shape[-1] > 2 * y.shape[-1]:
    to_w = jnp.einsum('...o,...i->oi', y, x).T
  else:
    to_w = jnp.einsum('...i,...o->io', x, y)
  return jnp.einsum('...o,io->...i', y, w), to_w


_product.defvjp(_product_forward, _product_backward)


def ragged_linear(x: Array, w: Array | LoraWeight, sizes: Array) -> Array:
  """x [N, I], sorted by expert, `sizes` int [E] of each, times w [E, I, O] -> [N, O]."""
  if isinstance(w, LoraWeight):
    low = ragged_linear(x, w.lora_a, sizes)
    return ragged_linear(x, w.base, sizes) + ragged_linear(low, w.scale * w.lora_b, sizes)
  return checkpoint_name(jax.lax.ragged_dot(x, w.astype(x.dtype), sizes), PROJECTION)


class Linear(nnx.Module):
  """w [I, O], normal with standard deviation `scale` / sqrt(I), and a zero bias b [O] if asked."""

  def __init__(self, key: Array, shape: tuple[int, int], *, bias: bool, scale: float = 1.0):
    self.bias = bias
    self.w = nnx.Param(jax.random.normal(key, shape) * (scale * shape[0] ** -0.5))
    if bias:
      self.b = nnx.Param(jnp.zeros(shape[1]))

  def __call__(self, x: Array, dtype=None) -> Array:
    y = linear(x, self.w.get_value(), dtype)
    return y + _along(self.b.get_value(), y) if self.bias else y


class Norm(nnx.Module):
  """Root-mean-square or layer normalisation of the last axis, in float32.

  https://arxiv.org/abs/1910.07467 and https://arxiv.org/abs/1607.06450. Channels are multiplied by
  `offset + scale`.
  """

  def __init__(self, size: int, *, kind: str, eps: float, offset: float = 0.0):
    self.kind, self.eps, self.offset = kind, eps, offset
    self.scale = nnx.Param(jnp.full(size, 1.0 - offset))
    if kind == 'layer':
      self.bias = nnx.Param(jnp.zeros(size))

  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    if self.kind == 'layer':
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    y = y * (self.offset + _along(self.scale.get_value(), y))
    if self.kind == 'layer':
      y = y + _along(self.bias.get_value(), y)
    return y.astype(x.dtype)


class Embedding(nnx.Module):
  """A table w [size, width]. An index beyond it gives NaN: a wrong id must not go unnoticed."""

  def __init__(self, key: Array, size: int, width: int):
    self.w = nnx.Param(0.02 * jax.random.normal(key, (size, width)))

  def __call__(self, indices: Array, dtype) -> Array:
    look = functools.partial(jnp.take, self.w.get_value(), axis=0, mode='fill', fill_value=jnp.nan)
    return looked_up(look, indices).astype(dtype)


def cap(x: Array, limit: float | None) -> Array:
  """limit * tanh(x / limit), within (-limit, limit); x itself without a limit."""
  return x if limit is None else limit * jnp.tanh(x / limit)


def _along(vector: Array, x: Array) -> Array:
  """A vector [D] in x's dtype, repeated along x [..., D].

  All axes but the last are new to it, so its gradient sums over all of them at once: over one that
  stands between two others XLA on a CPU takes fifty times as long.
  """
  return jax.lax.broadcast_in_dim(vector.astype(x.dtype), x.shape, (x.ndim - 1,))
