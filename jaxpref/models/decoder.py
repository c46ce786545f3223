"""The one decoder: every family is this module under another `Config`.

Layers are made by `nnx.vmap`, so each parameter has a leading layer axis, and run by one scan.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpref.models.config import Config
from jaxpref.models.experts import Mixture
from jaxpref.models.layers import Embedding, Linear, Norm, cap, linear
from jaxpref.models.placement import grouped, held
from jaxpref.models.rope import rotate
from jaxpref.typing import Array, Layout

LAYER_INPUT = 'layer_input'  # what a checkpoint's policy may know a layer's input as
LOGITS = 'logits'  # and the head's product
_EVERYWHERE = np.iinfo(np.int32).max  # the window of a layer without one
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
    self.qk_norm, self.whole = config.qk_norm, config.qk_norm_span == 'all'
    if self.qk_norm:
      sizes = (inner, kv_inner) if self.whole else (config.head_dim, config.head_dim)
      self.q_norm, self.k_norm = (_norm(config, size, kind='rms') for size in sizes)

  def __call__(self, x, angles, attend):
    q, k, v = (project(x) for project in (self.q, self.k, self.v))
    if self.qk_norm and self.whole:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (y.reshape(*x.shape[:-1], -1, self.head_dim) for y in (q, k, v))
    if self.qk_norm and not self.whole:
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
    self.attention = Attention(config, attention_key)
    self.mixed = config.num_experts > 0
    self.mlp = _mixture(config, mlp_key) if self.mixed else Mlp(config, mlp_key)
    self.placement = config.norm_placement
    if self.placement != 'post':
      self.attention_norm, self.mlp_norm = (_norm(config, config.width) for _ in range(2))
    if self.placement != 'pre':
      self.attention_post_norm, self.mlp_post_norm = (_norm(config, config.width) for _ in range(2))

  def __call__(self, x, angles, real, attend):
    y = x if self.placement == 'post' else self.attention_norm(x)
    y, memory = self.attention(y, angles, attend)
    x = x + (y if self.placement == 'pre' else self.attention_post_norm(y))
    y = x if self.placement == 'post' else self.mlp_norm(x)
    y, routing = self.mlp(y, real) if self.mixed else (self.mlp(y), None)
    return x + (y if self.placement == 'pre' else self.mlp_post_norm(y)), memory, routing


class Decoder(nnx.Module):
  """Token ids to final-normed states; states to logits or scores."""

  def __init__(self, config: Config, key: Array):
    embed_key, positions_key, layers_key, head_key = _keys(key, 4)
    self.config = config
    self.embed = Embedding(embed_key, config.vocab_size, config.width)
    if config.rope is None:
      self.positions = Embedding(positions_key, config.max_positions, config.width)
    self.layers = nnx.vmap(lambda key: Block(config, key))(_keys(layers_key, config.num_layers))
    self.norm = _norm(config, config.width)
    if config.num_labels:
      self.score = Linear(head_key, (config.width, config.num_labels), bias=False)
    elif not config.tied:
      self.head = Linear(head_key, (config.width, config.vocab_size), bias=False)

  def hidden(self, tokens, layout: Layout, attention, memory, dtype, checkpoint: Callable):
    """States [G, S, D] of tokens [G, S], what `attention` made of `memory`, and the routing.

    Args:
      layout: of the tokens, [G, S]; who sees whom is up to `attention`.
      attention: `(q, k, v, window, layer, memory) -> (out, memory)`, see `attention.Flat`.
      memory: any pytree, carried from layer to layer.
      dtype: of the computation; parameters are cast where they are used.
      checkpoint: wraps the layer (`jax.checkpoint` under some policy, or the identity).

    Returns:
      The states, the memory, and a `Routing` of all layers (None without experts).
    """
    config = self.config
    x = grouped(self.embed(tokens, dtype) * config.embed_scale)
    if config.rope is None:
      x = x + self.positions(layout.positions, dtype)
    ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
    turns = [rope.angles(layout.positions, config.head_dim) for rope in ropes]
    real = layout.examples != 0
    windows = None
    if config.windows is not None:
      windows = jnp.array([_EVERYWHERE if w is None else w for w in config.windows], jnp.int32)
    graphdef, params = nnx.split(self.layers)

    def layer(carry, scanned):
      x, memory = carry
      params, window, index = scanned
      block = nnx.merge(graphdef, held(params, 'layers'))
      x = checkpoint_name(x, LAYER_INPUT)
      angles = turns[0] if turns else None
      if config.local_rope is not None and windows is not None:
        angles = jax.tree.map(functools.partial(jnp.where, window < _EVERYWHERE), *turns[::-1])
      x, memory, routing = block(
        x, angles, real, lambda q, k, v: attention(q, k, v, window, index, memory)
      )
      return (grouped(x), memory), routing

    scanned = params, windows, jnp.arange(config.num_layers)
    (x, memory), routing = jax.lax.scan(checkpoint(layer), (x, memory), scanned)
    return self.norm(x), memory, routing

  def unembed(self, states):
    """float32 logits [..., V] of states [..., D]."""
    w = self.embed.w.get_value().T if self.config.tied else self.head.w.get_value()
    logits = checkpoint_name(linear(states, w, jnp.float32), LOGITS)
    return cap(logits, self.config.logit_cap)

  def scores(self, states):
    """float32 scores [..., num_labels] of states [..., D]."""
    return self.score(states, jnp.float32)


def _norm(config: Config, size: int, kind: str = '') -> Norm:
  return Norm(size, kind=kind or config.norm, eps=config.norm_eps, offset=config.norm_offset)


def _mixture(config: Config, key: Array) -> Mixture:
  return Mixture(
    key,
    num=config.num_experts,
    picked=config.experts_per_token,
    normalize=config.normalize_experts,
    width=config.width,
    inner=config.mlp_width,
    activation=_ACTIVATIONS[config.activation],
    scale=_residual_scale(config),
  )


def _keys(key: Array, n: int) -> Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def _residual_scale(config: Config) -> float:
  """Of the 2 * num_layers outputs that are summed into the residual stream."""
  return (2 * config.num_layers) ** -0.5
