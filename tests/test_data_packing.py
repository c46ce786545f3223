"""Packing: rows hold every token once in its place, and batches are a function of (seed, step)."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxpref.data import packing
from jaxpref.data.batches import Batches, Packing, stream
from tests.worlds import PairData, random_pairs


class Pair(NamedTuple):
  prompt: np.ndarray
  candidates: tuple
  scored: tuple
  extras: dict


def fill_one(example, length=12, scored=8, completion=4, **options):
  lengths = np.array([[len(example.prompt), *map(len, example.candidates)]])
  parts = packing.pieces(lengths, **options)
  rows = ((1 if options.get('share_prompts', True) else 2, length),)
  places = packing.place([p.length for p in parts], rows, alone=True)
  shape = packing.Shape(rows, scored)
  return packing.fill([example], [7], parts, places, shape, 1, len(example.candidates), completion)


def test_one_pair_drawn_as_rows():
  example = Pair(
    np.array([11, 12, 13]),
    (np.array([21, 22]), np.array([31, 32, 33])),
    (np.array([True, True]), np.array([True, False, True])),
    {},
  )
  batch = fill_one(example)
  (rows,) = batch.rows
  #                                   prompt      chosen  rejected    padding
  np.testing.assert_array_equal(rows.tokens, [[11, 12, 13, 21, 22, 31, 32, 33, 0, 0, 0, 0]])
  np.testing.assert_array_equal(rows.layout.positions, [[0, 1, 2, 3, 4, 3, 4, 5, 0, 0, 0, 0]])
  np.testing.assert_array_equal(rows.layout.examples, [[1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(rows.layout.branches, [[0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 0, 0]])
  # Scored: 21 after 13, 22 after 21, 31 after 13 (the prompt's end, not 22), 33 after 32.
  np.testing.assert_array_equal(batch.scored.at, [3, 4, 5, 7, 0, 0, 0, 0])
  np.testing.assert_array_equal(batch.scored.before, [2, 3, 2, 6, 0, 0, 0, 0])
  np.testing.assert_array_equal(batch.scored.cell, [0, 1, 4, 6, 8, 8, 8, 8])
  np.testing.assert_array_equal(batch.fields['mask'], [[[1, 1, 0, 0], [1, 0, 1, 0]]])
  np.testing.assert_array_equal(batch.fields['ids'], [7])


def test_unshared_prompts_are_laid_out_per_candidate():
  example = Pair(np.array([11, 12]), (np.array([21]), np.array([31])), (np.ones(1, bool),) * 2, {})
  batch = fill_one(example, length=4, share_prompts=False)
  (rows,) = batch.rows
  np.testing.assert_array_equal(rows.tokens, [[11, 12, 21, 0], [11, 12, 31, 0]])
  np.testing.assert_array_equal(rows.layout.branches, [[0, 0, 1, 0], [0, 0, 2, 0]])
  np.testing.assert_array_equal(batch.scored.before[:2], [1, 5])


def test_first_token_after_an_empty_prompt_is_not_scored():
  example = Pair(np.zeros(0, np.int32), (np.array([21, 22]),), (np.ones(2, bool),), {})
  batch = fill_one(example)
  np.testing.assert_array_equal(batch.fields['mask'], [[[0, 1, 0, 0]]])
  assert batch.scored.before[0] == 0 and batch.scored.at[0] == 1


@pytest.mark.parametrize('seed', range(5))
def test_place_overlaps_nothing_and_refuses_only_what_does_not_fit(seed):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 60, 40).tolist()
  rows = packing.open_rows(sizes, (16, 32, 64))
  places = packing.place(sizes, rows)
  assert places is not None
  used = {}
  for size, (kind, row, start) in zip(sizes, places, strict=True):
    assert start + size <= rows[kind][1]
    taken = used.setdefault((kind, row), set())
    assert taken.isdisjoint(range(start, start + size))
    taken.update(range(start, start + size))
  assert packing.place([65], rows) is None
  assert sum(sizes) >= 0.8 * sum(count * length for count, length in rows)


def test_too_long_for_any_row():
  with pytest.raises(ValueError, match=r'70 tokens .* longest row of 64'):
    packing.open_rows([70], (32, 64))


@pytest.mark.parametrize('options', [Packing(), Packing(share_prompts=False), Packing(alone=True)])
@pytest.mark.parametrize('cells', [(1, 1), (2, 1), (2, 2)])
def test_batches_hold_each_example_once_with_all_its_tokens(options, cells):
  data = random_pairs(50, seed=3)
  micro, groups = cells
  batches = Batches(data, 8, seed=1, microbatches=micro, groups=groups, packing=options)
  batch = batches[2]
  ids = batch.fields['ids']
  assert ids.shape == (micro, groups, 8 // (micro * groups))
  np.testing.assert_array_equal(np.sort(ids.ravel()), np.sort(batches.indices(2)))
  for m in range(micro):
    for g in range(groups):
      flat = np.concatenate([rows.tokens[m, g].ravel() for rows in batch.rows])
      cell, at = batch.scored.cell[m, g], batch.scored.at[m, g]
      grid = np.zeros(batch.fields['mask'].shape[2:], np.int32).ravel()
      real = cell < grid.size
      grid[cell[real]] = flat[at[real]]
      grid = grid.reshape(batch.fields['mask'].shape[2:])
      for b, i in enumerate(ids[m, g]):
        for k, tokens in enumerate(data[i].candidates):
          np.testing.assert_array_equal(grid[b, k, : len(tokens)], tokens)
          np.testing.assert_array_equal(
            batch.fields['mask'][m, g, b, k], np.arange(grid.shape[2]) < len(tokens)
          )


def test_order_is_a_function_of_seed_and_step():
  data = random_pairs(20, seed=0)
  first, again, other = Batches(data, 6, seed=5), Batches(data, 6, seed=5), Batches(data, 6, seed=6)
  seen = np.concatenate([first.indices(step) for step in range(10)])
  for step in (7, 0, 3):  # in any order
    np.testing.assert_array_equal(first.indices(step), again.indices(step))
    left, right = first[step], again[step]
    assert all(
      np.array_equal(a, b)
      for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )
  assert not np.array_equal(seen[:20], np.concatenate([other.indices(s) for s in range(4)])[:20])
  for epoch in range(3):  # passes follow one another without a gap
    np.testing.assert_array_equal(np.sort(seen[20 * epoch : 20 * epoch + 20]), np.arange(20))


def test_few_shapes_with_little_waste():
  data = random_pairs(600, seed=2, longest=200)
  batches = Batches(data, 32, seed=0)
  shapes = {tuple(rows.tokens.shape for rows in batches[step].rows) for step in range(40)}
  assert len(shapes) <= 5
  tokens = sum(rows.tokens.size for step in range(40) for rows in batches[step].rows)
  unique = sum(data.lengths[batches.indices(step)].sum() for step in range(40))
  assert tokens / unique < 1.25


def test_evaluation_pass_ends_with_empty_examples():
  data = random_pairs(10, seed=0)
  batches = Batches(data, 4, seed=None)
  assert len(batches) == 3
  ids = np.concatenate([batches[step].fields['ids'].ravel() for step in range(3)])
  np.testing.assert_array_equal(np.sort(ids[ids >= 0]), np.arange(10))
  assert (ids < 0).sum() == 2
  with pytest.raises(IndexError):
    batches.indices(3)


def test_stream_reads_ahead_in_order():
  batches = Batches(random_pairs(10, seed=0), 4, seed=0)
  steps = list(stream(batches, 3, 6))
  assert [step for step, _ in steps] == [3, 4, 5]
  np.testing.assert_array_equal(steps[1][1].fields['ids'], batches[4].fields['ids'])


def test_errors():
  data = random_pairs(4, seed=0)
  with pytest.raises(ValueError, match='multiple of microbatches'):
    Batches(data, 6, microbatches=4)
  with pytest.raises(ValueError, match='empty'):
    Batches(PairData([]), 2)
