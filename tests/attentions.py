"""Packed rows with random queries, keys and values, and attention as its definition has it."""

import jax.numpy as jnp
import numpy as np

from jaxpref.models.attention import attend, visible, within
from jaxpref.models.blocked import Form
from jaxpref.typing import Layout

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def rows(rng, count: int, length: int, longest: int = 40) -> Layout:
  """Rows of examples of random sizes, each a prompt and two branches; padding at the end."""
  layout = np.zeros((3, count, length), np.int32)
  for row in range(count):
    at, example = 0, 1
    while at < length - 12:
      prompt, *branches = rng.integers(3, longest, 3)
      sizes = np.minimum(np.cumsum([prompt, *branches]), length - 4 - at)
      where = at + np.arange(sizes[-1])
      branch = np.searchsorted(sizes[:-1], np.arange(sizes[-1]), side='right')
      starts = np.array([0, sizes[0], sizes[1]])[branch]
      positions = np.arange(sizes[-1]) - starts + np.where(branch > 0, sizes[0], 0)
      layout[0, row, where], layout[1, row, where], layout[2, row, where] = (
        positions,
        example,
        branch,
      )
      at, example = at + int(sizes[-1]), example + 1
  return Layout(*map(jnp.asarray, layout))


def drawn(seed: int, length: int, count: int = 2, longest: int = 40):
  rng = np.random.default_rng(seed)
  shapes = [(count, heads, length, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
  arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
  return arrays, rows(rng, count, length, longest)


def dense(form: Form, q, k, v, layout, window):
  mask = visible(layout, layout)
  if window is not None:
    mask = mask & within(layout, layout, window)
  return attend(q, k, v, mask, scalar=form.scalar, limit=form.limit)
