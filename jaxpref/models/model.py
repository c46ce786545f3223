"""A model as the rest of the package sees it: a frozen description and pure functions of params.

Parameters are a plain nested dict of arrays (`layers/attention/q/w` and so on; a layer's have a
leading layer axis). Nothing beyond `models/` knows flax.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpref.models import blocked, context, kernel_gpu, kernel_tpu, spans
from jaxpref.models.attention import (
  Branched,
  Branches,
  Cache,
  Cached,
  attend,
  attend_branches,
  checked_fill,
)
from jaxpref.models.blocked import Flat, Form
from jaxpref.models.config import Config
from jaxpref.models.decoder import LAYER_INPUT, Decoder
from jaxpref.models.experts import Routing
from jaxpref.models.layers import PROJECTION
from jaxpref.models.placement import mesh_size
from jaxpref.typing import Array, Layout, Params

REMAT = ('full', 'dots', 'offload')

ATTENTION = ('blocked', 'kernel')  # ways to attend within packed rows; both compute the same
KERNELS: Mapping[str, Callable] = {
  'gpu': blocked.ByRows(kernel_gpu.attend_rows),
  'tpu': blocked.ByRows(kernel_tpu.attend_rows),
}
# In plain XLA: loops that turn as often as the data needs, or a program that is always the same.
PLAIN: Mapping[str, Callable] = {'cpu': spans.attend}
ELSEWHERE = blocked.ByRows(blocked.attend_rows)


def default_dtype(platform: str = '') -> np.dtype:
  """Of computation: float32 on CPU, bfloat16 on accelerators. `platform` '': what is here."""
  return jnp.dtype('float32' if (platform or jax.default_backend()) == 'cpu' else 'bfloat16')


def row_attention(name: str = 'auto', platform: str = '') -> Callable:
  """How tokens attend within packed rows, with arguments as `spans.attend` has them.

  Args:
    name: 'blocked': in plain XLA, anywhere, as suits the platform. 'kernel': in Pallas, on GPUs and
      TPUs. 'auto': the kernel where there is one.
    platform: 'cpu', 'gpu' or 'tpu'; '': what is here.
  """
  platform = platform or jax.default_backend()
  if name not in ('auto', *ATTENTION):
    known = ', '.join(ATTENTION)
    raise ValueError(f"config.attention must be 'auto' or one of {known}, got {name!r}")
  if name == 'kernel' and platform not in KERNELS:
    raise ValueError(
      f"config.attention='kernel' is for GPUs and TPUs, this is {platform}; leave it at 'auto'"
    )
  if name == 'auto' and platform == 'gpu' and not kernel_gpu.available():
    name = 'blocked'
  plain = PLAIN.get(platform, ELSEWHERE)
  return plain if name == 'blocked' else KERNELS.get(platform, plain)


@dataclasses.dataclass(frozen=True)
class Model:
  """Static under jit: `jax.jit(lambda params: model.hidden(params, tokens, layout))`.

  Attributes:
    config: the decoder.
    dtype: of the computation; parameters of any float dtype are cast where they are used. Norms,
      rotations and the softmax are float32 always. None: `default_dtype()`.
    remat: what a layer keeps for its gradient. None: its input and the outputs of projections and
      attention, so that no product is computed twice, only norms, rotations and gates are; 'dots'
      computes attention again, too; 'full' keeps the input and computes all of the rest again;
      'offload' does so, and moves that input to the host's memory meanwhile.
    attention: how tokens attend within rows: what `row_attention` gives, or the like of it.
      None: `row_attention()`. Sampling, which reads a cache, attends in its own way, and so do
      rows that are divided over devices (see `context`).
    keep_logits: the head's product is kept for its gradient, float32 for every scored token by the
      vocabulary, and not computed again.
    temperature: τ > 0 of the policy, softmax(logits / τ), in training and in sampling alike.
  """

  config: Config
  dtype: np.dtype | None = None
  remat: str | None = None
  attention: Callable | None = None
  keep_logits: bool = False
  temperature: float = 1.0

  def __post_init__(self):
    if self.attention is None:
      object.__setattr__(self, 'attention', row_attention())
    dtype = default_dtype() if self.dtype is None else jnp.dtype(self.dtype)
    object.__setattr__(self, 'dtype', dtype)
    if self.remat is not None and self.remat not in REMAT:
      raise ValueError(f'remat must be None or one of {REMAT}, got {self.remat!r}')
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'temperature must be positive and finite, got {self.temperature}')

  @property
  def attention_name(self) -> str:
    """One of `ATTENTION`; a function of one's own has its own."""
    assert self.attention is not None
    if self.attention in KERNELS.values():
      return 'kernel'
    if self.attention in (*PLAIN.values(), ELSEWHERE):
      return 'blocked'
    own = self.attention
    return (own.attend_rows if isinstance(own, blocked.ByRows) else own).__name__

  def replace(self, **changes) -> 'Model':
    return dataclasses.replace(self, **changes)

  def hidden(self, params: Params, tokens, layout, cache: Cache | Branches | None = None):
    """Final-normed states, in the compute dtype.

    Args:
      params: as `init` or `load_hf` made them.
      tokens: int32 [B, L] or [G, R, L], or a tuple of [G, R, L] of one G and several R and L: dense
        work is then done once over all tokens, only attention goes row by row.
      layout: a `Layout` of the same shape, or a tuple of them.
      cache: from `init_cache`, with tokens [B, L], which join it at its fill index; or prompts
        and their branches, with tokens [S, 1].

    Returns:
      States, of the structure of tokens with D appended; with a cache `(states, cache)`.
    """
    if cache is not None:
      _check_tokens(tokens, layout, ranks=(2,))
      if isinstance(cache, Branches):
        return _hidden_branches(self, params, tokens, layout, cache)
      checked_fill(cache, tokens.shape[1])
      return _hidden_cached(self, params, tokens, layout, cache)
    return self.hidden_with_aux(params, tokens, layout)[0]

  def hidden_with_aux(self, params: Params, tokens, layout):
    """`hidden` without a cache, and what the routers did: a `Routing`, None without experts."""
    if isinstance(tokens, tuple):
      states, routing = self.states(params, tokens, layout)
      return states.rows(), routing
    _check_tokens(tokens, layout, ranks=(2, 3))
    rows = jax.tree.map(lambda x: x if x.ndim == 3 else x[None], (tokens, layout))
    found, routing = self.states(params, *((part,) for part in rows))
    return found.rows()[0].reshape(*tokens.shape, -1), routing

  def states(
    self, params: Params, tokens: tuple[Array, ...], layout: tuple[Layout, ...]
  ) -> tuple[context.States, Routing | None]:
    """`hidden_with_aux` of rows that stay where they are computed: divided over `context`."""
    for part, part_layout in zip(tokens, layout, strict=True):
      _check_tokens(part, part_layout, ranks=(3,))
    shapes = tuple((part.shape[1], part.shape[2]) for part in tokens)
    division = context.Division(shapes, mesh_size(context.AXIS))
    states, routing = _hidden_rows(self, division, params, tokens, layout)
    if routing is not None:  # sums over tokens, so those of a group's parts are added up
      routing = jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, division.parts, *x.shape[2:]).sum(2), routing
      )
    return context.States(states, division), routing

  def unembed(self, params: Params, states: Array) -> Array:
    """float32 logits [..., V] of states [..., D], divided by the temperature."""
    if self.config.num_labels:
      raise ValueError(
        f'this model scores sequences ({self.config.num_labels} labels): it has no language-model '
        'head; model.scores(params, states) gives its scores'
      )
    logits = nnx.merge(_structure(self.config)[0], params).unembed(states)
    return logits if self.temperature == 1 else logits / self.temperature

  def scores(self, params: Params, states: Array) -> Array:
    """float32 scores [..., num_labels] of states [..., D]; a sequence's is its last token's."""
    if not self.config.num_labels:
      raise ValueError('this model has no scores: its config has num_labels = 0')
    return nnx.merge(_structure(self.config)[0], params).scores(states)

  def logits(self, params: Params, tokens: Array, mask: Array) -> Array:
    """float32 [B, T, V] for one sequence a row, padded on either side.

    Args:
      tokens: int32 [B, T].
      mask: bool [B, T], False on padding; positions count the real tokens.
    """
    return self.unembed(params, self.hidden(params, tokens, mask_layout(mask)))

  def init_cache(self, batch: int, length: int, dtype=None) -> Cache:
    """An empty cache of `length` slots for each of `batch` rows; `dtype` is the compute dtype."""
    config = self.config
    shape = config.num_layers, batch, config.num_kv_heads, length, config.head_dim
    k = jnp.zeros(shape, dtype or self.dtype)
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(k, k, Layout(slots, slots, slots), jnp.zeros((), jnp.int32))

  def param_shapes(self, dtype=jnp.float32) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s."""
    shapes = _structure(self.config)[1]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)

  def flops_per_token(self, context: float) -> float:
    """Forward model FLOPs of one token that attends to `context` keys, the head left out.

    Two for each weight of a projection, four for each key and head channel (scores and their sum).
    """
    config = self.config
    used = config.experts_per_token / config.num_experts if config.num_experts else 1.0
    projections = sum(
      x.size * (used if 'experts' in path else 1.0)
      for path, x in _flat_paths(self.param_shapes()['layers'])
      if path[-1] == 'w'
    )
    keys = sum(min(context, w or context) for w in config.windows or (None,) * config.num_layers)
    return 2.0 * projections + 4.0 * keys * config.num_heads * config.head_dim

  @property
  def head_flops_per_token(self) -> float:
    """Forward model FLOPs of one token's logits."""
    return 2.0 * self.config.width * self.config.vocab_size


