"""Text in, text out: encodes prompts, batches them by length, samples, and cuts at stop strings.

The sampler (`jaxpref.sampling`) knows tokens only, and ends a row with the token that completes a
stop string; its text ends before the string, as vLLM's does (transformers leaves it in).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxpref import hosts, sharding, stops
from jaxpref import sampling as sampler
from jaxpref.models import Model
from jaxpref.sampling import PLAIN, Sampling
from jaxpref.typing import Params

Prompt = str | Sequence[Mapping[str, str]]  # text, or chat messages with 'role' and 'content'

SHORTEST = 16  # prompts are padded to this or a larger power of two, so few shapes compile


@dataclass(frozen=True)
class Completion:
  """One completion of one prompt.

  Attributes:
    prompt: the prompt's index in the list that was given.
    k: which of the prompt's samples this is.
    text: without the stop string or the stop token.
    tokens: everything sampled, through the stop token or the token that completed a stop string.
    logps: each token's log-prob under the model itself.
    finish_reason: 'stop', or 'length' where `max_new_tokens` cut it off.
  """

  prompt: int
  k: int
  text: str
  tokens: tuple[int, ...]
  logps: tuple[float, ...]
  finish_reason: str


def generate(
  model: Model, params: Params, tokenizer: Any, prompts: Sequence[Prompt], **options: Any
) -> list[Completion]:
  """Completes every prompt: all samples of the first, then of the next. Options as in `stream`."""
  completions = stream(model, params, tokenizer, prompts, **options)
  return sorted(completions, key=lambda c: (c.prompt, c.k))


def stream(
  model: Model,
  params: Params,
  tokenizer: Any,
  prompts: Sequence[Prompt],
  *,
  max_new_tokens: int,
  sampling: Sampling = PLAIN,
  seed: int = 0,
  rollout: int = 0,
  num_samples: int = 1,
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
  batch_size: int = 16,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Completion]:
  """Yields completions as batches end, shortest prompts first.

  Args:
    model: a decoder.
    params: its parameters.
    tokenizer: a `jaxpref.data` tokenizer; its `stop_ids` always stop.
    prompts: texts or lists of chat messages.
    max_new_tokens: at most so many tokens a completion.
    sampling: temperature and filters.
    seed: of the random keys, with `rollout`, the prompt's index and the sample's.
    rollout: which round of sampling this is.
    num_samples: completions of each prompt.
    stop: strings that end a completion; the earliest counts, and the text ends before it.
    stop_ids: more tokens that end a completion.
    batch_size: completions sampled side by side.
    mesh: whose groups share the rows, and on which the parameters lie; None: one device. The axis
      `context` is not used: its devices all do the same.

  Raises:
    ValueError: for an empty prompt or stop string, or a prompt too long for the model's positions.
  """
  moves = stops.automaton(stop, tokenizer.pieces) if stop else None
  encoded = [encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
  check_lengths(model, encoded, max_new_tokens)
  ends = tuple(sorted({*stop_ids, *tokenizer.stop_ids}))
  jobs = [(i, k) for i in range(len(prompts)) for k in range(num_samples)]
  jobs.sort(key=lambda job: len(encoded[job[0]]))
  B, place = min(batch_size, len(jobs)), lambda arrays: arrays
  if mesh is not None:
    B = -(-B // sharding.groups(mesh)) * sharding.groups(mesh)
    over_groups = jax.sharding.NamedSharding(mesh, jax.P(sharding.GROUPS))
    place = partial(hosts.place, sharding=over_groups)
  for batch in (jobs[at : at + B] for at in range(0, len(jobs), max(B, 1))):
    prompt_tokens, mask = pad_left([encoded[i] for i, _ in batch], B)
    ids, ks = np.array([*batch, *[(0, 0)] * (B - len(batch))], np.int32).T
    prompt_tokens, mask, ids, ks = place((prompt_tokens, mask, ids, ks))
    with _on(mesh):
      samples = sampler.sample(
        model, params, prompt_tokens, mask, seed=seed, ids=ids, k=ks, rollout=rollout,
        max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=ends, stops=moves,
      )  # fmt: skip
    samples = hosts.whole(samples)
    for row, (i, k) in enumerate(batch):
      kept, finished = samples.mask[row], bool(samples.finished[row])
      sampled = samples.tokens[row, kept].tolist()
      text = text_before(sampled, partial(decode_after, tokenizer, encoded[i][-1]), ends, stop)
      if not finished:
        text = text.rstrip('\ufffd')  # the length limit may fall inside a character
      yield Completion(
        prompt=i,
        k=k,
        text=text,
        tokens=tuple(sampled),
        logps=tuple(samples.logps[row, kept].tolist()),
        finish_reason='stop' if finished else 'length',
      )


def _on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def encode(tokenizer: Any, prompt: Prompt, index: int) -> list[int]:
  """A prompt's tokens; text gets one BOS where the tokenizer adds it, chat what its template says.

  `index` names the prompt in errors.
  """
  if isinstance(prompt, str):
    tokens, adds_bos = tokenizer.encode(prompt), tokenizer.adds_bos
  else:
    tokens = tokenizer.encode(tokenizer.apply_chat(prompt, add_generation_prompt=True))
    adds_bos = False
  bos = tokenizer.bos_id
  if bos is not None and (adds_bos or not tokens) and tokens[:1] != [bos]:
    tokens = [bos, *tokens]
  if not tokens:
    raise ValueError(
      f'prompt {index} is empty and the tokenizer has no BOS token to start from; '
      'a prompt needs at least one token'
    )
  return tokens


def decode_after(tokenizer: Any, before: int, tokens: Sequence[int]) -> str:
  """The text that `tokens` add after the token `before`.

  Alone they may decode to less: many tokenizers drop the space that a text begins with.
  """
  prefix, whole = tokenizer.decode([before]), tokenizer.decode([before, *tokens])
  return whole[len(prefix) :] if whole.startswith(prefix) else tokenizer.decode(tokens)


def check_lengths(
  model: Model,
  encoded: Sequence[Sequence[int]],
  max_new_tokens: int,
  origins: Sequence[str] = (),
) -> None:
  """Raises where positions would run out; most rotary ones have no such end.

  `origins` are where the prompts come from, if it is known.
  """
  limit = model.config.position_limit
  for i, tokens in enumerate(encoded):
    last = len(tokens) + max_new_tokens - 1  # the last token sampled is never read
    if limit is not None and last > limit:
      raise ValueError(
        f'{f"{origins[i]}: the prompt" if origins else f"prompt {i}"} has {len(tokens)} tokens and '
        f'{max_new_tokens} new ones are asked for, but the model knows {limit} positions: shorten '
        'the prompt or lower max_new_tokens'
      )


def pad_left(rows: Sequence[Sequence[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens int32 and mask bool, both [batch_size, P]; rows that are missing stay empty."""
  P = max(SHORTEST, 1 << (max(map(len, rows)) - 1).bit_length())
  tokens = np.zeros((batch_size, P), np.int32)
  mask = np.zeros((batch_size, P), bool)
  for i, row in enumerate(rows):
    tokens[i, P - len(row) :] = row
    mask[i, P - len(row) :] = True
  return tokens, mask


def text_before(
  tokens: Sequence[int],
  text_of: Callable[[Sequence[int]], str],
  stop_ids: Collection[int],
  stop: Sequence[str],
) -> str:
  """The text of a completion, before the stop token or the first stop string."""
  text = text_of(tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens)
  return text[: stops.find(text, stop)]
