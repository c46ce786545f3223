"""Lengths of a data set's examples: histogram, quantiles, and how well they pack."""

import dataclasses

import numpy as np
from rich.table import Table

from jaxpref.data.dataset import Dataset
from jaxpref.data.packing import auto_row_lengths, open_rows, pieces

QUANTILES = {'min': 0.0, '50 %': 0.5, '90 %': 0.9, '99 %': 0.99, 'max': 1.0}
_CHUNK, _SAMPLE = 64, 4096  # examples packed together; examples looked at


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens of whole examples, a prompt counted once; `bins` holds (low, high, examples)."""

  total: int
  quantiles: dict[str, int]
  bins: tuple[tuple[int, int, int], ...]
  packed: float  # share of the places in packed rows that hold a token
  padded: float  # the same where every candidate has a row of its own, with its prompt


def measure(dataset: Dataset) -> Lengths:
  """The lengths of a data set that holds at least one example."""
  lengths = dataset.lengths.sum(1, dtype=np.int64)
  values = {name: int(np.quantile(lengths, q)) for name, q in QUANTILES.items()}
  edges = [0, 16]
  while edges[-1] <= values['max']:
    edges.append(2 * edges[-1])
  counts, _ = np.histogram(lengths, edges)
  bins = zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
  kept = tuple((low, high - 1, count) for low, high, count in bins if count)
  packed, padded = _efficiency(dataset.lengths)
  return Lengths(int(lengths.sum()), values, kept, packed, padded)


def _efficiency(lengths: np.ndarray) -> tuple[float, float]:
  row_lengths = auto_row_lengths(int(lengths.sum(1).max()))
  tokens = packed = padded = 0
  for start in range(0, min(len(lengths), _SAMPLE), _CHUNK):
    some = lengths[start : start + _CHUNK]
    tokens += int(some.sum())
    sizes = [piece.length for piece in pieces(some)] or some.sum(1).tolist()
    packed += sum(count * length for count, length in open_rows(sizes, row_lengths))
    alone = (some[:, :1] + some[:, 1:])[some[:, 1:] > 0] if some.shape[1] > 1 else some
    padded += int(alone.size * alone.max())
  return tokens / packed, tokens / padded


def histogram(lengths: Lengths) -> Table:
  """The bins as bars, with how well the examples pack."""
  table = Table(
    title=f'tokens per example\n{lengths.packed:.0%} of packed rows are tokens, '
    f'{lengths.padded:.0%} of padded ones'
  )
  table.add_column('tokens', justify='right')
  table.add_column('examples', justify='right')
  table.add_column('')
  most = max(count for _, _, count in lengths.bins)
  for low, high, count in lengths.bins:
    table.add_row(f'{low}-{high}', f'{count:,}', '█' * max(1, round(40 * count / most)))
  return table
