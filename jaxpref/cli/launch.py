r"""Runs a jaxpref command on machines: Cloud TPU VMs, a GKE or SLURM cluster, or this one.

  jaxpref launch --on=tpu-vm --name=dpo1 --project=mine --zone=us-west4-a --tpu=v5litepod-64 \
    --runtime=v2-alpha-tpuv5-lite --spot --workdir=/mnt/bucket/dpo1 -- train --config=dpo:8b
  jaxpref launch --on=gke --name=dpo1 --project=mine --zone=us-west4-a --cluster=pods \
    --tpu=v5litepod-64 --workdir=/mnt/bucket/dpo1 -- train --config=dpo:8b
  jaxpref launch --on=slurm --name=dpo1 --nodes=4 --tasks=8 --gpus=8 --workdir=/scratch/dpo1 \
    -- train --config=dpo:8b
  jaxpref launch --on=local --processes=2 --workdir=/tmp/dpo -- train --config=dpo:tiny

What follows -- runs in every process, which join one another. --dry_run prints every command and
runs none. A preempted run (exit code 75, or machines that are gone) is started again and resumes
from its workdir. If a worker fails, its name and last lines are shown, the others are stopped, and
its exit code is this command's. TPU VMs are deleted in the end unless --keep; on SLURM the job goes
on by itself. gcloud, xpk or sbatch must be installed and logged in. Paths are those of
the machines; a config of your own, say mine.py, is named as from the checkout, where this is run.
"""

import dataclasses
import signal
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxpref import launch
from jaxpref.cli import configs, train
from jaxpref.launch.job import Job
from jaxpref.storage import STORES


@dataclasses.dataclass(frozen=True)
class Place:
  """A kind of place: its module, how its machines are described, and what must be given.

  Only machines that share no disk with this one take `code`; their own disks go with them.
  """

  module: Any
  target: type
  needed: tuple[str, ...] = ()
  job: tuple[str, ...] = ()  # flags that describe the job and not the machines


REMOTE = ('name', 'code', 'option')
PLACES = {
  'tpu-vm': Place(
    launch.tpu_vm, launch.TpuVm, ('name', 'project', 'zone', 'tpu', 'runtime'), REMOTE
  ),
  'gke': Place(launch.gke, launch.Gke, ('name', 'project', 'zone', 'cluster', 'tpu'), REMOTE),
  'slurm': Place(launch.slurm, launch.Slurm, ('name',), ('name', 'option')),
  'local': Place(launch.local, launch.Local),
}


def define_flags() -> flags.FlagValues:
  """This command's flags; those of one place only are None unless given."""
  own = flags.FlagValues()
  text: dict[str, Any] = {'flag_values': own}
  flags.DEFINE_enum('on', None, list(PLACES), 'where', **text)
  flags.DEFINE_string('name', None, 'of the machines or the job', **text)
  flags.DEFINE_string(
    'workdir', None, 'folder of the run, or gs://..., given to the command', **text
  )
  flags.DEFINE_boolean('dry_run', False, 'print every command and run none', **text)
  flags.DEFINE_alias('dry-run', 'dry_run', flag_values=own)
  flags.DEFINE_integer('requeues', 10, 'starts after a preemption at most', lower_bound=0, **text)
  flags.DEFINE_multi_string(
    'option', None, 'further option of gcloud ... create, xpk workload create or sbatch', **text
  )
  flags.DEFINE_string('code', None, 'tpu-vm, gke: checkout that is copied (this one)', **text)
  flags.DEFINE_string('project', None, 'tpu-vm, gke: project of Google Cloud', **text)
  flags.DEFINE_string('zone', None, 'tpu-vm, gke: zone of Google Cloud', **text)
  flags.DEFINE_string('tpu', None, "tpu-vm, gke: kind and size, as 'v5litepod-64'", **text)
  flags.DEFINE_integer('slices', None, 'tpu-vm, gke: how many of them (1)', lower_bound=1, **text)
  flags.DEFINE_boolean('spot', None, 'tpu-vm, gke: cheaper, and may be preempted', **text)
  flags.DEFINE_boolean('keep', None, 'tpu-vm, gke: delete nothing', **text)
  flags.DEFINE_string('runtime', None, "tpu-vm: as 'v2-alpha-tpuv5-lite'", **text)
  flags.DEFINE_string('install', None, 'tpu-vm: shell command that makes .venv/bin/jaxpref', **text)
  flags.DEFINE_float(
    'poll', None, 'tpu-vm: seconds between looks at the queue (30)', lower_bound=0.0, **text
  )
  flags.DEFINE_string('cluster', None, 'gke: name of the cluster', **text)
  flags.DEFINE_string('image', None, 'gke: docker image that has jaxpref', **text)
  flags.DEFINE_string('base', None, 'gke: or image that the code is added to', **text)
  flags.DEFINE_integer('nodes', None, 'slurm: how many (1)', lower_bound=1, **text)
  flags.DEFINE_integer('tasks', None, 'slurm: processes a node (1)', lower_bound=1, **text)
  flags.DEFINE_string('partition', None, 'slurm: partition', **text)
  flags.DEFINE_string('account', None, 'slurm: account', **text)
  flags.DEFINE_string('gpus', None, "slurm: for a node, as '8'", **text)
  flags.DEFINE_string('time', None, "slurm: limit, as '24:00:00'", **text)
  flags.DEFINE_integer('processes', None, 'local: how many (1)', lower_bound=1, **text)
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', **text)
  return own


