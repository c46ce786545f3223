"""A batch that stands for a run's, made of lengths alone by the code that makes the real ones."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpref.data.batches import Batches, Packing
from jaxpref.data.examples import Example
from jaxpref.log_probs import KNOWN
from jaxpref.objectives import Objective
from jaxpref.typing import Batch

# Fields that data bring, by the number of the axes B, K, T they have.
SUPPLIED = {
  'label': 1, 'preference': 1, 'margin': 1, 'mismatched': 1, 'scores': 2,
  'step_ends': 3, 'step_labels': 3,
}  # fmt: skip


class Lengths:
  """Examples that all have a prompt and candidates of the same lengths; the tokens are 1."""

  def __init__(self, tokens: tuple[int, ...], count: int, extras: Mapping[str, int]):
    prompt, *candidates = tokens
    self.lengths = np.tile(np.array(tokens, np.int64), (count, 1))
    shapes = {1: lambda: 1.0, 2: lambda: np.ones(len(candidates), np.float32)}
    made: dict[str, Any] = {
      name: tuple(np.ones(n, np.float32) for n in candidates) if rank == 3 else shapes[rank]()
      for name, rank in extras.items()
    }
    ones = lambda n, kind: np.ones(n, kind)  # noqa: E731
    self._example = Example(
      ones(prompt, np.int32),
      tuple(ones(n, np.int32) for n in candidates),
      tuple(ones(n, bool) for n in candidates),
      made,
    )

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> Example:
    return self._example


class _Zeros:
  """A table of reference log-probs."""

  def __init__(self, tokens: tuple[int, ...]):
    self._row = tuple(np.zeros(n, np.float32) for n in tokens[1:])

  def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
    return self._row


def parse_lengths(text: str) -> tuple[int, ...]:
  """(512, 512, 512) of '512,512,512': tokens of a prompt, then of its candidates."""
  parts = text.split(',')
  if len(parts) < 2 or not all(part.strip().isdigit() and int(part) for part in parts):
    raise ValueError(
      f'--lengths={text}: expected the tokens of a prompt and of its completions, as 512,512,512'
    )
  return tuple(map(int, parts))


def make(
  config: ConfigDict, objective: Objective, tokens: tuple[int, ...], groups: int, *, live: bool
) -> Batch:
  """The host batch of one step of `config`.

  Args:
    tokens: of an example's prompt, then of its candidates.
    groups: G, the data groups of the mesh.
    live: the step computes the reference's log-probs itself.

  Raises:
    ValueError: a field that nobody supplies, or sizes that do not divide.
  """
  known = {*KNOWN, 'ref_logps', 'mask', 'ids', *SUPPLIED}
  if unknown := sorted(objective.fields - known):
    raise ValueError(
      f'{objective} reads {unknown}, which no data bring: if they come with samples, say in '
      'config.rewards what scores these'
    )
  extras = {name: SUPPLIED[name] for name in objective.fields if name in SUPPLIED}
  data = Lengths(tokens, config.batch.size, extras)
  tables = {} if live or 'ref_logps' not in objective.fields else {'ref_logps': _Zeros(tokens)}
  packing = Packing(row_lengths=tuple(config.batch.row_lengths))
  return Batches(data, config.batch.size, None, config.batch.microbatches, groups, packing, tables)[
    0
  ]


def abstract(batch: Batch, sharding: jax.sharding.Sharding) -> Batch:
  """Its shapes, where a step gets them."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
    ),
    batch,
  )
