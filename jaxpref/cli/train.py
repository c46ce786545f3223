r"""Trains a model: `jaxpref train --config=dpo:tiny --workdir=runs/dpo [--config.key=value ...]`.

  jaxpref train --config=sft:tiny --workdir=/tmp/sft
  jaxpref train --config=configs/dpo.py --config.model=/models/qwen3-0.6b \
    --config.data.train=jsonl:pairs.jsonl.gz --config.batch.size=32 --workdir=runs/dpo

The same command again resumes. SIGTERM, which cluster schedulers send before they take a machine
away, makes a run save after the step it is in and exit with 75. The workdir gets config.json,
metrics.jsonl, TensorBoard files and checkpoints; `jaxpref generate`, `eval` and `export` read it.
At gs://bucket/run (`pip install jaxpref[gcs]`) metrics appear with each checkpoint.
"""

import sys
from collections.abc import Sequence

from absl import flags

from jaxpref import config as config_keys
from jaxpref.cli import configs
from jaxpref.cli.processes import define_process_flags, join


def define_flags() -> flags.FlagValues:
  """This command's flags beside --config, in a set of their own: commands may share names."""
  own = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'folder of the run, or gs://bucket/run', flag_values=own)
  define_process_flags(own)
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', flag_values=own)
  return own


def main(argv: Sequence[str]) -> int:
  """Runs the command; argv[0] is its name. Mistakes raise ValueError, OSError or flags.Error."""
  own = define_flags()
  extra = configs.parse(own, argv)
  if own.help:
    print(f'{__doc__}\nconfigs: {", ".join(configs.list_configs())}')
    chosen = own.config if own.config is not None else config_keys.default()
    print('\nkeys (`--config=<name> --help` shows that config):')
    for key, value in configs.flat(chosen):
      print(f'  --config.{key}={value!r}')
    return 0
  if extra:
    raise flags.Error(f'unexpected {extra[0]!r}; values are given as --config.key=value')
  for name in ('config', 'workdir'):
    if own[name].value is None:
      raise flags.Error(f'--{name} is missing; try --config=dpo:tiny --workdir=/tmp/dpo')

  from jaxpref import run  # after the flags: --help and typos should not wait for jax
  from jaxpref.train import preemption

  join(own)
  try:
    run.train(own.config, own.workdir)
  except preemption.Preempted as stopped:
    print(stopped, file=sys.stderr)
    return preemption.EXIT_CODE
  return 0
