"""Shared types and the axis letters, defined once.

  B prompts (examples)        M microbatches          V vocabulary
  K candidates, best first    G data groups (shards)  D model width
  T completion tokens         R packed rows           H heads
  N scored tokens             L row length            S tokens of a group, all rows flat

Arrays are `jax.Array` on device and `numpy.ndarray` on the host; docstrings give their shapes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

Array = jax.Array
AnyArray = Any  # jax.Array on device, numpy.ndarray on the host
Params = Any  # a nested dict of arrays
Fields = Mapping[str, Any]  # name -> array [B, K, T], [B, K] or [B]


class Layout(NamedTuple):
  """Where every token of some packed rows stands; int32 arrays of the tokens' shape [..., L].

  A token attends to earlier tokens of its own example that are prompt or its own branch.
  """

  positions: AnyArray  # within the example; every branch goes on from the prompt's end
  examples: AnyArray  # 1, 2, ... in order of packing; 0 is padding
  branches: AnyArray  # 0 prompt, 1..K candidate


class Rows(NamedTuple):
  """Packed rows of one length: `tokens` and `layout`, int32 [M, G, R, L]."""

  tokens: AnyArray
  layout: Layout


class Scored(NamedTuple):
  """The scored tokens of each group, int32 [M, G, N], over the group's rows laid end to end [S].

  Unused entries point at token 0 and have `cell` = B*K*T (out of range, dropped when scattered).
  """

  before: AnyArray  # index in [S] of the state that predicts the token
  at: AnyArray  # index in [S] of the token itself
  cell: AnyArray  # flat index in [B, K, T] that the token's fields are scattered to


class Batch(NamedTuple):
  """One optimizer step's data.

  `fields` holds what objectives may name: always `mask` bool [M, G, B, K, T] (True on scored
  tokens) and `ids` int32 [M, G, B] (the example's index in its data set, -1 where empty), and what
  the data supplies, such as `ref_logps` float32 [M, G, B, K, T].
  """

  rows: tuple[Rows, ...]
  scored: Scored
  fields: dict[str, Any]
