"""`jaxpref launch --on=tpu-vm`: what gcloud is called with, and what follows when workers end."""

import json
import os
import subprocess
import time
import types

import pytest

from jaxpref.launch import processes, remote
from tests.launches import (
  ARGUMENTS,
  alive,
  calls,
  cloud,
  made,
  once_started,
  ran,
  runs,
  state,
  todo,
  vm,
)

__all__ = ['cloud']  # the fixture

WHERE = ['--project=p', '--zone=z', '--quiet']
QUEUE = ['gcloud', 'compute', 'tpus', 'queued-resources']
NODE = ['gcloud', 'compute', 'tpus', 'tpu-vm']


def test_tpu_vms_are_made_set_up_run_on_and_deleted(cloud, capsys):
  assert vm(cloud, '--spot', '--option=--network=lan') == 0
  done = calls(cloud)
  assert done[0] == [*QUEUE, 'describe', 'dpo1', *WHERE, '--format=json']
  assert done[1] == [
    *QUEUE, 'create', 'dpo1', *WHERE, '--accelerator-type=v5litepod-16', '--runtime-version=v2',
    '--node-id=dpo1', '--spot', '--async', '--network=lan',
  ]  # fmt: skip
  assert done[2] == done[0]
  copied = done[3][5]
  assert done[3] == [*NODE, 'scp', copied, f'dpo1:{remote.ARCHIVE}', *WHERE, '--worker=all']
  assert done[4][:-1] == [*NODE, 'ssh', 'dpo1', *WHERE, '--worker=all']
  assert done[5] == [*NODE, 'describe', 'dpo1', *WHERE, '--format=json']
  assert sorted(call[-2] for call in done[6:8]) == ['--worker=0', '--worker=1']
  assert done[8:] == [[*QUEUE, 'delete', 'dpo1', *WHERE, '--force']]
  for worker in (0, 1):
    assert ran(cloud, worker) == [[*ARGUMENTS, '--workdir=/mnt/b/run', '--distributed']]
  shown = capsys.readouterr().out
  assert 'dpo1 worker 0 | hello from 0\n' in shown and 'dpo1 worker 1 | hello from 1\n' in shown
  assert not list(cloud.rglob('pwned'))


def test_several_slices_are_one_request(cloud):
  assert vm(cloud, '--slices=2', '--dry_run') == 0
  todo(cloud, ['create', 1, 'no'])
  assert vm(cloud, '--slices=2') == 2
  assert made(cloud, 'create', '--node-count=2', '--node-prefix=dpo1') == 1


def test_what_is_transient_is_tried_again_and_what_is_not_is_shown(cloud, capsys, monkeypatch):
  pauses = []
  clock = types.SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
  monkeypatch.setattr(processes, 'time', clock)
  todo(cloud, *[['create', 1, 'ERROR: UNAVAILABLE']] * 3)
  assert vm(cloud) == 0
  assert pauses == [2, 4, 8] and made(cloud, 'create') == 4
  todo(cloud, ['create', 1, 'PERMISSION_DENIED: not yours'])
  assert vm(cloud) == 2
  assert pauses == [2, 4, 8] and made(cloud, 'create') == 5
  assert 'PERMISSION_DENIED: not yours' in capsys.readouterr().err


def test_a_request_that_arrived_though_its_answer_did_not_is_used(cloud):
  (cloud / 'exists').touch()
  absent = ['queued-resources describe', 1, 'NOT_FOUND']
  todo(cloud, absent, ['create', 1, 'ALREADY_EXISTS: dpo1'])
  assert vm(cloud) == 0
  assert made(cloud, 'create') == 1 and len(ran(cloud, 0)) == 1


def test_an_interrupt_stops_the_workers_and_deletes_the_machines(cloud, monkeypatch):
  monkeypatch.setenv('LAUNCHER', str(os.getpid()))
  runs(cloud, w0_0="os.kill(int(os.environ['LAUNCHER']), 15); time.sleep(60)")
  assert vm(cloud) == 130
  assert made(cloud, 'delete') == 1
  assert not alive(json.loads((cloud / 'ran-0').read_text())[0])


