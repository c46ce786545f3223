"""Reward models as rewards: text in, the score of the completion's last token or of its steps out.

A reward model reads text with its own tokenizer, laid out as in its training, so it may be of
another family than the policy. Where both have one tokenizer these are the tokens that were
sampled, unless the policy chose another split of the same text.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import hosts, sharding
from jaxpref.data.conversations import Text
from jaxpref.data.examples import make_example
from jaxpref.data.records import Record as Source
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import Model
from jaxpref.rewards import Record, Score
from jaxpref.rewards.base import each
from jaxpref.rollout.steps import Steps
from jaxpref.typing import Array, Layout, Params

AT_ONCE = 2**14  # tokens, padding included, that meet the model in one call
SHORTEST = 32  # rows are padded to a power of two of at least this


@dataclass(frozen=True, eq=False, repr=False)
class RewardModel:
  """A reward: (score - mean) · scale, or with steps what they make of σ(score) at each one's end.

  A model with several heads gives a tuple of such rewards, which an ensemble makes one of:
  minimum(reward_model('runs/rm')).

  The prompt is the record's 'prompt' where that holds messages, which go through the tokenizer's
  chat template, and else the text. A completion that the length limit cut off is read without an
  end-of-sequence token. One that is too long for the model has an error in place of its score.

  Attributes:
    model, params: with one score or more; the parameters lie on `mesh`.
    tokenizer: the model's own.
    mesh: whose groups share the rows.
    mean, scale: of the normalisation, numbers or arrays [heads].
    steps: of a process reward model; None: the last token's score is the reward.
    text: what it is called in text.
  """

  model: Model
  params: Params
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  mean: float | np.ndarray = 0.0
  scale: float | np.ndarray = 1.0
  steps: Steps | None = None
  text: str = 'reward_model()'

  # Compiling takes as long as it takes, and what runs on a mesh cannot be left half-way.
  untimed: ClassVar[bool] = True

  def __post_init__(self):
    config = self.model.config
    if not config.num_labels:
      raise ValueError(f'{self.text}: the model has a language-model head and no scores')
    if self.tokenizer.vocab_size > config.vocab_size:
      raise ValueError(
        f'{self.text}: its tokenizer has {self.tokenizer.vocab_size} tokens, the model only '
        f'{config.vocab_size}'
      )

  @property
  def __name__(self) -> str:
    return self.text.partition('(')[0]

  def __repr__(self) -> str:
    return self.text

  @property
  def heads(self) -> int:
    return self.model.config.num_labels

  @property
  def nbytes(self) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.params))

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Record]
  ) -> list[Score]:
    read: list[Any] = each(self.read, prompts, completions, records)
    order = [i for i, found in enumerate(read) if not isinstance(found, Exception)]
    order.sort(key=lambda i: len(read[i][0]))
    at = len(order)
    while at:  # the longest first, as many as fit beside them
      length = max(SHORTEST, _power(len(read[order[at - 1]][0])))
      rows = max(1, AT_ONCE // length)
      part = order[max(0, at - rows) : at]
      for i, scores in zip(part, self._scores([read[i] for i in part], length), strict=True):
        reward = self._reward(scores).tolist()
        read[i] = tuple(reward) if self.heads > 1 else reward[0]
      at -= len(part)
    return read

  def _reward(self, scores: np.ndarray) -> np.ndarray:
    """Scores [ends, heads] -> [heads]."""
    if self.steps is None:
      return (scores[0] - self.mean) * self.scale
    return self.steps.reduce(np.exp(-np.logaddexp(0, -scores)))

  def read(self, prompt: str, completion: str, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The prompt's and the completion's tokens, int32, and those whose scores are read, by index.

    The last token is one of these.

    Raises:
      ValueError: the model knows fewer positions, the tokenizer cannot lay messages out, or there
        is no step.
    """
    said = record.get('prompt')
    steps: tuple[tuple[int, float], ...] = ()
    if self.steps is not None:
      completion, found = self.steps.divide(completion)
      steps = tuple((end, 0.0) for end in found)
    if isinstance(said, list):
      answer: Text = [{'role': 'assistant', 'content': completion}]
      source = Source(said, (answer,), {}, steps, tools=record.get('tools') or None)
    else:
      source = Source(prompt, (completion,), {}, steps)
    example = make_example(source, self.tokenizer, Counter())
    tokens, scored = example.candidates[0], np.flatnonzero(example.scored[0])
    if not record.get('finished', True) and tokens[scored[-1]] in self.tokenizer.stop_ids:
      scored = scored[:-1] if len(scored) > 1 else scored
    ends = np.flatnonzero(example.extras['step_ends'][0]) if steps else scored[-1:]
    tokens = np.concatenate([example.prompt, tokens[: ends[-1] + 1]])
    limit = self.model.config.position_limit
    if limit is not None and len(tokens) > limit:
      raise ValueError(
        f'prompt and completion are {len(tokens)} tokens, {self.text} knows {limit} positions'
      )
    return tokens, ends + len(example.prompt)

  def _scores(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> list[np.ndarray]:
    """Of each row's tokens and ends [n] the scores there, float64 [n, heads]."""
    groups = sharding.groups(self.mesh)
    count = groups * _power(-(-len(rows) // groups))
    most = _power(max(len(places) for _, places in rows))
    tokens, ends = np.zeros((count, length), np.int32), np.zeros((count, most), np.int32)
    for i, (row, places) in enumerate(rows):
      tokens[i, : len(row)] = row
      ends[i] = len(row) - 1
      ends[i, : len(places)] = places
    over_groups = jax.sharding.NamedSharding(self.mesh, jax.P(sharding.GROUPS))
    with jax.set_mesh(self.mesh):  # the thread may be another one than the mesh was set on
      placed = hosts.place(
        (tokens.reshape(groups, -1, length), ends.reshape(groups, -1, most)), over_groups
      )
      found = _scores_at(self.model, self.params, *placed)
    scores = np.asarray(hosts.whole(found), np.float64).reshape(-1, most, self.heads)
    return [scores[i, : len(places)] for i, (_, places) in enumerate(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _scores_at(model: Model, params: Params, tokens: Array, ends: Array) -> Array:
  """Scores float32 [G, R, E, heads] of tokens [G, R, L] at `ends` [G, R, E], the last included."""
  places = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
  real = (places <= ends.max(axis=-1, keepdims=True)).astype(jnp.int32)
  states = model.hidden(params, tokens, Layout(places, real, jnp.zeros_like(real)))
  return model.scores(params, jnp.take_along_axis(states, ends[..., None], axis=2))


def _power(n: int) -> int:
  """The least power of two that is not below n >= 1."""
  return 1 << (n - 1).bit_length()
