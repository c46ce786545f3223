"""Processes that take turns, and the environments of those that are not ours."""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tools.bench.figures import Side
from tools.bench.peers import protocol
from tools.bench.shapes import REFERRING, TASKS
from tools.bench.table import NAMES


class Peer(NamedTuple):
  """Another project: what pip installs, one command after another, and what it is measured on.

  `table`: it can take the reference's log-probs from a table.
  """

  packages: tuple[tuple[str, ...], ...]
  tasks: tuple[str, ...]
  table: bool


PEERS = {
  'trl': Peer((('torch==2.13.0',), ('trl==1.16.0',)), TASKS, table=True),
  # With the compiler that we have: what is compared is what it is given.
  'tunix': Peer(
    ((f'jax=={jax.__version__}', 'google-tunix==0.1.7'),),
    ('dpo', 'sft', 'grpo', 'decode'),
    table=False,
  ),
}
OURS = ('ours', 'remat')  # as it is, and with the remat that was asked for
SCRIPTS = Path(__file__).parent / 'peers'
MEASURED = ('steps', 'losses', 'peak_gib', 'seconds', 'cpu_seconds')  # of a round
TESTS = ('XLA_FLAGS', 'OMP_NUM_THREADS', 'PYTHONPATH')  # set for them, not for workers


def folder() -> Path:
  base = os.environ.get('JAXPREF_CACHE', '~/.cache/jaxpref')
  return Path(base).expanduser() / 'bench'


def python_of(peer: str) -> Path:
  return folder() / peer / 'bin' / 'python'


def lacking(peer: str, task: str, reference: str) -> str | None:
  """Why a peer cannot be measured, or None."""
  if task not in PEERS[peer].tasks:
    return f'{peer}: it is measured on {", ".join(PEERS[peer].tasks)}, not on {task}'
  if task in REFERRING and reference == 'table' and not PEERS[peer].table:
    return f'{peer}: it reads no table of reference log-probs; take --reference live'
  if not python_of(peer).exists():
    return f'{peer}: not installed; `python -m tools.bench install --against {peer}` makes its venv'
  return None


def install(peer: str) -> None:
  """Makes the peer's environment, with pip as this machine has it set up."""
  where = folder() / peer
  venv.create(where, with_pip=True, clear=True)
  for packages in PEERS[peer].packages:
    subprocess.run([python_of(peer), '-m', 'pip', 'install', *packages], check=True)


class Failed(RuntimeError):
  """A worker ended before it was done; its last words are in the message."""


class Worker:
  """A process that takes steps when asked.

  Args:
    name: one of `OURS`, or a peer's.
    job: what to do, see `peers/trl_worker.py`; it is written to a file.
    place: of the job's files.
    cores: that it may use; 0: all. On a busy machine one core each is the fairer measure: threads
      that wait for one another spin while other work has their core.
  """

  def __init__(self, name: str, job: Mapping[str, Any], place: Path, cores: int = 0):
    self.name = name
    path = place / f'{name}.json'
    path.write_text(json.dumps(job), encoding='utf-8')
    if name in OURS:
      command = [sys.executable, '-m', 'tools.bench.ours', str(path)]
    else:
      command = [str(python_of(name)), str(SCRIPTS / f'{name}_worker.py'), str(path)]
    if cores:
      command = ['taskset', '--cpu-list', f'0-{cores - 1}', *command]
    environment = {k: v for k, v in os.environ.items() if k not in TESTS}
    environment['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # others need memory of the GPU too
    self._errors = tempfile.TemporaryFile('w+', encoding='utf-8')
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      env=environment,
      text=True,
      cwd=Path(__file__).parents[2] if name in OURS else place,
    )
    self._rounds: list[dict[str, Any]] = []
    self.ready: dict[str, Any] = {}

  def wait_ready(self) -> None:
    self.ready = self._said()

  def steps(self, count: int) -> dict[str, Any]:
    """Takes `count` steps; returns what the worker measured."""
    assert self._process.stdin
    self._process.stdin.write(f'{count}\n')
    self._process.stdin.flush()
    self._rounds.append(self._said())
    return self._rounds[-1]

  def side(self) -> Side:
    """Of all rounds but the first, which warms up."""
    warm, *timed = self._rounds
    return Side(
      seconds=[r['seconds'] / r['steps'] for r in timed],
      cpu_seconds=[r['cpu_seconds'] / r['steps'] for r in timed],
      peak_gib=max(r['peak_gib'] for r in self._rounds),
      losses=warm['losses'],
      notes=self.ready | {k: v for k, v in self._rounds[-1].items() if k not in MEASURED},
    )

  def close(self) -> None:
    assert self._process.stdin and self._process.stdout
    self._process.stdin.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._errors.close()

  def _said(self) -> dict[str, Any]:
    assert self._process.stdout
    for line in self._process.stdout:
      if line.startswith(protocol.MARK):
        return json.loads(line.removeprefix(protocol.MARK))
    self._errors.seek(0)
    words = '\n'.join(self._errors.read().splitlines()[-15:])
    raise Failed(f'{self.name} ended before it was done:\n{words}')


def alternate(workers: Sequence[Worker], *, warm: int, rounds: int, steps: int) -> None:
  """Warms all of them up, then lets them take turns."""
  for worker in workers:
    print(f'{called(worker.name)} loads, compiles and warms up ...', flush=True)
    worker.wait_ready()
    worker.steps(warm)
  for number in range(rounds):
    for worker in workers:
      took = worker.steps(steps)['seconds'] / steps
      print(
        f'round {number + 1} of {rounds}: {called(worker.name)} {took:#.3g} s a step', flush=True
      )


def called(name: str) -> str:
  return f'{NAMES["ours"]} with remat' if name == 'remat' else NAMES.get(name, name)
