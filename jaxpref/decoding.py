"""Groups of samples for rollouts: K completions a prompt on a fixed number of slots, in one jit.

A prompt is read once for all its samples. Each slot holds one completion and reads one token a
step; when it ends, the slot takes the next one, so a long completion holds up nobody. What is
sampled is what `jaxpref.sampling.sample` would: the random keys are the same, and nothing depends
on the slots.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxpref.models import Branches, Model, mask_layout
from jaxpref.sampling import PLAIN, Samples, Sampling, choose, row_keys, stopping
from jaxpref.stops import follow
from jaxpref.typing import Array, Layout, Params


class Pool(NamedTuple):
  """Slots at work. A job is one completion, numbered prompt * K + sample; B * K is none."""

  jobs: Array  # int32 [S], each slot's
  steps: Array  # int32 [S], tokens sampled of it
  tokens: Array  # int32 [S], what each slot reads next
  states: Array  # int32 [S], of the automaton that looks for stop strings
  cache: Branches
  samples: Samples  # of all jobs, [B * K, T]
  handed_out: Array  # int32 [], how many jobs
  prompt: Array  # int32 [], the prompt read last, and
  prompt_cache: Any  # what was read of it


@functools.partial(jax.jit, static_argnames=('model', 'num_samples', 'slots', 'max_new_tokens'))
def sample_groups(
  model: Model,
  params: Params,
  prompts: Array,
  mask: Array,
  *,
  num_samples: int,
  slots: int | None = None,
  seed: int | Array,
  ids: Array | None = None,
  rollout: int | Array = 0,
  max_new_tokens: int,
  sampling: Sampling = PLAIN,
  stop_ids: Sequence[int] = (),
  stops: Array | None = None,
) -> Samples:
  """K completions of each of B prompts: `sample` of every prompt K times over, k = 0 .. K-1.

  With a slot for every completion, each prompt's keys and values are held once and shared by its
  samples. With fewer, a slot has its own copy, made when it takes a job (in order, prompt by
  prompt), and prompts are read one at a time, when their turn comes: the cache then holds
  slots * (P + T) + P tokens.

  Even lengths go best with all slots; where a few completions run long, about a quarter of them
  halves the work. On several devices take all: fewer slots are not kept apart by device.

  Args:
    model: a decoder; its cache is in its compute dtype.
    params: the decoder's parameters.
    prompts: int32 [B, P], padded on either side.
    mask: bool [B, P], True on the prompt. Rows without any are idle: finished, with no tokens.
    num_samples: K.
    slots: completions worked on at a time, 1 to B * K; None: all.
    seed: of the run.
    ids: int32 [B], the prompts' ids for the random keys; by default their row numbers.
    rollout: which round of sampling this is, for the random keys.
    max_new_tokens: T, at least 1.
    sampling: temperature and filters.
    stop_ids, stops: what ends a completion, as in `sample`.

  Returns:
    Samples of [B, K, T], `finished` [B, K].
  """
  chex.assert_equal_shape([prompts, mask])
  chex.assert_rank(prompts, 2)
  (B, P), K, T = prompts.shape, num_samples, max_new_tokens
  jobs = B * K
  slots = jobs if slots is None else slots
  if min(K, T) < 1 or not 1 <= slots <= jobs:
    raise ValueError(
      'num_samples and max_new_tokens must be at least 1 and slots from 1 to prompts * num_samples '
      f'= {jobs}, got {K}, {T} and {slots}'
    )
  prompts, mask = jnp.asarray(prompts, jnp.int32), jnp.asarray(mask)
  ids = jnp.repeat(jnp.arange(B) if ids is None else jnp.asarray(ids), K)
  keys = row_keys(seed, rollout, ids, jnp.tile(jnp.arange(K), B))
  present = jnp.repeat(mask.any(1), K)
  # A prompt's last token is read by each of its samples: its state is what a sample begins from.
  last = P - 1 - mask[:, ::-1].argmax(1)
  shared = mask & (jnp.arange(P)[None] != last[:, None])
  last_tokens = jnp.take_along_axis(prompts, last[:, None], axis=1)[:, 0]
  starts = mask.sum(1) - 1

  def read(tokens, mask):
    cache = model.init_cache(*tokens.shape)
    return model.hidden(params, tokens, mask_layout(mask), cache)[1]

  def advance(pool: Pool) -> Pool:
    alive = pool.jobs < jobs
    job = jnp.minimum(pool.jobs, jobs - 1)
    positions = jnp.where(alive, starts[job // K] + pool.steps, 0)
    examples = jnp.where(alive, job + 1, 0)
    layout = Layout(positions[:, None], examples[:, None], jnp.zeros_like(positions[:, None]))
    hidden, cache = model.hidden(params, pool.tokens[:, None], layout, pool.cache)
    logits = model.unembed(params, hidden[:, 0])
    tokens, logps, sampling_logps = choose(keys[job], pool.steps, logits, sampling)
    states, found = follow(stops, pool.states, tokens)
    stopped = stopping(tokens, stop_ids) | found
    cell = pool.jobs, pool.steps  # out of range where idle

    def put(array, values):
      return array.at[cell].set(values, mode='drop')

    samples = Samples(
      tokens=put(pool.samples.tokens, tokens),
      mask=put(pool.samples.mask, True),
      logps=put(pool.samples.logps, logps),
      sampling_logps=put(pool.samples.sampling_logps, sampling_logps),
      finished=pool.samples.finished.at[pool.jobs].set(stopped, mode='drop'),
    )
    steps = pool.steps + 1
    over = stopped | (steps == T)
    return pool._replace(
      jobs=jnp.where(over, jobs, pool.jobs),
      steps=steps,
      tokens=tokens,
      states=states,
      cache=cache,
      samples=samples,
    )

  order = jnp.argsort(~present, stable=True)  # idle prompts' jobs are never handed out
  total = present.sum()

  def refill(pool: Pool) -> Pool:
    return jax.lax.while_loop(
      lambda pool: (pool.handed_out < total) & (pool.jobs == jobs).any(), hand_out, pool
    )

  def hand_out(pool: Pool) -> Pool:
    slot = (pool.jobs == jobs).argmax()
    job = order[pool.handed_out]
    prompt = job // K
    prompt_cache = jax.lax.cond(
      prompt == pool.prompt,
      lambda: pool.prompt_cache,
      lambda: read(prompts[prompt][None], shared[prompt][None]),
    )
    return pool._replace(
      jobs=pool.jobs.at[slot].set(job),
      steps=pool.steps.at[slot].set(0),
      tokens=pool.tokens.at[slot].set(last_tokens[prompt]),
      states=pool.states.at[slot].set(0),
      cache=pool.cache._replace(prompts=pool.cache.prompts.with_row(slot, prompt_cache)),
      handed_out=pool.handed_out + 1,
      prompt=prompt,
      prompt_cache=prompt_cache,
    )

  pool = Pool(
    jobs=jnp.full(slots, jobs),
    steps=jnp.zeros(slots, jnp.int32),
    tokens=jnp.zeros(slots, jnp.int32),
    states=jnp.zeros(slots, jnp.int32),
    cache=Branches(model.init_cache(slots, P), model.init_cache(slots, T)),
    samples=Samples(
      tokens=jnp.zeros((jobs, T), jnp.int32),
      mask=jnp.zeros((jobs, T), bool),
      logps=jnp.zeros((jobs, T)),
      sampling_logps=jnp.zeros((jobs, T)),
      finished=~present,
    ),
    handed_out=jnp.zeros((), jnp.int32),
    prompt=jnp.full((), -1),
    prompt_cache=model.init_cache(1, P),
  )
  if slots == jobs:
    pool = pool._replace(
      jobs=jnp.where(present, jnp.arange(jobs), jobs),
      tokens=jnp.repeat(last_tokens, K),
      cache=pool.cache._replace(prompts=read(prompts, shared)),
      prompt_cache=None,
    )
    body = advance

  else:
    pool = refill(pool)

    def body(pool: Pool) -> Pool:
      return refill(advance(pool))

  pool = jax.lax.while_loop(lambda pool: (pool.jobs < jobs).any(), body, pool)
  return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), pool.samples)
