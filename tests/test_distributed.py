"""Two processes of two devices each are one process of four: real programs, joined by gloo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxpref import hosts
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.preemption import EXIT_CODE
from jaxpref.train.writers import read_metrics

ROOT = Path(__file__).parent.parent
TIMES = ('seconds', '_per_second', 'data_wait', 'mfu')  # how their names end
WORDS = ('red', 'green', 'blue', 'white')
LIMIT = 400  # seconds that a program may take on a busy machine
STEPS, HALF = 4, 2
RUN = (
  '--config.batch.size=8',
  '--config.data.max_length=48',
  '--config.log.tensorboard=False',
  f'--config.steps={STEPS}',
  f'--config.eval.every={HALF}',
  f'--config.checkpoint.every={HALF}',
)
# `sft` comes in two microbatches, its layers divided over devices as well as its rows. `ppo`
# samples one rollout ahead, so its carry holds arrays of all processes, and its checkpoint falls
# into the passes over a rollout.
CASES = {
  'dpo': ('--config=dpo:tiny', '--config.mesh.data=1', '--config.mesh.fsdp=-1'),
  'sft': (
    '--config=sft:tiny',
    '--config.mesh.data=2',
    '--config.mesh.tensor=2',
    '--config.batch.microbatches=2',
  ),
  'ppo': (
    '--config=ppo:tiny',
    '--config.mesh.data=1',
    '--config.mesh.fsdp=-1',
    '--config.rollout.prompts=8',
    '--config.rollout.samples=2',
    '--config.rollout.max_new_tokens=4',
    '--config.rollout.ahead=1',
    '--config.data.eval_fraction=0.2',
  ),
  'kto': ('--config=losses:kto,tiny', '--config.mesh.data=2', '--config.mesh.fsdp=-1'),
  'reward': ('--config=reward:tiny', '--config.mesh.data=1', '--config.mesh.fsdp=-1'),
  'grpo': (
    '--config=grpo:tiny',
    '--config.mesh.data=1',
    '--config.mesh.fsdp=-1',
    '--config.rollout.prompts=8',
    '--config.rollout.samples=2',
    '--config.rollout.max_new_tokens=4',
    '--config.rollout.ahead=1',
  ),
}


class Programs:
  """A command of `jaxpref` in `count` processes, four devices in all."""

  def __init__(self, count, logs, *arguments, of_one=(), command='train'):
    flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ['XLA_FLAGS'])
    flags += f' --xla_force_host_platform_device_count={4 // count}'
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    logs.mkdir(exist_ok=True)
    self.logs = [logs / f'{count}-{i}-{time.monotonic_ns()}.txt' for i in range(count)]
    self.running = []
    for i, log in enumerate(self.logs):
      join = (f'--coordinator=127.0.0.1:{port}', f'--processes={count}', f'--process={i}')
      line = [sys.executable, '-m', 'jaxpref.cli.main', command, *arguments]
      line += [*(join if count > 1 else ()), *(of_one if i else ())]
      with open(log, 'w') as out:
        environment = {**os.environ, 'XLA_FLAGS': flags}
        self.running.append(
          subprocess.Popen(line, cwd=ROOT, env=environment, stdout=out, stderr=out)
        )

  def said(self):
    return '\n'.join(f'{log.name}\n{log.read_text()}' for log in self.logs)

  def wait(self):
    """Exit statuses; what still runs after `LIMIT` seconds is killed."""
    end = time.monotonic() + LIMIT
    try:
      return [p.wait(max(0.1, end - time.monotonic())) for p in self.running]
    except subprocess.TimeoutExpired:
      raise AssertionError(f'still running after {LIMIT} s:\n{self.said()}') from None
    finally:
      for process in self.running:
        process.kill()
        process.wait()


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """The flag of a source of 32 short pairs, two of every prompt."""
  file = tmp_path_factory.mktemp('data') / 'pairs.jsonl'
  records = [
    {'prompt': f'{a} {b}', 'chosen': f' {c}', 'rejected': ' no' if c == a else ' never'}
    for a in WORDS
    for b in WORDS
    for c in (a, f'{b}s')
  ]
  file.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return f'--config.data.train=jsonl:{file}'


@pytest.fixture(scope='module')
def runs(tmp_path_factory, pairs):
  """`runs(case, count)`: the folder of a whole run."""
  folder, made = tmp_path_factory.mktemp('runs'), {}

  def run(case, count):
    if (case, count) not in made:
      workdir = made[case, count] = folder / f'{case}-{count}'
      train(count, workdir, case, pairs)
    return made[case, count]

  return run


def train(count, workdir, case, pairs):
  programs = Programs(
    count, workdir.parent / 'said', *CASES[case], *RUN, pairs, f'--workdir={workdir}'
  )
  assert programs.wait() == [0] * count, programs.said()


def lines(workdir):
  """The metrics of a run, without what depends on the clock."""
  read = read_metrics(workdir / 'metrics.jsonl')
  return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in read]


def params(workdir):
  checkpoints = Checkpoints(workdir, read_only=True)
  assert checkpoints.latest_step() == STEPS
  found = checkpoints.restore_params()
  checkpoints.close()
  return found


def assert_alike(one, other):
  """The same steps and metrics to 1e-5, and the same parameters after Adam's steps."""
  for a, b in zip(lines(one), lines(other), strict=True):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(
      list(a.values()), list(b.values()), rtol=1e-5, atol=1e-6, err_msg=f'{list(a)}'
    )
  theirs = dict(leaves(params(other)))
  for name, value in leaves(params(one)):
    np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5, err_msg=name)


