"""A user's own flax module, nnx or linen, as a model: it joins everything that takes a `Model`."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpref.models.attention import Branches, checked_fill, visible
from jaxpref.models.context import Division, States
from jaxpref.models.model import mask_layout
from jaxpref.typing import Array, Layout, Params


class Transcript(NamedTuple):
  """What was read so far, in place of a cache: the module reads all of it again at every step."""

  tokens: Array  # int32 [B, C]
  layout: Layout  # of every slot, int32 [B, C]; an empty slot is padding
  fill: Array  # int32 scalar

  def with_row(self, row: Array, other: 'Transcript') -> 'Transcript':
    """Row `row` replaced by the one row of `other`."""
    tokens, layout = jax.tree.map(
      lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0),
      (self.tokens, self.layout),
      (other.tokens, other.layout),
    )
    return self._replace(tokens=tokens, layout=layout)


@dataclasses.dataclass(frozen=True)
class Outline:
  """What is known of a module from outside."""

  name: str
  vocab_size: int
  width: int
  max_positions: int = 2**31 - 1
  size: int = 0  # parameters
  rope: None = None  # whatever it does with positions, it does up to max_positions
  source: str = ''

  @property
  def position_limit(self) -> int:
    return self.max_positions


@dataclasses.dataclass(frozen=True)
class Adapted:
  """The interface of `Model` around a module; made by `adapt`, static under jit."""

  config: Outline
  module: Any  # an nnx graph definition or a linen module: hashable, without parameters
  run: Callable
  head: Callable
  dtype: np.dtype
  remat: None = None

  def replace(self, **changes) -> 'Adapted':
    return dataclasses.replace(self, **changes)

  def hidden(self, params: Params, tokens, layout, cache: Transcript | Branches | None = None):
    """As `Model.hidden`; rows of different lengths are run one after another."""
    if isinstance(cache, Branches):
      return self._branch(params, tokens, layout, cache)
    if cache is not None:
      return self._continue(params, tokens, layout, cache)
    if isinstance(tokens, tuple):
      return tuple(self.hidden(params, *rows) for rows in zip(tokens, layout, strict=True))
    rows, row_layout = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (tokens, layout))
    mask = visible(row_layout, row_layout)
    states = _call(self.module, self.run, params, rows, row_layout.positions, mask)
    return states.reshape(*tokens.shape, -1)

  def hidden_with_aux(self, params: Params, tokens, layout):
    """`hidden`, and no routing."""
    return self.hidden(params, tokens, layout), None

  def states(self, params: Params, tokens: tuple, layout: tuple) -> tuple[States, None]:
    """As `Model.states`; a module's rows are never divided over `context`."""
    division = Division(tuple((part.shape[1], part.shape[2]) for part in tokens), 1)
    return States(division.divide(self.hidden(params, tokens, layout)), division), None

  def unembed(self, params: Params, states: Array) -> Array:
    """float32 logits [..., V] of states [..., D]."""
    return _call(self.module, self.head, params, states).astype(jnp.float32)

  def logits(self, params: Params, tokens: Array, mask: Array) -> Array:
    """float32 [B, T, V] for one sequence a row, padded on either side."""
    return self.unembed(params, self.hidden(params, tokens, mask_layout(mask)))

  def init_cache(self, batch: int, length: int, dtype=None) -> Transcript:
    """Room for `length` tokens of each of `batch` rows; `dtype` is of no matter here."""
    slots = jnp.zeros((batch, length), jnp.int32)
    return Transcript(slots, Layout(slots, slots, slots), jnp.zeros((), jnp.int32))

  def flops_per_token(self, context: float) -> float:
    """Two for each parameter but a head's: attention is not known from outside."""
    return max(0.0, 2.0 * self.config.size - self.head_flops_per_token)

  @property
  def head_flops_per_token(self) -> float:
    return 2.0 * self.config.width * self.config.vocab_size

  def _continue(self, params: Params, tokens: Array, layout: Layout, cache: Transcript):
    length = tokens.shape[1]
    checked_fill(cache, length)
    tokens, layout = jax.tree.map(
      lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, cache.fill)),
      (cache.tokens, cache.layout),
      (tokens, layout),
    )
    states = self.hidden(params, tokens, layout)
    new = jax.lax.dynamic_slice_in_dim(states, cache.fill, length, axis=1)
    return new, Transcript(tokens, layout, cache.fill + length)

  def _branch(self, params: Params, tokens: Array, layout: Layout, cache: Branches):
    """All of each branch's row anew, its prompt first, then its ring from the oldest column on."""
    prompts, own = cache
    columns = own.tokens.shape[1]
    column = own.fill % columns
    own_tokens, own_layout = jax.tree.map(
      lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, column)),
      (own.tokens, own.layout),
      (tokens, layout),
    )
    n = tokens.shape[0] // prompts.tokens.shape[0]
    real = jnp.repeat(prompts.layout.examples != 0, n, axis=0)
    prompt_tokens, positions = (
      jnp.repeat(x, n, axis=0) for x in (prompts.tokens, prompts.layout.positions)
    )
    prompt_layout = Layout(
      positions, jnp.where(real, layout.examples, 0), jnp.zeros_like(positions)
    )
    oldest_first = (column + 1 + jnp.arange(columns)) % columns
    rows = jax.tree.map(
      lambda prompt, own: jnp.concatenate([prompt, own[:, oldest_first]], axis=1),
      (prompt_tokens, prompt_layout),
      (own_tokens, own_layout),
    )
    states = self.hidden(params, *rows)[:, -1:]
    return states, cache._replace(own=Transcript(own_tokens, own_layout, own.fill + 1))


