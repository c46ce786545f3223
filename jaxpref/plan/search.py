"""Meshes, remat, microbatches and row lengths tried: what fits, the fastest first.

All are estimated, which takes no compiler; then the few best are compiled and ranked by what the
compiled program says.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxpref.plan import planned, report
from jaxpref.plan.chips import GIB, Topology
from jaxpref.plan.planned import Plan

TENSOR = (1, 2, 4, 8)
REMAT = ('', 'dots', 'full', 'offload')
MICROBATCHES = (1, 2, 4, 8)
ROWS = (1, 2, 4)  # examples a row


class Found(NamedTuple):
  """`ranked` are the plans that fit, compiled ones first, best first, each with what it sets."""

  ranked: list[tuple[dict[str, Any], Plan]]
  tried: int
  refused: dict[str, int]  # why a setting cannot be -> how many
  too_large: int
  smallest: tuple[dict[str, Any], Plan] | None  # of those that do not fit, where none does

  def as_json(self) -> dict[str, Any]:
    return {
      'tried': self.tried,
      'refused': self.refused,
      'too_large': self.too_large,
      'ranked': [{'set': values, **plan.as_json()} for values, plan in self.ranked],
    }


def run(
  config: ConfigDict,
  topology: Topology,
  lengths: tuple[int, ...],
  *,
  compile_best: int = 2,
  price: float | None = None,
) -> Found:
  """Searches around `config`; `compile_best` of the estimated best are compiled."""
  fitting: list[tuple[dict[str, Any], Plan]] = []
  large: list[tuple[dict[str, Any], Plan]] = []
  refused: dict[str, int] = {}
  tried = 0
  for values in candidates(config, topology, lengths):
    tried += 1
    changed = planned.with_values(config, values)
    try:
      plan = planned.make(changed, topology, lengths, analytic=True, price=price)
    except ValueError as error:
      reason = str(error).split('=')[0].split(':')[0]
      refused[reason] = refused.get(reason, 0) + 1
      continue
    (fitting if plan.fits else large).append((values, plan))
  fitting.sort(key=_rank)
  best = []
  for values, _ in fitting[:compile_best]:
    changed = planned.with_values(config, values)
    best.append((values, planned.make(changed, topology, lengths, price=price)))
  best.sort(key=_rank)
  ranked = [one for one in best if one[1].fits] + fitting[compile_best:]
  smallest = min(large, key=lambda one: one[1].total) if large and not ranked else None
  misjudged = sum(not plan.fits for _, plan in best)
  return Found(ranked, tried, refused, len(large) + misjudged, smallest)


def candidates(
  config: ConfigDict, topology: Topology, lengths: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
  """Keys of the config and their values."""
  room = sum(lengths)
  for tensor, remat, micro, rows in itertools.product(TENSOR, REMAT, MICROBATCHES, ROWS):
    groups = topology.chips // tensor
    if topology.chips % tensor or config.batch.size % (groups * micro):
      continue
    if rows > config.batch.size // (groups * micro) or (remat == 'offload' and not topology.tpu):
      continue
    yield {
      'mesh.data': 1,
      'mesh.fsdp': -1,
      'mesh.context': 1,
      'mesh.tensor': tensor,
      'remat': remat,
      'batch.microbatches': micro,
      'batch.row_lengths': (rows * room,),
    }


def _rank(one: tuple[Mapping[str, Any], Plan]) -> tuple[float, float]:
  return one[1].seconds, one[1].total


def lines(found: Found, most: int = 10) -> Iterator[str]:
  """What was tried and what came of it."""
  axes = f'mesh.tensor {TENSOR}, remat {REMAT}, microbatches {MICROBATCHES}, examples a row {ROWS}'
  yield f'tried {found.tried} settings that divide the batch, of {axes}'
  yield f'{len(found.ranked)} fit, {found.too_large} do not'
  for reason, count in found.refused.items():
    yield f'{count} cannot be: {reason}'
  for values, plan in found.ranked[:most]:
    said = ' '.join(f'{key}={value}' for key, value in sorted(_varied(values).items()))
    yield (
      f'{plan.seconds:7.3f} s  MFU {plan.mfu:5.1%}  {plan.total / GIB:6.2f} GiB  {plan.source:<9}  '
      f'{said}'
    )
  if found.ranked and found.ranked[0][1].source == 'compiled':
    yield ''
    yield from report.lines(found.ranked[0][1])
  if found.smallest:
    yield f'nothing fits; the smallest, {_varied(found.smallest[0])}:'
    yield report.advice(found.smallest[1])


def _varied(values: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in values.items() if k not in ('mesh.data', 'mesh.fsdp', 'mesh.context')}