def test_a_request_that_is_given_up_ends_the_launch_and_is_deleted(cloud, capsys):
  todo(cloud, ['queued-resources describe', 1, 'NOT_FOUND'], state('FAILED'))
  assert vm(cloud) == 2
  assert 'the request is FAILED' in capsys.readouterr().err
  assert made(cloud, 'delete') == 1 and not made(cloud, 'scp')


def test_waiting_says_each_state_once(cloud, capsys):
  waiting = [state('WAITING_FOR_RESOURCES')] * 3 + [state('PROVISIONING')]
  todo(cloud, ['queued-resources describe', 1, 'NOT_FOUND'], *waiting)
  assert vm(cloud) == 0
  assert capsys.readouterr().out.count('dpo1: WAITING_FOR_RESOURCES') == 1


def test_a_preempted_run_starts_again_on_new_machines(cloud):
  gone = "(here / 'todo').write_text(json.dumps(['queued-resources describe', 0, json.dumps({'state': {'state': 'SUSPENDED'}})]) + '\\n'); sys.exit(75)"  # noqa: E501
  runs(cloud, w0_0=gone, w1_0='sys.exit(75)')
  assert vm(cloud) == 0
  assert made(cloud, 'create') == 2 and made(cloud, 'delete') == 2
  assert ran(cloud, 0)[0] == ran(cloud, 0)[1]  # the same command resumes


def test_a_run_that_saved_and_left_starts_again_where_the_machines_are_still_there(cloud):
  late = "time.sleep(1.5); (here / 'saved').touch(); sys.exit(75)"
  runs(cloud, w0_0='sys.exit(75)', w1_0=late)
  assert vm(cloud) == 0
  assert (cloud / 'saved').exists()  # nobody is stopped while saving
  assert made(cloud, 'create') == 1 and len(ran(cloud, 0)) == len(ran(cloud, 1)) == 2


def test_starting_again_has_an_end(cloud, capsys):
  runs(cloud, **{f'w{i}_{n}': 'sys.exit(75)' for i in range(2) for n in range(3)})
  assert vm(cloud, '--requeues=1') == 75
  assert len(ran(cloud, 0)) == 2 and made(cloud, 'delete') == 1
  assert 'more often than --requeues=1' in capsys.readouterr().out


def test_one_workers_failure_is_reported_and_stops_the_others(cloud, capsys):
  fails = once_started(0, 1, "print('no such file'); sys.exit(3)")
  runs(cloud, w0_0='time.sleep(60)', w1_0=fails)
  start = time.monotonic()
  assert vm(cloud) == 3
  assert time.monotonic() - start < 30
  said = capsys.readouterr().err
  assert 'dpo1 worker 1 ended with 3' in said and '  no such file' in said
  assert made(cloud, 'delete') == 1
  pid = json.loads((cloud / 'ran-0').read_text())[0]
  assert not alive(pid)


def test_keep_leaves_the_machines_and_the_next_launch_uses_them(cloud, capsys):
  assert vm(cloud, '--keep') == 0
  assert not made(cloud, 'delete')
  assert 'queued-resources delete dpo1' in capsys.readouterr().out
  assert vm(cloud) == 0
  assert made(cloud, 'create') == 1 and made(cloud, 'delete') == 1


def test_a_broken_connection_follows_the_run_and_does_not_start_another(cloud):
  home = cloud / 'worker-0'
  (home / remote.CODE).mkdir(parents=True)
  runs(cloud, w0_0="time.sleep(2); print('done'); sys.exit(5)")
  command = ['bash', '-c', remote.start(['jaxpref', 'train'], 'one')]
  with pytest.raises(subprocess.TimeoutExpired):
    subprocess.run(command, cwd=home, stdout=subprocess.DEVNULL, timeout=1)
  again = subprocess.run(command, cwd=home, capture_output=True, text=True)
  assert again.returncode == 5 and again.stdout == 'hello from 0\ndone\n'
  assert len(ran(cloud, 0)) == 1