# Under jit of their own, or a call outside of jit would compile the scan anew every time.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _hidden_rows(
  model: Model,
  division: context.Division,
  params: Params,
  tokens: tuple[Array, ...],
  layouts: tuple[Layout, ...],
):
  flat = division.divide(tokens)
  layout = Layout(*map(division.divide, zip(*layouts, strict=True)))
  form = _form(model.config)
  assert model.attention is not None
  attention: Callable = Flat(functools.partial(model.attention, form), layouts)
  if division.parts > 1:
    attention = context.Divided(form, division, layouts)
  states, _, routing = _run(model, params, flat, layout, attention, None)
  return states, routing


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _hidden_cached(model: Model, params, tokens: Array, layout: Layout, cache: Cache):
  attention = Cached(_attend(model.config), cache, layout)
  flat, places = jax.tree.map(lambda x: x.reshape(1, -1), (tokens, layout))
  states, (k, v), _ = _run(model, params, flat, places, attention, (cache.k, cache.v))
  states = states.reshape(*tokens.shape, -1)
  return states, Cache(k, v, attention.layout, cache.fill + tokens.shape[1])


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _hidden_branches(model: Model, params, tokens: Array, layout: Layout, cache: Branches):
  attention = Branched(_attend(model.config, attend_branches), cache, layout)
  flat, places = jax.tree.map(lambda x: x.reshape(1, -1), (tokens, layout))
  states, (k, v), _ = _run(model, params, flat, places, attention, (cache.own.k, cache.own.v))
  own = Cache(k, v, attention.layout, cache.own.fill + 1)
  return states.reshape(*tokens.shape, -1), cache._replace(own=own)


