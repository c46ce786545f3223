"""The one decoder: every family is this module under another `Config`.

Layers are made by `nnx.vmap`, so each parameter has a leading layer axis, and run by one scan.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpref.models.config import Config
from jaxpref.models.layers import Embedding, Linear, Norm, linear
from jaxpref.models.rope import rotate
from jaxpref.typing import Array

_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': jax.nn.gelu,
  'relu': jax.nn.relu,
}


class Attention(nnx.Module):
  """Self-attention with grouped queries; who sees whom is the caller's."""

  def __init__(self, config: Config, key: Array):
    q_key, k_key, v_key, out_key = _keys(key, 4)
    self.head_dim = config.head_dim
    inner, kv_inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    self.q = Linear(q_key, (config.width, inner), bias=config.qkv_bias)
    self.k = Linear(k_key, (config.width, kv_inner), bias=config.qkv_bias)
    self.v = Linear(v_key, (config.width, kv_inner), bias=config.qkv_bias)
    self.out = Linear(
      out_key, (inner, config.width), bias=config.out_bias, scale=_residual_scale(config)
    )
    self.qk_norm = config.qk_norm
    if self.qk_norm:
      self.q_norm = Norm(config.head_dim, kind='rms', eps=config.norm_eps)
      self.k_norm = Norm(config.head_dim, kind='rms', eps=config.norm_eps)

  def __call__(self, x, angles, attend):
    q, k, v = (
      project(x).reshape(*x.shape[:-1], -1, self.head_dim) for project in (self.q, self.k, self.v)
    )
    if self.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    y, memory = attend(q, k, v)
    return self.out(y.reshape(*x.shape[:-1], -1)), memory


class Mlp(nnx.Module):
  """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

  def __init__(self, config: Config, key: Array):
    gate_key, up_key, down_key = _keys(key, 3)
    self.gated, self.activation = config.gated, config.activation
    wide, narrow = (config.width, config.mlp_width), (config.mlp_width, config.width)
    bias = config.mlp_bias
    if self.gated:
      self.gate = Linear(gate_key, wide, bias=bias)
    self.up = Linear(up_key, wide, bias=bias)
    self.down = Linear(down_key, narrow, bias=bias, scale=_residual_scale(config))

  def __call__(self, x):
    activation = _ACTIVATIONS[self.activation]
    if self.gated:
      return self.down(activation(self.gate(x)) * self.up(x))
    return self.down(activation(self.up(x)))


class Block(nnx.Module):
  """Attention and MLP, each added to the residual stream, normed before, after or both."""

  def __init__(self, config: Config, key: Array):
    attention_key, mlp_key = _keys(key, 2)
    self.attention, self.mlp = Attention(config, attention_key), Mlp(config, mlp_key)
    self.placement = config.norm_placement

    def norm():
      return Norm(config.width, kind=config.norm, eps=config.norm_eps)

    if self.placement != 'post':
      self.attention_norm, self.mlp_norm = norm(), norm()
    if self.placement != 'pre':
      self.attention_post_norm, self.mlp_post_norm = norm(), norm()

  def __call__(self, x, angles, attend):
    y = x if self.placement == 'post' else self.attention_norm(x)
    y, memory = self.attention(y, angles, attend)
    x = x + (y if self.placement == 'pre' else self.attention_post_norm(y))
    y = self.mlp(x if self.placement == 'post' else self.mlp_norm(x))
    return x + (y if self.placement == 'pre' else self.mlp_post_norm(y)), memory


class Decoder(nnx.Module):
  """Token ids to final-normed states; states to logits."""

  def __init__(self, config: Config, key: Array):
    embed_key, positions_key, layers_key, head_key = _keys(key, 4)
    self.config = config
    self.embed = Embedding(embed_key, config.vocab_size, config.width)
    if config.rope is None:
      self.positions = Embedding(positions_key, config.max_positions, config.width)
    self.layers = nnx.vmap(lambda key: Block(config, key))(_keys(layers_key, config.num_layers))
    self.norm = Norm(config.width, kind=config.norm, eps=config.norm_eps)
    if not config.tied:
      self.head = Linear(head_key, (config.width, config.vocab_size), bias=False)

  def hidden(self, tokens, positions, attention, memory, dtype, checkpoint: Callable):
    """States [G, S, D] of tokens and positions [G, S], and what `attention` made of `memory`.

    Args:
      attention: `(q, k, v, window, layer, memory) -> (out, memory)`, see `attention.Flat`.
      memory: any pytree, carried from layer to layer.
      dtype: of the computation; parameters are cast where they are used.
      checkpoint: wraps the layer (`jax.checkpoint` under some policy, or the identity).
    """
    config = self.config
    x = self.embed(tokens, dtype)
    if config.rope is None:
      x, angles = x + self.positions(positions, dtype), None
    else:
      angles = config.rope.angles(positions, config.head_dim)
    windows = None
    if config.windows is not None:
      largest = np.iinfo(np.int32).max
      windows = jnp.array([largest if w is None else w for w in config.windows], jnp.int32)
    graphdef, params = nnx.split(self.layers)

    def layer(carry, scanned):
      x, memory = carry
      params, window, index = scanned
      block = nnx.merge(graphdef, params)
      return block(x, angles, lambda q, k, v: attention(q, k, v, window, index, memory)), None

    scanned = params, windows, jnp.arange(config.num_layers)
    (x, memory), _ = jax.lax.scan(checkpoint(layer), (x, memory), scanned)
    return self.norm(x), memory

  def unembed(self, states):
    """float32 logits [..., V] of states [..., D]."""
    w = self.embed.w.get_value().T if self.config.tied else self.head.w.get_value()
    return linear(states, w, jnp.float32)


def _keys(key: Array, n: int) -> Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def _residual_scale(config: Config) -> float:
  """Of the 2 * num_layers outputs that are summed into the residual stream."""
  return (2 * config.num_layers) ** -0.5
