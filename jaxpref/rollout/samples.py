"""One round of sampling and scoring: prompts by index -> tokens, scores and what to log of them."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpref import hosts, rewards, sharding
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.decoding import sample_groups
from jaxpref.generation import check_lengths, decode_after, text_before
from jaxpref.models import Model
from jaxpref.rewards import Sample
from jaxpref.rollout.prompts import Prompts
from jaxpref.sampling import PLAIN, Samples, Sampling
from jaxpref.typing import Array, Params

WIDTHS = 16  # prompts are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How a policy's prompts are completed: `sampler(params, indices, keys)`.

  Attributes:
    model: the policy.
    prompts: what the indices mean.
    num_samples: K, completions of each prompt.
    max_new_tokens: T.
    slots: completions that are sampled side by side; 0: all.
    sampling: temperature and filters.
    stop_ids: tokens that end a completion.
    stops: the automaton of strings that do, `stops.automaton`'s.
    seed: of the random keys.
    mesh: what samples; None: the one that is set.
  """

  model: Model
  prompts: Prompts
  num_samples: int
  max_new_tokens: int
  slots: int = 0
  sampling: Sampling = PLAIN
  stop_ids: tuple[int, ...] = ()
  stops: np.ndarray | None = None
  seed: int = 0
  mesh: jax.sharding.Mesh | None = None

  def __post_init__(self):
    prompts = self.prompts
    check_lengths(self.model, prompts.tokens, self.max_new_tokens, prompts.origins)

  @functools.cached_property
  def width(self) -> int:
    """P: one width for all prompts, so that one program samples them."""
    return -(-self.prompts.longest // WIDTHS) * WIDTHS

  def __call__(self, params: Params, indices: Sequence[int], keys: np.ndarray) -> Samples:
    """Starts sampling [B, K, T]; the arrays are ready when the devices are done.

    Args:
      params: the policy's.
      indices: [B] of prompts.
      keys: int32 [B], all different in a run: with the seed, the sample and the token they make the
        random keys.
    """
    tokens = np.zeros((len(indices), self.width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, i in enumerate(indices):
      prompt = self.prompts.tokens[i]
      tokens[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
    mesh = self.mesh or jax.sharding.get_mesh()
    arrays: Any = (tokens, mask, keys)
    if not mesh.empty:
      arrays = hosts.place(arrays, jax.sharding.NamedSharding(mesh, jax.P(sharding.GROUPS)))
    with jax.set_mesh(mesh) if not mesh.empty else contextlib.nullcontext():
      return self.sample(params, *arrays)

  def cache_bytes(self, prompts: int) -> int:
    """Of keys and values of `prompts` prompts and their completions, all devices together."""
    jobs = prompts * self.num_samples
    slots = self.slots or jobs
    read = prompts if slots == jobs else slots + 1  # a copy for each slot, and that read last
    sizes = ((read, self.width), (slots, self.max_new_tokens))
    caches = jax.eval_shape(lambda: [self.model.init_cache(*size) for size in sizes])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))

  def sample(self, params: Params, tokens: Array, mask: Array, ids: Array) -> Samples:
    """Completions of prompts [B, P] that lie where they shall be."""
    return sample_groups(
      self.model,
      params,
      tokens,
      mask,
      num_samples=self.num_samples,
      slots=self.slots or None,
      seed=self.seed,
      ids=ids,
      max_new_tokens=self.max_new_tokens,
      sampling=self.sampling,
      stop_ids=self.stop_ids,
      stops=self.stops,
    )


class Scored(NamedTuple):
  """Scores of B x K samples; `texts` and `failures` are for people."""

  rewards: np.ndarray  # float32 [B, K, J]; NaN where one does not apply or failed
  scores: np.ndarray  # float32 [B, K], the weighted sum; 0 where not valid
  valid: np.ndarray  # bool [B, K]
  texts: list[list[str]]
  failures: tuple[str, ...]
  metrics: dict[str, float]


def differ(scored: Scored, axis: int | None = 1) -> np.ndarray:
  """Which groups hold valid samples of different scores, bool [B]; axis None: whether any do."""
  low = np.where(scored.valid, scored.scores, np.inf).min(axis)
  return np.where(scored.valid, scored.scores, -np.inf).max(axis) > low


def chosen(parts: Sequence[Scored], rows: np.ndarray) -> Scored:
  """Some groups of several rounds' scores; metrics are of all that was sampled."""
  texts = [group for part in parts for group in part.texts]
  metrics = {
    name: float(np.mean([part.metrics[name] for part in parts if name in part.metrics]))
    for name in parts[0].metrics
  }
  return Scored(
    np.concatenate([part.rewards for part in parts])[rows],
    np.concatenate([part.scores for part in parts])[rows],
    np.concatenate([part.valid for part in parts])[rows],
    [texts[row] for row in rows.tolist()],
    tuple(failure for part in parts for failure in part.failures),
    metrics,
  )


@dataclasses.dataclass(frozen=True)
class Scorer:
  """How samples are scored: `scorer(prompts, indices, samples)`.

  Attributes:
    terms: the rewards, as `rewards.parse` gives them.
    tokenizer: turns samples into text.
    timeout: seconds that a reward may take for all samples.
    missing_eos: taken off the score of a sample that the length limit cut off.
    stop: strings that end a completion; rewards see the text before them.
  """

  terms: Sequence[rewards.Term]
  tokenizer: Tokenizer
  timeout: float = 60.0
  missing_eos: float = 0.0
  stop: Sequence[str] = ()

  def __call__(self, prompts: Prompts, indices: Sequence[int], samples: Samples) -> Scored:
    tokens, mask, finished = map(np.asarray, (samples.tokens, samples.mask, samples.finished))
    texts = [
      [self.text(prompts.tokens[i], row[kept]) for row, kept in zip(rows, kepts, strict=True)]
      for i, rows, kepts in zip(indices, tokens, mask, strict=True)
    ]
    asked = [
      Sample(prompts.texts[i], text, prompts.records[i], int(kept.sum()), bool(ended))
      for i, *group in zip(indices, texts, mask, finished, strict=True)
      for text, kept, ended in zip(*group, strict=True)
    ]
    found = _evaluate(self.terms, asked, self.timeout)
    shape = finished.shape
    scores = np.where(found.valid, found.combined, 0).astype(np.float32).reshape(shape)
    scores -= self.missing_eos * ~finished
    return Scored(
      found.values.reshape(*shape, -1),
      scores,
      found.valid.reshape(shape) & mask.any(-1),
      texts,
      tuple(map(str, found.failures)),
      found.metrics() | against_gold(found, shape) | _lengths(mask, finished),
    )

  def text(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """A completion's text, without the token or the string that ended it."""
    text_of = functools.partial(decode_after, self.tokenizer, int(prompt[-1]))
    return text_before(tokens.tolist(), text_of, self.tokenizer.stop_ids, self.stop)


def _evaluate(
  terms: Sequence[rewards.Term], asked: Sequence[Sample], timeout: float
) -> rewards.Scores:
  """What process 0's rewards say: they may cost money, or answer differently each time.

  The others run only those that live on all processes' devices.
  """
  if jax.process_count() == 1:
    return rewards.evaluate(terms, asked, timeout=timeout)
  first = jax.process_index() == 0
  everywhere = [dataclasses.replace(term, weight=1.0) for term in terms if term.traits.untimed]
  mine = terms if first else everywhere

  def call() -> rewards.Scores | None:
    return rewards.evaluate(mine, asked, timeout=timeout) if mine else None

  found = call() if everywhere else hosts.together(call)
  n, agreed = len(asked), hosts.from_first
  if not first or found is None:
    values, combined = np.zeros((n, len(terms)), np.float32), np.zeros(n, np.float32)
    found = rewards.Scores((), combined, values, combined, np.zeros(n, bool), ())
  return rewards.Scores(
    tuple(term.name for term in terms),
    np.array([term.weight for term in terms], np.float32),
    agreed(found.values),
    agreed(found.combined),
    agreed(found.valid),
    found.failures,
  )


def against_gold(found: rewards.Scores, shape: tuple[int, ...]) -> dict[str, float]:
  """What is learnt from, compared with rewards of weight 0, such as a gold one; of [B, K] samples.

  Returns:
    rewards/<name>/gap: mean of the score less that reward, where both are known; as the policy
      learns to exploit the score it grows.
    rewards/<name>/agreement: of the pairs of a prompt's samples that both tell apart, the share
      that both order alike; it falls, to 0.5 where the score says nothing of gold.

  See "Scaling Laws for Reward Model Overoptimization", Gao et al.:
  https://arxiv.org/abs/2210.10760.
  """
  result = {}
  scores = np.where(found.valid, found.combined, np.nan).astype(np.float64).reshape(shape)
  for j in np.flatnonzero(found.weights == 0).tolist():
    gold = found.values[:, j].astype(np.float64).reshape(shape)
    away = scores - gold
    if (known := ~np.isnan(away)).any():
      result[f'rewards/{found.names[j]}/gap'] = float(away[known].mean())
    ours, theirs = (np.sign(x[:, :, None] - x[:, None, :]) for x in (scores, gold))
    alike = ours * theirs
    if (apart := np.abs(alike) == 1).any():
      result[f'rewards/{found.names[j]}/agreement'] = float((alike[apart] > 0).mean())
  return result


def _lengths(mask: np.ndarray, finished: np.ndarray) -> dict[str, float]:
  """Of the completions, in tokens."""
  lengths = mask.sum(-1)
  return {
    'completions/mean_length': float(lengths.mean()),
    'completions/min_length': float(lengths.min()),
    'completions/max_length': float(lengths.max()),
    'completions/clipped_ratio': float(np.mean(~finished)),
  }
