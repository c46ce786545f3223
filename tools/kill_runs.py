"""Kills runs again and again: they have to end as if nobody had. `python -m tools.kill_runs`.

  python -m tools.kill_runs --kills=5 --folder=/tmp/kills
  python -m tools.kill_runs --cases=ppo,grpo --seed=3

For each case one run goes through. A second one, of the same command, gets SIGKILL at random: some
time after it has written a random number of lines, or, every other time, while a checkpoint is
being written; then the command is started again. In the end all metrics, those aside that depend on
the clock, and the parameters have to be the same bits. Takes minutes a case.
"""

import argparse
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLOCK = re.compile(r'seconds|_per_second|data_wait|mfu')  # metrics that depend on it
STEPS = 40
ALL = (
  f'--config.steps={STEPS}', '--config.checkpoint.every=3', '--config.eval.every=9',
  '--config.log.tensorboard=False', '--config.ema=0.9',
)  # fmt: skip
SMALL = ('--config.batch.size=8', '--config.data.max_length=64')
ROLLOUT = (
  '--config.rollout.prompts=8', '--config.rollout.samples=4', '--config.rollout.max_new_tokens=6',
  '--config.rollout.show=0', '--config.rollout.epochs=2', '--config.rollout.ahead=1',
  '--config.data.max_length=32',
)  # fmt: skip
CASES = {
  'sft': ('--config=sft:tiny', *SMALL),
  'dpo': ('--config=dpo:tiny', *SMALL),  # with its table of the reference
  'kto': ('--config=losses:kto,tiny', *SMALL),
  'reward': ('--config=reward:tiny', *SMALL),
  'ppo': ('--config=ppo:tiny', *ROLLOUT),
  'grpo': ('--config=grpo:tiny', *ROLLOUT),
}


class Run:
  """A command in a folder of its own, with its own cache."""

  def __init__(self, folder: pathlib.Path, arguments: tuple[str, ...]):
    self.folder, self.log = folder, folder.with_suffix('.log')
    self.command = [sys.executable, '-m', 'jaxpref.cli.main', 'train', *ALL, *arguments]
    self.command.append(f'--workdir={folder}')

  def start(self) -> subprocess.Popen:
    cache = {'JAXPREF_CACHE': str(self.folder.with_suffix('.cache'))}
    with self.log.open('a') as log:
      return subprocess.Popen(
        self.command, cwd=ROOT, env={**os.environ, **cache}, stdout=log, stderr=log
      )

  def lines(self) -> int:
    file = self.folder / 'metrics.jsonl'
    return file.read_bytes().count(b'\n') if file.exists() else 0

  def saving(self) -> bool:
    """Whether a checkpoint is half written."""
    return any((self.folder / 'checkpoints').glob('*tmp*'))

  def kill(self, chance: random.Random, in_save: bool) -> str:
    """Starts it and kills it at random; says when. '' if it ended before."""
    process, lines = self.start(), self.lines() + chance.randrange(1, STEPS // 2)
    delay = chance.uniform(0, 0.3)
    while process.poll() is None and (self.lines() < lines or (in_save and not self.saving())):
      time.sleep(0.001)
    if not in_save:
      time.sleep(delay)
    saving = self.saving()
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
      return ''
    return f'after {self.lines()} lines' + (', half a checkpoint written' if saving else '')

  def finish(self) -> None:
    if status := self.start().wait():
      raise RuntimeError(f'exit status {status}; see {self.log}')


def differences(one: Run, other: Run) -> list[str]:
  """What is not the same bits in both."""
  found = []
  ours, theirs = (read_metrics(run.folder / 'metrics.jsonl') for run in (one, other))
  if len(ours) != len(theirs):
    found.append(f'{len(ours)} lines of metrics and {len(theirs)}')
  for a, b in zip(ours, theirs, strict=False):
    names = [n for n in a.keys() | b.keys() if a.get(n) != b.get(n) and not CLOCK.search(n)]
    found += [f'step {a["step"]}: {name} {a.get(name)} and {b.get(name)}' for name in sorted(names)]
  trees = [Checkpoints(run.folder, read_only=True).restore_params() for run in (one, other)]
  for (path, x), y in zip(
    jax.tree.leaves_with_path(trees[0]), jax.tree.leaves(trees[1]), strict=True
  ):
    if not np.array_equal(x, y):
      found.append(f'parameters {jax.tree_util.keystr(path)} differ by {np.abs(x - y).max()}')
  return found


def check(name: str, folder: pathlib.Path, kills: int, seed: int) -> list[str]:
  """Differences between a run of case `name` and one that was killed `kills` times."""
  chance = random.Random(f'{name} {seed}')
  whole, killed = (Run(folder / f'{name}-{which}', CASES[name]) for which in ('whole', 'killed'))
  whole.finish()
  for n in range(kills):
    when = killed.kill(chance, in_save=n % 2 == 1)
    if not when:
      break
    print(f'{name}: killed {when}', flush=True)
  killed.finish()
  return differences(whole, killed)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cases', default=','.join(CASES), help=f'of {", ".join(CASES)}')
  parser.add_argument('--kills', type=int, default=4, help='of each')
  parser.add_argument('--seed', type=int, default=0, help='of when they come')
  parser.add_argument('--folder', type=pathlib.Path, required=True, help='for the runs; a new one')
  own = parser.parse_args()
  own.folder.mkdir(parents=True)
  failed = False
  for name in own.cases.split(','):
    found = check(name, own.folder, own.kills, own.seed)
    print(
      f'{name}: ' + ('\n  '.join(['differs', *found[:20]]) if found else 'the same bits'),
      flush=True,
    )
    failed |= bool(found)
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