# Under jit of its own, or a call outside of jit would compile every operation by itself.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _call(module: Any, method: Callable, params: Params, *args: Array) -> Array:
  if isinstance(module, nnx.GraphDef):
    return method(nnx.merge(module, params), *args)
  return module.apply({'params': params}, *args, method=method)


def adapt(
  module: Any,
  variables: Mapping[str, Any] | None = None,
  *,
  hidden: Callable,
  unembed: Callable,
  vocab_size: int,
  width: int,
  max_positions: int = 2**31 - 1,
) -> tuple[Adapted, Params]:
  """A model and its parameters from a flax module that holds nothing but parameters.

  Args:
    module: an `nnx.Module`, or a linen module with its `variables`.
    variables: what the linen module's `init` returned, {'params': ...}.
    hidden: `(module, tokens, positions, mask) -> states`, a method of the module's class or any
      function. tokens and positions are int32 [N, L]; mask, bool [N, L, L], says which key (last
      axis) a query may see, and is causal; states are [N, L, width], as the head takes them.
      Positions restart within a row: rows are packed, and branches share a prompt.
    unembed: `(module, states [..., width]) -> logits [..., vocab_size]`.
    vocab_size, width: V and D.
    max_positions: the number of positions that the module knows.

  Raises:
    TypeError: `module` is neither, or is a linen module without variables.
    ValueError: it holds state besides parameters.
  """
  linen = sys.modules.get('flax.linen')  # if nobody has imported it, this is no linen module
  if isinstance(module, nnx.Module):
    static, state = nnx.split(module)
    rest = nnx.filter_state(state, nnx.Not(nnx.Param))
    if others := ['/'.join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]:
      raise ValueError(
        f'the module holds more than parameters: {", ".join(others)}; build it without dropout, '
        'random streams and running statistics'
      )
    params = nnx.to_pure_dict(state)
  elif linen is not None and isinstance(module, linen.Module):
    if variables is None:
      raise TypeError('a linen module comes with its variables: adapt(module, variables, ...)')
    if others := sorted(set(variables) - {'params'}):
      raise ValueError(f'the module holds more than parameters: {", ".join(others)}')
    static, params = module, jax.tree.map(jnp.asarray, dict(variables['params']))
  else:
    raise TypeError(f'expected a flax.nnx or flax.linen module, got {type(module).__name__}')
  leaves = jax.tree.leaves(params)
  size = sum(x.size for x in leaves)
  outline = Outline(type(module).__name__, vocab_size, width, max_positions, size)
  return Adapted(outline, static, hidden, unembed, jnp.result_type(*leaves)), params
