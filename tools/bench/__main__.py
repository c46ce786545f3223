"""How fast training and sampling are, beside what others use, on one machine in one session.

  python -m tools.bench install --against trl,tunix   makes the peers' own environments
  python -m tools.bench dpo --preset cpu-6m --against trl
  python -m tools.bench dpo --against trl --data hh.jsonl.gz --tokenizer <folder> --reference table
  python -m tools.bench dpo --against trl --remat full      ours with it too: memory for speed
  python -m tools.bench grpo --against trl --json out.json
  python -m tools.bench scaling                    cost of twice the work against its arithmetic
  python -m tools.bench batches                    decoding at several batch sizes
  python -m tools.bench pod                        a TPU slice's plan beside Tunix's

Both sides get the same weights, tokens, batches, precision and optimiser, and take turns. With
--write the table goes into docs/performance.md.
"""

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpref import models
from jaxpref.train.throughput import PEAK
from tools.bench import caption, figures, pairs, pod, series, table
from tools.bench.pairs import Pair
from tools.bench.shapes import BETA, KL, OPTIMIZER, SAMPLED, SHAPES, TASKS, TRAINED, Shape
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
  parser.add_argument(
    '--remat', choices=('', 'dots', 'full'), default='', help='run ours with it, too'
  )
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
  if args.remat and args.task not in TRAINED:
    parser.error(f'--remat is for tasks with a gradient ({", ".join(TRAINED)}), not {args.task}')
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
    result, section = pod.measure(), pod.section
  elif args.task in series.SERIES:
    result = series.measure(args, functools.partial(measure, names=['ours']))
    section = series.section
  else:
    names = ['ours', 'remat'] if args.remat else ['ours']
    for name in args.against:
      how = lacking(name, args.task, args.reference)
      print(f'skipped {how}') if how else names.append(name)
    result, section = measure(args, names), table.section
  text = section(result)
  print(text)
  if args.json:
    args.json.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
  if args.write:
    table.write(result['key'], text)
  return result


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
  highest = max(max(map(max, filter(None, pair.values())), default=0) for pair in rows)
  if highest >= config.vocab_size:
    raise Failed(
      f'{args.data}: token {highest} of --tokenizer {args.tokenizer} is beyond the vocabulary of '
      f'--preset {args.preset} ({config.vocab_size}); take a smaller tokenizer or a larger preset'
    )
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
      for name in names:
        remat = args.remat if name == 'remat' else ''
        workers.append(Worker(name, job | {'remat': remat}, Path(place), args.cores))
      alternate(workers, warm=args.warm, rounds=args.rounds, steps=args.steps)
      sides = {worker.name: worker.side() for worker in workers}
    finally:
      for worker in workers:
        worker.close()
  timed = rows[args.warm * per_step :]
  work = figures.useful(args.task, shape, timed)
  total = figures.flops(args.task, model, work)
  core_peak = figures.product_flops()
  taken = len(timed) // per_step
  made = {
    name: side.row(work, taken, total, peak=PEAK.get(side.notes['device']), core_peak=core_peak)
    for name, side in sides.items()
  }
  described = caption.setting(args, shape, config, made, core_peak, before)
  ours, again = made.pop('ours'), made.pop('remat', None)
  peers = {name: {'peer': row} | compare(args.task, ours, row) for name, row in made.items()}
  first = next(iter(peers.values()), {'peer': None, 'ratio': None, 'spread': None})
  return {
    'key': caption.key(args),
    'title': caption.title(args),
    'unit': caption.units(args.task),
    'values': caption.values(args.task),
    'warm': args.warm,
    'rounds': args.rounds,
    'setting': described,
    'ours': ours,
    'remat': again and {'is': args.remat, 'side': again} | compare(args.task, ours, again),
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
    **{k: v for k, v in shape._asdict().items() if k not in ('model', 'overrides')},
  }


def compare(task: str, ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
  """How many times as fast and as large ours is as the other, and how far their losses differ."""
  ratio, spread = figures.ratio(ours['seconds'], other['seconds'])
  norms = ([side.get('grad_norm')] for side in (ours, other))
  same = task not in SAMPLED  # of samples each side has its own
  return {
    'ratio': ratio,
    'spread': spread,
    'cpu_ratio': other['cpu_seconds'] / ours['cpu_seconds'],
    'memory_ratio': ours['peak_gib'] / other['peak_gib'],
    'loss_disagreement': figures.disagreement(ours['losses'], other['losses']) if same else None,
    'norm_disagreement': figures.disagreement(*norms) if same else None,
  }


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # an accelerator is the workers'
  try:
    main()
  except Failed as error:
    raise SystemExit(str(error)) from error
