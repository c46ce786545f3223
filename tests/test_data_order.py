"""How examples come to batches: passes whole, batches equally full, shapes that hold them tight."""

import itertools

import numpy as np
import pytest

from jaxpref.data.batches import Batches, divisions
from jaxpref.data.order import WINDOW, Order, deal
from jaxpref.data.packing import place, shape_for
from tests.worlds import random_pairs


def drawn(count, seed=0):
  return np.random.default_rng(seed).lognormal([4, 3, 3], 0.8, (count, 3)).astype(int) + 1


@pytest.mark.parametrize(('count', 'size'), [(1000, 8), (100, 16), (7, 3), (3, 5)])
def test_every_pass_holds_every_example_once(count, size):
  """Windows are whole: those that count passes fill exactly hold every example equally often."""
  order = Order(drawn(count), size, seed=1)
  batches = [order[step] for step in range(WINDOW * count // np.gcd(WINDOW * size, count))]
  assert all(len(batch) == size for batch in batches)
  seen = np.concatenate(batches)
  assert len(seen) % count == 0
  np.testing.assert_array_equal(np.bincount(seen), np.full(count, len(seen) // count))
  if count > WINDOW * size:  # no batch of the first window has begun the second pass
    assert np.bincount(seen[: WINDOW * size]).max() == 1


def test_batches_of_a_window_are_equally_full():
  """Of tokens and of completions both, each as a share of its mean."""
  lengths = drawn(WINDOW * 16)
  order = Order(lengths, 16, seed=3)
  tokens = np.stack([lengths.sum(1), lengths[:, 1:].sum(1)], axis=1)
  tokens = tokens / tokens.mean(0)
  dealt = np.stack([tokens[order[step]].sum(0) for step in range(WINDOW)])
  random = tokens.reshape(WINDOW, 16, 2).sum(1)
  assert dealt.sum(1).std() < random.sum(1).std() / 10
  assert (dealt.std(0) < random.std(0) * 0.75).all()


def test_deal_fills_what_room_there_is():
  room = np.array([4, 0, 1, 3])
  np.testing.assert_array_equal(np.bincount(deal(drawn(8), room), minlength=4), room)


def test_divisions_are_the_cheapest_of_all():
  sizes = np.sort(np.random.default_rng(0).integers(1, 50, 9))
  for most in (1, 2, 3):
    parts = divisions(sizes, most)
    assert [i for part in parts for i in range(*part.indices(9))] == list(range(9))
    ways = itertools.combinations(range(1, 9), most - 1)
    costs = (
      sum((b - a) * sizes[b - 1] for a, b in itertools.pairwise((0, *way, 9))) for way in ways
    )
    assert sum((p.stop - p.start) * sizes[p.stop - 1] for p in parts) == min(costs)


def test_a_shape_holds_its_cells_and_no_row_is_to_spare():
  cells = [drawn(20, seed).sum(1).clip(max=500).tolist() for seed in range(5)]
  shape = shape_for(cells, 100, (128, 256, 512))
  assert all(place(cell, shape.rows) is not None for cell in cells)
  for i, (count, length) in enumerate(shape.rows):
    fewer = [*shape.rows[:i], (count - 1, length), *shape.rows[i + 1 :]]
    assert any(place(cell, fewer) is None for cell in cells)


@pytest.mark.parametrize(('size', 'most'), [(64, 1.06), (16, 1.15)])
def test_waste_on_lengths_as_chats_have_them(size, most):
  """Prompts of some 150 tokens and completions of 60, log-normal, as HH-RLHF's."""
  data = random_pairs(1600, seed=4, longest=4)
  rng = np.random.default_rng(5)
  lengths = np.stack([rng.lognormal(m, 0.75, 1600) for m in (4.6, 3.6, 3.6)], 1).astype(int) + 2
  data.lengths = lengths.clip(max=[300, 200, 200])
  batches = Batches(data, size, seed=0)
  shapes = [batches.shape_of(step) for step in range(100)]
  unique = sum(data.lengths[batches.indices(step)].sum() for step in range(100))
  assert sum(shape.tokens for shape in shapes) < most * unique
  assert len(set(shapes)) <= 4