def leaves(tree, prefix=''):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{prefix}{name}/')
    else:
      yield f'{prefix}{name}', value


def half_done(workdir, folder):
  """A copy of a run that was killed after its first checkpoint, with metrics of later steps."""
  shutil.copytree(workdir, folder)
  shutil.rmtree(folder / 'checkpoints' / str(STEPS))
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('case', ['dpo', 'sft', 'ppo'])
def test_two_processes_are_one(runs, case):
  alone, two = runs(case, 1), runs(case, 2)
  # Two evaluations and every step: each is in the file once, so process 1 wrote nothing.
  assert [line['step'] for line in lines(alone)] == [1, 2, 2, 3, 4, 4]
  assert_alike(alone, two)
  assert not (alone / 'logs').exists()
  for i in (0, 1):
    log = (two / 'logs' / f'{i}.log').read_text()
    assert f'process {i} of 2' in log and log.rstrip().endswith('ended')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('case', 'before', 'after'),
  [
    ('dpo', 2, 1),
    ('dpo', 1, 2),
    ('dpo', 2, 2),
    ('ppo', 2, 2),
    ('sft', 2, 1),
    ('kto', 1, 2),
    ('reward', 2, 1),
    ('grpo', 1, 2),
  ],
)
def test_a_run_goes_on_with_another_number_of_processes(runs, pairs, tmp_path, case, before, after):
  workdir = half_done(runs(case, before), tmp_path / 'run')
  train(after, workdir, case, pairs)
  assert_alike(runs(case, 1), workdir)


@pytest.mark.slow
def test_two_processes_evaluate_generate_and_export_as_one(runs, tmp_path):
  model = f'--model={runs("dpo", 1)}'
  made = {}
  for count in (1, 2):
    folder = tmp_path / f'{count}'
    folder.mkdir()
    for command, arguments in (
      ('eval', (f'--json={folder}/eval.json',)),
      ('generate', (
        '--prompt=red blue', '--prompt=white', '--num_samples=3', '--max_new_tokens=6',
        f'--output={folder}/texts.jsonl',
      )),
      ('export', (f'--output={folder}/hf',)),
    ):  # fmt: skip
      programs = Programs(count, tmp_path / 'said', model, *arguments, command=command)
      assert programs.wait() == [0] * count, programs.said()
    found = json.loads((folder / 'eval.json').read_text())
    texts = map(json.loads, (folder / 'texts.jsonl').read_text().splitlines())
    made[count] = found, list(texts), {x.name: x.read_bytes() for x in (folder / 'hf').iterdir()}
  (one, texts, files), (other, others, theirs) = made[1], made[2]
  assert one.keys() == other.keys() and one['metrics'].keys() == other['metrics'].keys()
  for name, value in one['metrics'].items():
    assert other['metrics'][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
  assert len(texts) == 6
  for ours, other in zip(texts, others, strict=True):
    assert other.pop('logp') == pytest.approx(ours.pop('logp'), rel=1e-5)
    assert ours == other
  assert files == theirs and 'model.safetensors' in files


@pytest.mark.slow
def test_sigterm_to_one_stops_all_after_the_same_step(pairs, tmp_path):
  workdir = tmp_path / 'run'
  programs = Programs(
    2, tmp_path / 'said', *CASES['dpo'], *RUN, '--config.steps=100000', pairs,
    f'--workdir={workdir}',
  )  # fmt: skip
  end = time.monotonic() + LIMIT
  while not (workdir / 'metrics.jsonl').exists() or not lines(workdir):
    assert time.monotonic() < end and programs.running[0].poll() is None, programs.said()
    time.sleep(0.2)
  programs.running[1].send_signal(signal.SIGTERM)
  assert programs.wait() == [EXIT_CODE] * 2, programs.said()
  stopped = re.findall(r'stopped after step (\d+)', programs.said())
  checkpoints = Checkpoints(workdir, read_only=True)
  assert stopped == [str(checkpoints.latest_step())] * 2
  checkpoints.restore_params()  # raises where it is not whole
  checkpoints.close()
  assert lines(workdir)[-1]['step'] == int(stopped[0])


@pytest.mark.slow
def test_processes_that_were_started_differently_all_say_so(pairs, tmp_path):
  workdir = tmp_path / 'run'
  programs = Programs(
    2, tmp_path / 'said', *CASES['sft'], *RUN, pairs, f'--workdir={workdir}',
    of_one=('--config.batch.microbatches=1',),
  )  # fmt: skip
  assert programs.wait() == [2, 2], programs.said()
  for log in programs.logs:
    assert re.search(r'process 1 was started with other values .* of batch;', log.read_text())
  assert not workdir.exists()


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(pairs, tmp_path):
  """A file that only process 0 has, as where storage is not shared."""
  workdir = tmp_path / 'run'
  programs = Programs(
    2, tmp_path / 'said', *CASES['sft'], *RUN, pairs, f'--workdir={workdir}',
    of_one=(f'--config.data.train=jsonl:{tmp_path}/nowhere.jsonl',),
  )  # fmt: skip
  assert programs.wait() == [2, 2], programs.said()
  assert 'process 1: ' in programs.logs[0].read_text()
  for log in programs.logs:
    assert 'nowhere.jsonl' in log.read_text()


def test_alone_all_of_it_is_free():
  """With one process nothing is sent or copied: the very same objects come back."""
  array = np.arange(3.0)
  assert hosts.from_first(array) is array
  assert hosts.together(lambda: array) is array and hosts.in_turn(lambda: array) is array
  hosts.check_same({'any': object()})
  with pytest.raises(KeyError, match='mine'):
    hosts.together(lambda: {}['mine'])
