"""Meshes, remat, microbatches and row lengths tried: what fits, the fastest first.

All are estimated, which takes no compiler; then the few best are compiled and ranked by what the
compiled program says.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxpref.plan import planned, report
from jaxpref.plan.chips import GIB, Topology
from jaxpref.plan.planned import Plan

DATA, CONTEXT, TENSOR = (1, 2, 4), (1, 2, 4), (1, 2, 4, 8)
APART = 8  # chips of these three axes together, at most; `fsdp` takes the others
REMAT = ('', 'dots', 'full', 'offload')
MICROBATCHES = (1, 2, 4, 8)
ROWS = (1, 2, 4)  # examples a row; of samples, completions with their prompt
# What is varied, by the name of its column.
COLUMNS: Mapping[str, tuple[str, ...]] = {
  'data x context x tensor': ('mesh.data', 'mesh.context', 'mesh.tensor'),
  'remat': ('remat',),
  'microbatches': ('batch.microbatches',),
  'row length': ('batch.row_lengths',),
}


class Found(NamedTuple):
  """`ranked` are the plans that fit, compiled ones first, best first, each with what it sets; those
  in `large` do not, again compiled ones first, then the smallest."""

  ranked: list[tuple[dict[str, Any], Plan]]
  large: list[tuple[dict[str, Any], Plan]]
  tried: int
  refused: dict[str, int]  # why a setting cannot be -> how many

  def as_json(self) -> dict[str, Any]:
    return {
      'tried': self.tried,
      'refused': self.refused,
      'too_large': len(self.large),
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
  """Searches around `config`; of the estimated best `compile_best` that fit are compiled."""
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
  best: list[tuple[dict[str, Any], Plan]] = []
  factors: dict[str, float] = {}  # by remat, of what a step needs on top of its state

  def known(one: tuple[dict[str, Any], Plan]) -> tuple[dict[str, Any], Plan]:
    values, plan = one
    return values, _grown(plan, factors.get(values['remat'], 1.0))

  # Estimates err. What the compiler finds of one setting holds for its likes; up to a limit.
  while len(best) < 3 * compile_best and sum(plan.fits for _, plan in best) < compile_best:
    left = [one for one in fitting if known(one)[1].fits]
    if not left:
      break
    values, guess = left[0]
    fitting.remove(left[0])
    plan = planned.make(planned.with_values(config, values), topology, lengths, price=price)
    best.append((values, plan))
    found = _work(plan) / _work(guess)
    factors[values['remat']] = max(found, factors.get(values['remat'], 1.0))
  best.sort(key=_rank)
  both = [*best, *map(known, fitting)]
  ranked = [one for one in both if one[1].fits]
  large += [one for one in both if not one[1].fits]
  large.sort(key=lambda one: (one[1].source == 'estimated', one[1].total))
  return Found(ranked, large, tried, refused)


def _work(plan: Plan) -> float:
  return sum(size for name, size in plan.memory.items() if name not in planned.HELD)


def _grown(plan: Plan, factor: float) -> Plan:
  """The plan, with so many times the memory on top of the state."""
  sizes = plan.memory.items()
  memory = {name: size * (1 if name in planned.HELD else factor) for name, size in sizes}
  return dataclasses.replace(plan, memory=memory)


def candidates(
  config: ConfigDict, topology: Topology, lengths: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
  """Keys of the config and their values."""
  prompt, new = 0, sum(lengths)
  size, most = config.batch.size, config.batch.size
  if config.rewards:
    c = config.rollout
    prompt, new = lengths[0], c.max_new_tokens
    size, most = c.prompts // c.minibatches, c.prompts * c.samples
  settings = itertools.product(DATA, CONTEXT, TENSOR, REMAT, MICROBATCHES, ROWS)
  for data, context, tensor, remat, micro, rows in settings:
    apart = data * context * tensor
    groups = topology.chips * config.mesh.slices // (context * tensor)
    if apart > APART or topology.chips % apart or size % (groups * micro):
      continue
    if rows > most // (groups * micro) or (remat == 'offload' and not topology.tpu):
      continue
    yield {
      'mesh.data': data,
      'mesh.fsdp': -1,
      'mesh.context': context,
      'mesh.tensor': tensor,
      'remat': remat,
      'batch.microbatches': micro,
      'batch.row_lengths': (prompt + rows * new,),
    }


def _rank(one: tuple[Mapping[str, Any], Plan]) -> tuple[float, ...]:
  """Of settings that are as fast, those that read weights and move activations less often."""
  values, plan = one
  apart = values['mesh.context'] * values['mesh.tensor'] * values['mesh.data']
  return plan.seconds, values['batch.microbatches'], apart, plan.total


def lines(found: Found, most: int = 10) -> Iterator[str]:
  """What was tried and what came of it."""
  yield f'tried {found.tried} settings that divide the batch, of'
  yield f'  data {DATA}, context {CONTEXT}, tensor {TENSOR}, {APART} at most, and fsdp the rest;'
  yield f'  remat {REMAT}, microbatches {MICROBATCHES}, examples a row {ROWS}'
  yield f'{len(found.ranked)} fit, {len(found.large)} do not; estimates know no memory traffic'
  for reason, count in found.refused.items():
    yield f'{count} cannot be: {reason}'
  if found.ranked:
    yield ''
    yield _row('at least', 'MFU at most', 'GiB a chip', 'how', COLUMNS)
  for values, plan in found.ranked[:most]:
    yield _row(
      f'{plan.seconds:.3f} s',
      f'{plan.mfu:.1%}',
      f'{plan.total / GIB:.2f}',
      plan.source,
      _cells(values),
    )
  if len(found.ranked) > most:
    yield f'and {len(found.ranked) - most} more'
  if found.large:
    yield ''
    yield _row('too large', '', 'GiB a chip', 'how', COLUMNS)
  for values, plan in found.large[: most // 2]:
    most_of, size = max(plan.memory.items(), key=lambda part: part[1])
    row = _row('', '', f'{plan.total / GIB:.2f}', plan.source, _cells(values))
    yield f'{row}   of {plan.capacity / GIB:.2f}; {most_of} {size / GIB:.2f}'
  if found.ranked and found.ranked[0][1].source == 'compiled':
    yield ''
    yield from report.lines(found.ranked[0][1])
  if found.large and not found.ranked:
    yield f'nothing fits; the smallest is {report.advice(found.large[0][1])}'


def _cells(values: Mapping[str, Any]) -> list[str]:
  """What a setting has in each of `COLUMNS`."""
  first = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
  return [
    ' x '.join(str(first(values[key]) or 'none') for key in keys) for keys in COLUMNS.values()
  ]


def _row(time: str, mfu: str, size: str, how: str, cells: Iterable[str]) -> str:
  columns = (f'{cell:>{max(len(name), 7)}}' for name, cell in zip(COLUMNS, cells, strict=True))
  return f'{time:>9}  {mfu:>11}  {size:>10}  {how:<9}  {"  ".join(columns)}'
