"""The sampler: prompts -> completions with their log-probs, on a KV cache, in one jit.

`sample` is a pure function of arrays. A token's randomness comes from (seed, rollout, prompt id,
sample index, token index) alone, so a completion does not depend on what else is in the batch, on
its slot, or on which side the prompt is padded.

Filters turn logits [..., V] into logits with -inf at what may not be sampled. `warp` applies them
in the order of Hugging Face transformers: temperature, top-k, top-p, min-p, each over what the one
before left. Their settings are traced numbers: changing them compiles nothing.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxpref.models import Cache, Model, mask_layout
from jaxpref.stops import follow
from jaxpref.typing import Array, Layout, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
  """How to pick the next token; the defaults sample from the model as it is.

  Attributes:
    temperature: divides the logits; 0 is greedy.
    top_k: keeps the k likeliest tokens; 0 is off.
    top_p: keeps the likeliest tokens that together reach this probability; 1 is off.
    min_p: keeps tokens at least this fraction as likely as the likeliest; 0 is off.
  """

  temperature: float | Array = 1.0
  top_k: float | Array = 0
  top_p: float | Array = 1.0
  min_p: float | Array = 0.0

  def __post_init__(self):
    ranges = {
      'temperature': (lambda x: x >= 0, '>= 0 (0 is greedy)'),
      'top_k': (lambda x: x >= 0 and x == int(x), 'a whole number >= 0 (0 is off)'),
      'top_p': (lambda x: 0 < x <= 1, 'above 0 and at most 1 (1 is off)'),
      'min_p': (lambda x: 0 <= x <= 1, 'between 0 and 1 (0 is off)'),
    }
    for name, (holds, expected) in ranges.items():
      value = getattr(self, name)
      if isinstance(value, int | float):  # traced values pass unchecked
        if not holds(value):
          raise ValueError(f'Sampling.{name} must be {expected}, got {value}')
        object.__setattr__(self, name, float(value))  # jit would compile 1 and 1.0 separately


PLAIN = Sampling()


class Samples(NamedTuple):
  """Completions. `mask` is True up to and including the token that ends it; beyond, all is 0."""

  tokens: Array  # int32 [B, T]
  mask: Array  # bool [B, T]
  logps: Array  # float32 [B, T] under the model itself: no temperature, no filter
  sampling_logps: Array  # float32 [B, T] under the distribution that was sampled from
  finished: Array  # bool [B]: ended by a stop token or string, not by the length limit


class Decoding(NamedTuple):
  """A batch of completions on the way."""

  step: Array  # int32 []: tokens sampled so far
  samples: Samples
  cache: Cache
  lengths: Array  # int32 [B]: prompt lengths, hence the next token's position
  keys: Array  # [B]: one random key per completion
  states: Array  # int32 [B]: of the automaton that looks for stop strings


def temper(logits: Array, temperature: float | Array) -> Array:
  """zᵢ / τ, and for τ = 0 its limit: only the first largest logit stays."""
  temperature = jnp.asarray(temperature, logits.dtype)

  def divided(z):
    # Shifted so that the largest is 0: a tiny τ then overflows to -inf, never to inf.
    return (z - z.max(-1, keepdims=True)) / temperature

  def greedy(z):
    best = jax.nn.one_hot(z.argmax(-1), z.shape[-1], dtype=bool)
    return jnp.where(best, 0.0, -jnp.inf)

  return jax.lax.cond(temperature > 0, divided, greedy, logits)


def keep_top_k(logits: Array, k: float | Array) -> Array:
  """Keeps the k largest, ties with the k-th too; k = 0 keeps everything."""

  def filtered(z):
    return jnp.where(reaching(z, jnp.ones_like(z), k), z, -jnp.inf)

  return jax.lax.cond(jnp.asarray(k) > 0, filtered, lambda z: z, logits)


def keep_top_p(logits: Array, p: float | Array) -> Array:
  """Nucleus sampling: keeps i where Σ {πⱼ : πⱼ > πᵢ} < p, π = softmax(z); p = 1 keeps everything.

  That is the smallest set of likeliest tokens whose probability reaches p; ties at the border all
  stay, where an implementation that sorts would keep an arbitrary one of them.
  https://arxiv.org/abs/1904.09751
  """

  def filtered(z):
    return jnp.where(reaching(z, jax.nn.softmax(z), p), z, -jnp.inf)

  return jax.lax.cond(jnp.asarray(p) < 1, filtered, lambda z: z, logits)


def keep_min_p(logits: Array, p: float | Array) -> Array:
  """Keeps πᵢ ≥ p · max π, that is zᵢ ≥ max z + ln p; p = 0 keeps everything.

  https://arxiv.org/abs/2407.01082
  """

  def filtered(z):
    floor = z.max(-1, keepdims=True) + jnp.log(jnp.asarray(p, z.dtype))
    return jnp.where(z >= floor, z, -jnp.inf)

  return jax.lax.cond(jnp.asarray(p) > 0, filtered, lambda z: z, logits)


def reaching(z: Array, weights: Array, target: float | Array) -> Array:
  """Which z are in {z ≥ t}, t the largest with Σ {weights : z ≥ t} ≥ target; all if there is none.

  z, weights float32 [..., V] -> bool [..., V]. The bits of t are found one by one, the highest
  first: 32 sums, where sorting the vocabulary takes many times longer (20x on a CPU).
  """
  bits = jax.lax.bitcast_convert_type(jnp.where(z == 0, 0.0, z), jnp.uint32)  # -0.0 is 0.0
  sign = jnp.uint32(1 << 31)
  order = jnp.where(bits < sign, bits | sign, ~bits)  # unsigned integers in the order of the floats

  def extend(i, t):
    longer = t | (sign >> i.astype(jnp.uint32))
    total = jnp.where(order >= longer, weights, 0.0).sum(-1, keepdims=True)
    return jnp.where(total >= target, longer, t)

  return order >= jax.lax.fori_loop(0, 32, extend, jnp.zeros_like(order[..., :1]))


@jax.jit
def warp(logits: Array, sampling: Sampling) -> Array:
  """Logits [..., V] of the distribution to sample from."""
  logits = temper(logits, sampling.temperature)
  logits = keep_top_k(logits, sampling.top_k)
  logits = keep_top_p(logits, sampling.top_p)
  return keep_min_p(logits, sampling.min_p)


@functools.partial(jax.jit, static_argnames=('model', 'max_new_tokens'))
def sample(
  model: Model,
  params: Params,
  prompts: Array,
  mask: Array,
  *,
  seed: int | Array,
  ids: Array | None = None,
  k: Array | None = None,
  rollout: int | Array = 0,
  max_new_tokens: int,
  sampling: Sampling = PLAIN,
  stop_ids: Sequence[int] = (),
  stops: Array | None = None,
) -> Samples:
  """Completes prompts until every row has met its end or has `max_new_tokens`.

  Args:
    model: a decoder; its cache is in its compute dtype.
    params: the decoder's parameters.
    prompts: int32 [B, P], padded on either side.
    mask: bool [B, P], True on the prompt. A row without any is idle: finished, with no tokens.
    seed: of the run.
    ids: int32 [B], the prompts' ids for the random keys; by default their row numbers.
    k: int32 [B], which of a prompt's samples a row is, for the random keys; by default 0.
    rollout: which round of sampling this is, for the random keys.
    max_new_tokens: T, at least 1; with the shapes, all that a compiled sampler depends on.
    sampling: temperature and filters.
    stop_ids: tokens that end a completion; they stay in it.
    stops: int32 [S, V], the automaton of strings that end a completion (`stops.automaton`); the
      token that completes one stays in it.
  """
  chex.assert_equal_shape([prompts, mask])
  chex.assert_rank(prompts, 2)
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens must be at least 1, got {max_new_tokens}')
  B, P = prompts.shape
  T = max_new_tokens
  ids = jnp.arange(B) if ids is None else ids
  k = jnp.zeros(B, jnp.int32) if k is None else k

  cache = model.init_cache(B, P + T - 1)  # the last token is sampled but never read
  states, cache = model.hidden(params, prompts, mask_layout(mask), cache)
  last = P - 1 - mask[:, ::-1].argmax(1)
  decoding = Decoding(
    step=jnp.zeros((), jnp.int32),
    samples=Samples(
      tokens=jnp.zeros((B, T), jnp.int32),
      mask=jnp.zeros((B, T), bool),
      logps=jnp.zeros((B, T)),
      sampling_logps=jnp.zeros((B, T)),
      finished=~mask.any(1),
    ),
    cache=cache,
    lengths=mask.sum(1),
    keys=row_keys(seed, rollout, ids, k),
    states=jnp.zeros(B, jnp.int32),
  )
  states = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
  decoding = pick(decoding, model.unembed(params, states), sampling, stop_ids, stops)

  def unfinished(d: Decoding):
    return (d.step < T) & ~d.samples.finished.all()

  def body(d: Decoding):
    alive = ~d.samples.finished[:, None]
    tokens = jax.lax.dynamic_slice_in_dim(d.samples.tokens, d.step - 1, 1, axis=1)
    positions = jnp.where(alive, d.lengths[:, None] + d.step - 1, 0)
    layout = Layout(positions, alive.astype(jnp.int32), jnp.zeros_like(positions))
    states, cache = model.hidden(params, tokens, layout, d.cache)
    logits = model.unembed(params, states[:, 0])
    return pick(d._replace(cache=cache), logits, sampling, stop_ids, stops)

  return jax.lax.while_loop(unfinished, body, decoding).samples


def row_keys(seed: int | Array, rollout: int | Array, ids: Array, k: Array) -> Array:
  """One random key per completion, [B], from nothing but these numbers."""
  # Named, because other generators (jax's rbg) draw differently under vmap, batch by batch.
  key = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), rollout)
  fold = jax.vmap(jax.random.fold_in)
  return fold(fold(jnp.broadcast_to(key, ids.shape), ids), k)


def draw(keys: Array, logits: Array) -> tuple[Array, Array]:
  """One token per row by softmax(logits), and its log-prob: int32 [B], float32 [B].

  In two steps, a block of about √V tokens, then one of its tokens: 2√V random numbers a row, where
  one for each token of the vocabulary costs more than the rest of a small model's step.

  Args:
    keys: [B], random keys.
    logits: float32 [B, V], -inf at what may not be drawn.
  """
  B, V = logits.shape
  size = math.isqrt(V - 1) + 1
  blocks = jnp.pad(logits, ((0, 0), (0, -V % size)), constant_values=-jnp.inf)
  blocks = blocks.reshape(B, -1, size)
  totals = jax.nn.logsumexp(blocks, axis=-1)
  keys = jax.vmap(jax.random.split)(keys)
  categorical = jax.vmap(jax.random.categorical)
  block = categorical(keys[:, 0], totals)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  place = categorical(keys[:, 1], inside)
  logps = jnp.take_along_axis(inside, place[:, None], axis=1)[:, 0]
  return (block * size + place).astype(jnp.int32), logps - jax.nn.logsumexp(totals, axis=-1)


def choose(
  keys: Array, step: Array, logits: Array, sampling: Sampling
) -> tuple[Array, Array, Array]:
  """Tokens [B], their log-probs under the model and under the distribution sampled from.

  Args:
    keys: [B], of the completions.
    step: int32 [] or [B], the tokens' index within them.
    logits: float32 [B, V], of the model.
    sampling: temperature and filters.
  """
  keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
  tokens, sampling_logps = draw(keys, warp(logits, sampling))
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
  return tokens, chosen - jax.nn.logsumexp(logits, axis=-1), sampling_logps


def stopping(tokens: Array, stop_ids: Sequence[int]) -> Array:
  """Which tokens [B] are stop tokens: bool [B]."""
  return (tokens[:, None] == jnp.asarray(stop_ids, jnp.int32)[None]).any(1)


def pick(
  decoding: Decoding,
  logits: Array,
  sampling: Sampling,
  stop_ids: Sequence[int],
  stops: Array | None,
) -> Decoding:
  """Samples the next token of each unfinished row from float32 logits [B, V]."""
  step, samples = decoding.step, decoding.samples
  alive = ~samples.finished
  tokens, logps, sampling_logps = choose(decoding.keys, step, logits, sampling)
  states, stopped = follow(stops, decoding.states, tokens)

  def put(array, value):
    return array.at[:, step].set(jnp.where(alive, value, 0))

  samples = Samples(
    tokens=put(samples.tokens, tokens),
    mask=samples.mask.at[:, step].set(alive),
    logps=put(samples.logps, logps),
    sampling_logps=put(samples.sampling_logps, sampling_logps),
    finished=samples.finished | stopping(tokens, stop_ids) | stopped,
  )
  return decoding._replace(step=step + 1, samples=samples, states=states)
