"""Series of runs of our side alone: more work of a kind, its cost beside its arithmetic."""

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpref import models
from tools.bench.pairs import Pair
from tools.bench.shapes import Shape
from tools.bench.table import grid

PROMPTS = (1, 2, 4, 8)  # of the decoding series: so many prompts at once


class Variant(NamedTuple):
  """A preset's work, changed: its shape, its pairs."""

  name: str
  change: Callable[[Shape], Shape] = lambda shape: shape
  rework: Callable[[list[Pair]], list[Pair]] = lambda rows: rows


def deeper(shape: Shape) -> Shape:
  layers = shape.overrides.get('num_layers')
  if layers is None:
    layers = models.preset(shape.model).num_layers
  return shape._replace(overrides={**shape.overrides, 'num_layers': 2 * layers})


def longer(rows: list[Pair]) -> list[Pair]:
  """Every prompt and completion twice over: twice the tokens, four times the scores."""
  return [{part: tokens + tokens for part, tokens in pair.items()} for pair in rows]


SERIES: Mapping[str, tuple[str, tuple[Variant, ...]]] = {
  'scaling': (
    'dpo',
    (
      Variant('as it is'),
      Variant('twice the pairs', lambda shape: shape._replace(batch=2 * shape.batch)),
      Variant(
        'twice as long', lambda shape: shape._replace(max_length=2 * shape.max_length), longer
      ),
      Variant('twice the layers', deeper),
    ),
  ),
  'batches': (
    'decode',
    tuple(
      Variant(f'{n} prompts', lambda shape, n=n: shape._replace(prompts=n))  # type: ignore[misc]
      for n in PROMPTS
    ),
  ),
}


def measure(args: argparse.Namespace, once: Callable[..., dict[str, Any]]) -> dict[str, Any]:
  """Runs the variants one after another; `once(args, change=, rework=)` measures one."""
  task, variants = SERIES[args.task]
  given = copy.copy(args)
  given.task = task
  found = [once(given, change=variant.change, rework=variant.rework) for variant in variants]
  return {
    'key': f'{args.task} {args.preset}',
    'title': f'{args.task}, {args.preset}: {task} on one machine',
    'rounds': args.rounds,
    'setting': found[0]['setting'],
    'runs': [
      {'name': variant.name, **compared(one['ours'], found[0]['ours'])}
      for variant, one in zip(variants, found, strict=True)
    ],
  }


def compared(ours: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float]:
  """Cost and arithmetic of a run, and how many times those of the first they are."""
  gflop, gflop_first = (x['gflops_per_second'] * x['step_seconds'] for x in (ours, first))
  arithmetic, cpu = gflop / gflop_first, ours['cpu_seconds'] / first['cpu_seconds']
  return {
    'gflop': gflop,
    'seconds': ours['step_seconds'],
    'cpu_seconds': ours['cpu_seconds'],
    'tokens_per_second': ours['scored_per_second'],
    'arithmetic': arithmetic,
    'cost': ours['step_seconds'] / first['step_seconds'],
    'cpu_cost': cpu,
    'cpu_cost_over_arithmetic': cpu / arithmetic,
  }


COLUMNS = (
  ('useful GFLOP', 'gflop', '{:.3g}'),
  ('seconds', 'seconds', '{:.3g}'),
  ('CPU seconds', 'cpu_seconds', '{:.3g}'),
  ('scored tokens/s', 'tokens_per_second', '{:,.0f}'),
  ('arithmetic, times', 'arithmetic', '{:.2f}'),
  ('seconds, times', 'cost', '{:.2f}'),
  ('CPU seconds, times', 'cpu_cost', '{:.2f}'),
  ('of arithmetic', 'cpu_cost_over_arithmetic', '{:.2f}'),
)


def section(result: Mapping[str, Any]) -> str:
  """The markdown of a series; a step's cost grows no faster than its work where the end is <= 1."""
  lines = grid('a step of', COLUMNS, {run['name']: run for run in result['runs']})
  setting = f'First of them: {result["setting"]}'
  return '\n'.join([f'### {result["title"]}', '', *lines, '', setting, ''])
