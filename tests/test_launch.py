"""`jaxpref launch`: GKE, SLURM, local processes, dry runs and mistakes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref.cli.main import main
from jaxpref.launch import gke, processes
from jaxpref.launch.job import files
from tests.launches import (
  ARGUMENTS,
  COMMAND,
  GKE,
  VM,
  alive,
  calls,
  cloud,
  made,
  once_started,
  ran,
  runs,
  todo,
  vm,
)

__all__ = ['cloud']  # the fixture


@pytest.mark.parametrize(
  'place',
  [VM, GKE, ['--on=slurm', '--name=x', '--workdir=w'], ['--on=local', '--workdir=w']],
  ids=lambda place: place[0],
)
def test_dry_run_prints_and_runs_nothing(place, cloud, capsys):
  assert main(['launch', *place, '--dry-run', *COMMAND]) == 0
  shown = capsys.readouterr().out
  assert not calls(cloud) and not list(cloud.glob('ran-*'))
  tool = {'tpu-vm': 'gcloud', 'gke': 'xpk', 'slurm': 'sbatch', 'local': f'{cloud}/bin/jaxpref'}
  assert f'\n{tool[place[0].partition("=")[2]]} ' in f'\n{shown}'


def test_what_a_dry_run_prints_is_what_a_launch_does(cloud, capsys):
  assert vm(cloud, '--dry-run') == 0
  lines = capsys.readouterr().out.splitlines()
  printed = [shlex.split(line) for line in lines if 'queued-resources' in line]
  assert vm(cloud) == 0
  assert [c for c in calls(cloud) if c[3:5] == ['queued-resources', 'create']] == printed[:1]
  assert calls(cloud)[-1] == printed[-1]


def test_gke_submits_waits_and_shows_what_failed(cloud, capsys):
  assert main(['launch', *GKE, '--image=gcr.io/p/j', '--requeues=4', *COMMAND]) == 0
  create, wait = calls(cloud)
  where = ['--cluster=c', '--project=p', '--zone=z']
  assert create[:-1] == [
    'xpk', 'workload', 'create', *where, '--workload=dpo1', '--tpu-type=v5litepod-16',
    '--num-slices=1', '--docker-image=gcr.io/p/j', '--max-restarts=4',
    '--restart-on-exit-codes=75', '--termination-grace-period-seconds=300',
  ]  # fmt: skip
  assert wait == ['xpk', 'workload', 'list', *where, '--wait-for-job-completion=dpo1']
  todo(cloud, ['list', 125, 'failed'], ['kubectl', 0, '[pod/dpo1-0-3] out of memory'])
  assert main(['launch', *GKE, '--image=gcr.io/p/j', *COMMAND]) == 1
  assert '[pod/dpo1-0-3] out of memory' in capsys.readouterr().err


def test_a_container_gets_the_command_as_it_was(cloud):
  assert main(['launch', *GKE, f'--code={cloud}/code', *COMMAND]) == 0
  command = calls(cloud)[0][-1].removeprefix('--command=')
  assert not set('$"\\\n{}') & set(command)  # what YAML, Kubernetes and XPK read their own way
  container = ['bash', '-c', f'({command}) & wait $!']
  subprocess.run(container, cwd=cloud, check=True, env={**os.environ, 'WORKER': '0'})
  assert ran(cloud, 0) == [[*ARGUMENTS, '--workdir=/mnt/b/run', '--distributed']]
  assert made(cloud, 'pip', '.[tpu,gcs]') == 1 and not list(cloud.rglob('pwned'))
  assert gke.one_line("exec jaxpref train '--config.model=a b'").startswith('exec jaxpref')


@pytest.mark.parametrize(
  ('code', 'times', 'requeued'), [(0, 0, 0), (3, 0, 0), (75, 0, 1), (75, 2, 0)]
)
def test_slurm_jobs_put_themselves_back_into_the_queue(code, times, requeued, cloud, capsys):
  flags = ['--on=slurm', "--name=it's; mine", '--nodes=2', '--tasks=4', '--gpus=h100:4']
  assert main(['launch', *flags, '--workdir=/s/x y', '--requeues=2', *COMMAND]) == 0
  assert 'submitted job 17' in capsys.readouterr().out
  assert calls(cloud) == [
    ['sbatch', '--parsable', "--job-name=it's; mine", '--nodes=2', '--ntasks-per-node=4',
     '--gpus-per-node=h100:4', '--dependency=singleton', '--requeue', '--signal=TERM@300',
     '--open-mode=append'],
  ]  # fmt: skip
  runs(cloud, w0_0=f'sys.exit({code})')
  job = {**os.environ, 'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': str(times), 'WORKER': '0'}
  ended = subprocess.run(['bash', cloud / 'script'], cwd=cloud, env=job, capture_output=True)
  assert ended.returncode == code
  assert made(cloud, 'srun', '--label', '--kill-on-bad-exit=0', '--wait=300') == 1
  assert made(cloud, 'scontrol', 'requeue', '17') == requeued
  assert ran(cloud, 0) == [[*ARGUMENTS, '--workdir=/s/x y', '--distributed']]
  assert (b'a task ended with' in ended.stderr) == (code != 0 and not requeued)


LOCAL = ['launch', '--on=local', '--processes=2', '--workdir=w', *COMMAND]


def test_local_processes_join_one_another(cloud):
  assert main(LOCAL) == 0
  (first,), (second,) = ran(cloud, 0), ran(cloud, 1)
  assert first[:4] == [*ARGUMENTS, '--workdir=w']
  assert first[4].startswith('--coordinator=127.0.0.1:') and first[:-1] == second[:-1]
  assert first[5:] == ['--processes=2', '--process=0'] and second[-1] == '--process=1'


def test_a_local_failure_names_the_process_and_preemption_starts_all_again(cloud, capsys):
  fails = once_started(0, 2, '1 / 0')
  runs(cloud, w0_0='sys.exit(75)', w1_0='sys.exit(75)', w0_1='time.sleep(60)', w1_1=fails)
  assert main(LOCAL) == 1
  said = capsys.readouterr().err
  assert 'process 1 ended with 1' in said and 'ZeroDivisionError' in said
  assert len(ran(cloud, 0)) == 2
  assert not alive(json.loads((cloud / 'ran-0').read_text().splitlines()[1])[0])


def test_a_process_that_a_signal_ends_has_failed():
  command = [sys.executable, '-SEc', 'import os; os.kill(os.getpid(), 9)']
  assert processes.together({'one': command}, lambda: None).code == 128 + 9


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--name=x; rm', *COMMAND], "--name='x; rm': Google Cloud takes"),
    (['--name=-x', *COMMAND], "--name='-x': Google Cloud takes"),
    (['--workdir=runs/x', *COMMAND], 'must be what all machines see'),
    (['--workdir=s3://b/x', *COMMAND], 'gs://bucket/run, or a folder'),
    (['--workdir=', *COMMAND], '--workdir is missing'),
    (['--tpu=', *COMMAND], '--tpu is missing, which --on=tpu-vm needs'),
    (['--on=local', *COMMAND], '--name says nothing to --on=local'),
    (['--nodes=2', *COMMAND], '--nodes says nothing to --on=tpu-vm'),
    (['--slices=0', *COMMAND], '--slices=0: 0 is not a positive integer'),
    (['--code=/nowhere', *COMMAND], '--code=/nowhere has no pyproject.toml'),
    (['stray', *COMMAND], "unexpected 'stray'; the command to run comes after --"),
    ([], 'after -- comes what every worker runs'),
    (['--', 'eval'], "got 'eval"),
    (['--', 'train'], '--config is missing after --'),
    (['--', 'train', '--config=dop:tiny'], "did you mean 'dpo'"),
    (['--', 'train', '--config=dpo:tiny', '--config.batchsize=1'], 'config.batch.size'),
    (['--', 'train', '--config=dpo:tiny', '--workdir=x'], 'give --workdir before the --'),
  ],
)
def test_mistakes_are_named_before_anything_is_asked_for(arguments, message, cloud, capsys):
  assert main(['launch', *VM, *arguments]) == 2
  assert message in capsys.readouterr().err
  assert not calls(cloud)


def test_a_tool_that_is_not_there_is_named(cloud, capsys, monkeypatch):
  monkeypatch.setenv('PATH', str(cloud))
  assert main(['launch', *GKE, '--image=j', *COMMAND]) == 2
  assert 'xpk is not on PATH; pip install xpk' in capsys.readouterr().err


def test_what_git_ignores_is_not_copied(tmp_path):
  subprocess.run(['git', 'init', '-q', tmp_path], check=True)
  (tmp_path / '.gitignore').write_text('big/\n')
  (tmp_path / 'big').mkdir()
  (tmp_path / 'big' / 'file').touch()
  (tmp_path / 'own.py').touch()
  assert files(tmp_path) == [Path('.gitignore'), Path('own.py')]