def main(argv: Sequence[str]) -> int:
  """Runs the command; argv[0] is its name. Mistakes raise ValueError, OSError or flags.Error."""
  own = define_flags()
  words = list(argv)
  cut = words.index('--') if '--' in words else len(words)
  extra, command = own(words[:cut])[1:], words[cut + 1 :]
  if own.help:
    print(f'{__doc__}\n{own.get_help()}')
    return 0
  if extra:
    raise flags.Error(f'unexpected {extra[0]!r}; the command to run comes after --')
  if own.on is None:
    raise flags.Error(f'--on is missing: one of {", ".join(PLACES)}')
  place = PLACES[own.on]
  job, target = read_job(own, place, command), read_target(own, place)
  if own.dry_run:
    for what, text in place.module.steps(job, target):
      print(f'# {what}\n{text}\n')
    return 0
  # As Ctrl-C: the workers are stopped, the machines deleted.
  before = {n: signal.signal(n, _interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
  try:
    return place.module.launch(job, target)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def read_target(own: flags.FlagValues, place: Place) -> Any:
  """What the flags say of the machines.

  Raises:
    flags.Error: a flag that is missing, or one of another place.
  """
  mine = fields(place)
  for name in sorted({name for other in PLACES.values() for name in fields(other)} - set(mine)):
    if own[name].value is not None:
      takes = ', '.join(f'--{field}' for field in mine)
      raise flags.Error(f'--{name} says nothing to --on={own.on}, which takes {takes}')
  for name in place.needed:
    if not own[name].value:
      raise flags.Error(f'--{name} is missing, which --on={own.on} needs')
  given = {name: own[name].value for name in mine if name not in place.job}
  return place.target(**{name: value for name, value in given.items() if value is not None})


def read_job(own: flags.FlagValues, place: Place, command: Sequence[str]) -> Job:
  """What is to run, its flags and config checked here, before anything costs money."""
  workdir = own.workdir or ''
  if any(word.startswith(('--workdir', '-workdir')) for word in command):
    raise flags.Error('give --workdir before the --; the command gets it from there')
  if not workdir:
    raise flags.Error('--workdir is missing: the folder that a preempted run resumes from')
  if 'code' in place.job and not workdir.startswith(('/', *STORES)):
    raise ValueError(
      f'--workdir={workdir} must be what all machines see and what outlives them: gs://bucket/run, '
      'or a folder of a mounted disk or bucket, such as /mnt/bucket/run'
    )
  job = Job(
    name=own.name or 'local',
    command=(*command, f'--workdir={workdir}'),
    code=Path(own.code or configs.PACKAGE.parent),
    requeues=own.requeues,
    options=tuple(own.option or ()),
  )
  mine = train.define_flags()
  if stray := configs.parse(mine, job.command):
    raise flags.Error(f'unexpected {stray[0]!r} after --; values are given as --config.key=value')
  if mine.config is None:
    raise flags.Error('--config is missing after --; try -- train --config=dpo:8b')
  return job


def fields(place: Place) -> list[str]:
  """The flags that this place takes and others may not."""
  return [*place.job, *(field.name for field in dataclasses.fields(place.target))]


def _interrupt(number: int, frame: types.FrameType | None) -> None:
  raise KeyboardInterrupt
