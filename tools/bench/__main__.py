"""How fast training and sampling are, beside what others use, on one machine in one session.

  python -m tools.bench install --against trl      makes the peer's own environment
  python -m tools.bench dpo --preset cpu-6m --against trl
  python -m tools.bench dpo --against trl --data hh.jsonl.gz --tokenizer <folder> --reference table
  python -m tools.bench grpo --against trl --json out.json
  python -m tools.bench scaling                    cost of twice the work against its arithmetic
  python -m tools.bench batches                    decoding at several batch sizes
  python -m tools.bench pod                        a TPU slice's plan beside Tunix's

Both sides get the same weights, tokens, batches, precision and optimiser, and take turns. With
--write the table goes into docs/performance.md.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import models
from jaxpref.models import Model
from jaxpref.train.throughput import PEAK
from tools.bench import figures, pairs, pod, series, table
from tools.bench.pairs import Pair
from tools.bench.shapes import BETA, KL, OPTIMIZER, REFERRING, SAMPLED, SHAPES, TASKS, Shape
from tools.bench.workers import PEERS, Failed, Worker, alternate, install, lacking


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m tools.bench',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('task', choices=(*TASKS, *series.SERIES, 'pod', 'install'))
  parser.add_argument('--preset', choices=SHAPES, default='cpu-6m')
  parser.add_argument('--against', default='', help=f'peers, by commas: {", ".join(PEERS)}')
  parser.add_argument('--data', default='', help='pairs, as JSONL or any source; default: made up')
  parser.add_argument('--tokenizer', default='byte', help="of --data: 'byte' or a folder")
  parser.add_argument(
    '--reference', choices=('live', 'table'), default='live', help='of dpo and kto'
  )
  parser.add_argument('--remat', choices=('', 'full'), default='', help='keep fewer activations')
  parser.add_argument('--batch', type=int, default=0, help="examples a step; 0: the preset's")
  parser.add_argument('--cores', type=int, default=0, help='of each worker (Linux); 0: all')
  parser.add_argument('--warm', type=int, default=5, help='steps before the clock starts')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=3, help='of a round')
  parser.add_argument('--json', type=Path, default=None, help='write the result here')
  parser.add_argument('--write', action='store_true', help='write the table to docs/performance.md')
  args = parser.parse_args(argv)
  args.against = [name for name in args.against.split(',') if name]
  for name in args.against:
    if name not in PEERS:
      parser.error(f'no peer {name!r}; known: {", ".join(PEERS)}')
  if min(args.warm, args.rounds, args.steps) < 1:
    parser.error('--warm, --rounds and --steps must be at least 1')
  return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
  args = parse(argv)
  if args.task == 'install':
    for name in args.against:
      install(name)
    return None
  if args.task == 'pod':
    result = pod.measure()
    print(pod.section(result))
    if args.json:
      args.json.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    return result
  if args.task in series.SERIES:
    result = series.measure(args, functools.partial(measure, names=['ours']))
    print(series.section(result))
    finish(args, result, functools.partial(table.write, section=series.section))
    return result
  names = ['ours']
  for name in args.against:
    how = lacking(name)
    print(f'skipped {how}') if how else names.append(name)
  result = measure(args, names)
  print(table.section(result))
  finish(args, result, table.write)
  return result


def finish(args: argparse.Namespace, result: dict[str, Any], write: Callable) -> None:
  if args.json:
    args.json.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
  if args.write:
    write(result)


def measure(
  args: argparse.Namespace,
  names: Sequence[str],
  change: Callable[[Shape], Shape] = lambda shape: shape,
  rework: Callable[[list[Pair]], list[Pair]] = lambda rows: rows,
) -> dict[str, Any]:
  """Runs the workers; returns the result that is printed and written.

  `change` makes other work of the preset's shape, `rework` of pairs that are drawn for the preset.
  """
  given = SHAPES[args.preset]
  shape = change(given._replace(batch=args.batch or given.batch))
  config = models.preset(shape.model, **shape.overrides, num_labels=int(args.task == 'reward'))
  steps = args.warm + args.rounds * args.steps
  per_step = shape.prompts if args.task in SAMPLED else shape.batch
  if args.data:
    rows = pairs.from_file(args.data, args.tokenizer, steps * per_step, given.max_length)
  else:
    rows = pairs.made_up(steps * per_step, config.vocab_size, given.max_length)
  rows = rework(rows)
  if args.task == 'kto':
    rows = pairs.labelled(rows, shape.batch, shape.max_length)
  before = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as place:
    model, params = models.init(config, jax.random.key(0))
    models.save_hf(Path(place) / 'model', model, params)
    del params
    job = job_of(args, shape, rows, steps) | {'model': str(Path(place) / 'model')}
    workers: list[Worker] = []
    try:
      workers += [Worker(name, job, Path(place), args.cores) for name in names]
      alternate(workers, warm=args.warm, rounds=args.rounds, steps=args.steps)
      sides = {worker.name: worker.side() for worker in workers}
    finally:
      for worker in workers:
        worker.close()
  timed = rows[args.warm * per_step :]
  work = figures.useful(args.task, shape, timed)
  total = figures.flops(args.task, model, work)
  core_peak = product_flops()
  taken = len(timed) // per_step
  made = {
    name: side.row(work, taken, total, peak=PEAK.get(side.notes['device']), core_peak=core_peak)
    for name, side in sides.items()
  }
  described = setting(args, shape, model, made, core_peak, before)
  ours = made.pop('ours')
  peers = {name: compare(args.task, ours, row) for name, row in made.items()}
  first = next(iter(peers.values()), {'peer': None, 'ratio': None, 'spread': None})
  what = args.reference if args.task in REFERRING else ''
  cores = args.cores and f'{args.cores}-core'
  parts = (args.task, args.preset, what, args.remat and 'remat', cores)
  key = ' '.join(filter(None, parts))
  return {
    'key': key,
    'title': title(args),
    'unit': units(args.task),
    'warm': args.warm,
    'rounds': args.rounds,
    'setting': described,
    'ours': ours,
    'peer': first['peer'],
    'ratio': first['ratio'],
    'spread': first['spread'],
    'peers': peers,
  }


def job_of(
  args: argparse.Namespace, shape: Shape, rows: Sequence[Pair], steps: int
) -> dict[str, Any]:
  """What workers are told, but for where the model lies; see `peers/trl_worker.py`."""
  return {
    'task': args.task,
    'pairs': rows,
    'steps': steps,
    'optimizer': OPTIMIZER,
    'beta': BETA,
    'kl': KL,
    'reference': args.reference,
    'remat': args.remat,
    **{k: v for k, v in shape._asdict().items() if k not in ('model', 'overrides')},
  }


def compare(task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
  ratio, spread = figures.ratio(ours['seconds'], theirs['seconds'])
  losses, norms = (
    (ours['losses'], theirs['losses']),
    (ours.get('grad_norm'), theirs.get('grad_norm')),
  )
  if task in SAMPLED:  # each has its own samples
    losses, norms = ([], []), (None, None)
  return {
    'peer': theirs,
    'ratio': ratio,
    'spread': spread,
    'cpu_ratio': theirs['cpu_seconds'] / ours['cpu_seconds'],
    'loss_disagreement': figures.disagreement(*losses),
    'norm_disagreement': figures.disagreement(*([norm] for norm in norms)),
  }


def units(task: str) -> str:
  return 'completions' if task in SAMPLED else 'examples' if task == 'kto' else 'pairs'


def title(args: argparse.Namespace) -> str:
  words = [args.task, args.preset]
  if args.task in REFERRING:
    words.append(
      {'live': 'reference in the step', 'table': 'reference from a table'}[args.reference]
    )
  if args.remat:
    words.append('activations computed again')
  if args.cores:
    words.append(f'on {args.cores} core' + 's' * (args.cores > 1))
  return ', '.join(words)


def setting(
  args: argparse.Namespace,
  shape: Shape,
  model: Model,
  sides: dict[str, dict[str, Any]],
  core_peak: float,
  load: float,
) -> str:
  """What was run where, in a paragraph."""
  c = model.config
  work = f'{shape.batch} {units(args.task)} of at most {shape.max_length} tokens a step'
  if args.task in SAMPLED:
    work = (
      f'{shape.prompts} prompts x {shape.samples} completions of {shape.new_tokens} tokens a step'
    )
  source = Path(args.data).name if args.data else 'made-up pairs'
  versions: dict[str, str] = {}
  for side in sides.values():
    versions |= side['versions']
  known = ', '.join(f'{name} {version}' for name, version in versions.items())
  return (
    f'{work}, {source}; {c.num_layers} layers x {c.width}, vocabulary {c.vocab_size}, '
    f'{shape.dtype}. {datetime.date.today()}, {hardware(sides["ours"]["device"])}; a core does '
    f'{core_peak / 1e9:.0f} GFLOP/s in float32 products, load average {load:.1f} before '
    f'and {os.getloadavg()[0]:.1f} after. {known}.'
  )


def hardware(device: str) -> str:
  """The accelerator that our worker named, or the processor with its cores."""
  if device != 'cpu':
    return device
  name = platform.processor() or platform.machine()
  info = Path('/proc/cpuinfo')
  if info.exists():
    lines = (line.partition(':') for line in info.read_text(encoding='utf-8').splitlines())
    name = next((value.strip() for key, _, value in lines if key.strip() == 'model name'), name)
  return f'{os.cpu_count()} cores of {name}'


def product_flops(size: int = 2048, times: int = 5) -> float:
  """FLOP of a square float32 matrix product in a second of CPU time, the best of `times`."""
  multiply = jax.jit(jnp.dot)
  x = jnp.ones((size, size), jnp.float32)
  multiply(x, x).block_until_ready()
  best = np.inf
  for _ in range(times):
    began = time.process_time()
    multiply(x, x).block_until_ready()
    best = min(best, time.process_time() - began)
  return 2 * size**3 / best


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # an accelerator is the workers'
  try:
    main()
  except Failed as error:
    raise SystemExit(str(error)) from error
