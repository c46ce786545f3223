"""Which examples a batch holds: shuffled passes, dealt so that batches are equally full."""

import numpy as np

WINDOW = 64  # batches among which examples are dealt


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
  """The order of `count` examples in a pass: a permutation from (seed, epoch) alone."""
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def deal(lengths: np.ndarray, room: np.ndarray) -> np.ndarray:
  """To which batch each example goes: int [n].

  Longest first, each to the batch that is least full for its share of the examples: of all tokens
  and of completions' alike, for both take up slots.

  Args:
    lengths: int [n, 1+K], prompt, then candidates.
    room: int [batches], examples that each takes; they sum to n.
  """
  tokens = np.stack([lengths.sum(1), lengths[:, 1:].sum(1)], axis=1)
  weight = (tokens / np.maximum(tokens.mean(0), 1)).sum(1)
  load, left = np.zeros(len(room)), room.astype(np.int64)
  hands = np.zeros(len(lengths), np.int64)
  for i in np.argsort(-weight, kind='stable'):
    fullness = np.where(left > 0, load / np.maximum(room, 1), np.inf)
    b = int(np.argmin(fullness))
    hands[i], load[b], left[b] = b, load[b] + weight[i], left[b] - 1
  return hands


class Order:
  """Batches of `size` of shuffled passes over examples with these lengths, int [n, 1+K].

  A pass ends inside a batch, not before it. Within each window of `WINDOW` batches the examples of
  a pass are dealt, so batches are a function of (seed, step, lengths).
  """

  def __init__(self, lengths: np.ndarray, size: int, seed: int):
    self.lengths, self.size, self.seed = lengths, size, seed
    self._windows: dict[int, list[np.ndarray]] = {}

  def __getitem__(self, step: int) -> np.ndarray:
    window = step // WINDOW
    found = self._windows.get(window)  # threads read ahead: what is found here may be cleared there
    if found is None:
      if len(self._windows) > 2:
        self._windows.clear()
      found = self._windows[window] = self._deal(window)
    return found[step % WINDOW]

  def _deal(self, window: int) -> list[np.ndarray]:
    n, start = len(self.lengths), window * WINDOW * self.size
    at, stop = start, start + WINDOW * self.size
    found: list[list[np.ndarray]] = [[] for _ in range(WINDOW)]
    while at < stop:  # one pass after another: an example that ends one may begin the next
      end = min(stop, (at // n + 1) * n)
      own = shuffled(n, self.seed, at // n)[at % n : at % n + end - at]
      room = np.bincount((np.arange(at, end) - start) // self.size, minlength=WINDOW)
      hands = deal(self.lengths[own], room)
      for b in np.flatnonzero(room):
        found[b].append(own[hands == b])
      at = end
    return [np.concatenate(parts) for parts in found]