def _run(model: Model, params, tokens, layout, attention, memory):
  decoder = nnx.merge(_structure(model.config)[0], params)
  checkpoint = _checkpoint(model.remat)
  return decoder.hidden(tokens, layout, attention, memory, model.dtype, checkpoint)


def _form(config: Config) -> Form:
  return Form(config.query_scalar or config.head_dim, config.attention_cap)


def _attend(config: Config, how: Callable = attend) -> Callable:
  return functools.partial(how, **_form(config)._asdict())


def _checkpoint(remat: str | None) -> Callable:
  policies = jax.checkpoint_policies
  policy = {
    None: policies.save_only_these_names(PROJECTION, blocked.ATTENDED),
    'full': None,
    'dots': policies.save_only_these_names(PROJECTION),
    'offload': policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[LAYER_INPUT],
      offload_src='device',
      offload_dst='pinned_host',
    ),
  }[remat]
  # Inside a scan the compiler cannot merge the two computations, so nothing need prevent it.
  return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)


def init(config: Config, key: Array, dtype=jnp.float32) -> tuple[Model, Params]:
  """A model from scratch: its parameters in `dtype`, drawn from `key`."""
  return Model(config), _init_params(config, key, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init_params(config: Config, key: Array, dtype) -> Params:
  params = nnx.to_pure_dict(nnx.state(Decoder(config, key)))
  return jax.tree.map(lambda x: x.astype(dtype), params)


def mask_layout(mask: Array) -> Layout:
  """The layout of one sequence a row, mask bool [B, T] (False is padding, on either side)."""
  real = mask.astype(jnp.int32)
  return Layout(jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0), real, jnp.zeros_like(real))


@functools.cache
def _structure(config: Config):
  """The decoder's graph and its parameters' shapes, made without computing any."""
  module = nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))
  graphdef, state = nnx.split(module)
  return graphdef, nnx.to_pure_dict(state)


def _flat_paths(tree: Params) -> list[tuple[list[str], Array]]:
  return [([key.key for key in path], leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _check_tokens(tokens, layout: Layout, ranks: tuple[int, ...]):
  if tokens.ndim not in ranks or any(x.shape != tokens.shape for x in layout):
    raise ValueError(
      f'tokens must have rank {" or ".join(map(str, ranks))} and the layout its shape; got tokens '
      f'{tokens.shape}, layout {tuple(x.shape for x in layout)}'
    )
