"""Stand-ins for gcloud, xpk, sbatch and their kin, and for the jaxpref that they run.

They record how they were called, and run the remote scripts in a folder for each worker.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from jaxpref.cli.main import main
from jaxpref.launch import local

HOSTILE = '--config.model=a b\'c"d $(touch pwned) `touch pwned` ; touch pwned\n# \\ $HOME * {0} é'
COMMAND = ['--', 'train', '--config=dpo:tiny', HOSTILE]
VM = ['--on=tpu-vm', '--name=dpo1', '--project=p', '--zone=z', '--tpu=v5litepod-16']
VM += ['--runtime=v2', '--workdir=/mnt/b/run', '--poll=0']
GKE = ['--on=gke', '--name=dpo1', '--project=p', '--zone=z', '--cluster=c', '--tpu=v5litepod-16']
GKE += ['--workdir=/mnt/b/run']
ARGUMENTS = ['train', '--config=dpo:tiny', HOSTILE]

# All stand-ins are this script under their own names. `todo` holds, one JSON a line, what the next
# calls should do: ["words that the call has", exit code, what to say], and then as always.
STAND_IN = r"""
import json, os, pathlib, subprocess, sys
here = pathlib.Path(os.environ['RECORD'])
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (here / 'calls').open('a') as out:
  out.write(json.dumps([name, *words]) + '\n')
todo = [json.loads(line) for line in (here / 'todo').read_text().splitlines()]
for i, (has, code, says) in enumerate(todo):
  if all(word in [name, *words] for word in has.split()):
    (here / 'todo').write_text(''.join(json.dumps(t) + '\n' for j, t in enumerate(todo) if j != i))
    print(says, file=sys.stderr if code else sys.stdout)
    sys.exit(code)
option = dict(word.split('=', 1) for word in words if word.startswith('--') and '=' in word)
homes = {str(i): here / f'worker-{i}' for i in range(2)}
chosen = homes if option.get('--worker') == 'all' else {option.get('--worker'): ''}
exists = here / 'exists'
if 'queued-resources' in words:
  if 'create' in words:
    exists.touch()
  elif not exists.exists():
    sys.exit('ERROR: NOT_FOUND: no such resource')
  elif 'describe' in words:
    print(json.dumps({'state': {'state': 'ACTIVE'}}))
  else:
    exists.unlink()
elif name == 'gcloud' and 'describe' in words:
  print(json.dumps({'networkEndpoints': [{}, {}]}))
elif 'scp' in words:
  source, target = [word for word in words[4:] if not word.startswith('--')]
  for home in homes.values():
    home.mkdir(exist_ok=True)
    (home / target.split(':')[1]).write_bytes(pathlib.Path(source).read_bytes())
elif 'ssh' in words:
  for i in chosen:
    code = subprocess.run(['bash', '-c', option['--command']], cwd=homes[i]).returncode
    if code:
      sys.exit(code)
elif name == 'sbatch':
  (here / 'script').write_text(sys.stdin.read())
  print('17')
elif name == 'srun':
  os.execvp('jaxpref', words[words.index('jaxpref'):])
elif name == 'squeue':
  print('RUNNING')
"""
# What stands for jaxpref: it notes its arguments, and does what the test wrote into `runs`: for
# the nth start of a worker (its folder, or the number in --process) a snippet of Python.
JAXPREF = r"""
import json, os, pathlib, sys, time
here = pathlib.Path(os.environ['RECORD'])
words = sys.argv[1:]
folder = pathlib.Path.cwd().parent.name
given = [word for word in words if word.startswith('--process=')]
worker = given[0].split('=')[1] if given else os.environ.get('WORKER', folder.split('-')[-1])
notes = here / f'ran-{worker}'
number = len(notes.read_text().splitlines()) if notes.exists() else 0
with notes.open('a') as out:
  out.write(json.dumps([os.getpid(), *words]) + '\n')
print(f'hello from {worker}', flush=True)
exec(json.loads((here / 'runs').read_text()).get(f'{worker}.{number}', ''))
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """A folder of stand-ins on PATH, and what they record."""
  tools = tmp_path / 'bin'
  tools.mkdir()
  for name in ('gcloud', 'xpk', 'kubectl', 'sbatch', 'srun', 'squeue', 'scontrol', 'pip'):
    write(tools / name, STAND_IN)
  write(tools / 'jaxpref', JAXPREF)
  code = tmp_path / 'code'
  code.mkdir()
  (code / 'pyproject.toml').touch()
  monkeypatch.setenv('PATH', f'{tools}:{os.environ["PATH"]}')
  monkeypatch.setenv('RECORD', str(tmp_path))
  monkeypatch.setattr(local, 'PROGRAM', (str(tools / 'jaxpref'),))
  (tmp_path / 'todo').touch()
  (tmp_path / 'runs').write_text('{}')
  return tmp_path


def write(file, text):
  file.write_text(f'#!{sys.executable} -SE\n{text}')
  file.chmod(0o755)


def calls(cloud):
  path = cloud / 'calls'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def made(cloud, *words):
  """How often a tool was called with all of `words`."""
  return sum(set(words) <= set(call) for call in calls(cloud))


def ran(cloud, worker):
  """The argument lists that a worker's jaxpref was started with."""
  return [json.loads(line)[1:] for line in (cloud / f'ran-{worker}').read_text().splitlines()]


def todo(cloud, *items):
  (cloud / 'todo').write_text(''.join(json.dumps(item) + '\n' for item in items))


def runs(cloud, **snippets):
  (cloud / 'runs').write_text(
    json.dumps({name[1:].replace('_', '.'): text for name, text in snippets.items()})
  )


def once_started(worker, times, then):
  """A snippet for `runs` that waits until `worker` was started `times` times."""
  notes = f"here / 'ran-{worker}'"
  wait = f'while not ({notes}).exists() or len(({notes}).read_text().splitlines()) < {times}:'
  return f'{wait}\n  time.sleep(0.01)\n{then}'


def vm(cloud, *more):
  """Launches on TPU VMs whose installation is a link to the stand-in."""
  install = f'mkdir -p .venv/bin && ln -s {cloud}/bin/jaxpref .venv/bin/jaxpref'
  return main(['launch', *VM, f'--install={install}', f'--code={cloud}/code', *more, *COMMAND])


def state(name):
  return ['queued-resources describe', 0, json.dumps({'state': {'state': name}})]


def alive(pid):
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False
