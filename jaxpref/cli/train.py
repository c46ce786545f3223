"""Trains a model: `jaxpref train --config=dpo:tiny --workdir=runs/dpo [--config.key=value ...]`.

  jaxpref train --config=sft:tiny --workdir=/tmp/sft
  jaxpref train --config=configs/dpo.py --config.model=/models/qwen3-0.6b \
    --config.data.train=jsonl:pairs.jsonl.gz --config.batch.size=32 --workdir=runs/dpo

The same command again resumes. The workdir gets config.json, metrics.jsonl, TensorBoard files and
checkpoints; `jaxpref generate`, `eval` and `export` read it.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from jaxpref.cli import configs


def define_flags() -> flags.FlagValues:
  """This command's flags, in a set of their own: commands may share names."""
  own = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, 'config file or name', flag_values=own)
  flags.DEFINE_string('workdir', None, 'folder of the run', flag_values=own)
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', flag_values=own)
  return own


def parse(argv: Sequence[str]) -> tuple:
  """(config, workdir) of a command line, configs found by name; None where --help was asked for."""
  own = define_flags()
  extra = own([argv[0], *map(resolved, argv[1:])])[1:]
  if own.help:
    print(f'{__doc__}\nconfigs: {", ".join(configs.list_configs())}')
    return None, None
  if extra:
    raise flags.Error(f'unexpected {extra[0]!r}; values are given as --config.key=value')
  if own.config is None or own.workdir is None:
    missing = '--config' if own.config is None else '--workdir'
    raise flags.Error(f'{missing} is missing; try --config=dpo:tiny --workdir=/tmp/dpo')
  return own.config, own.workdir


def resolved(argument: str) -> str:
  """--config=dpo:tiny -> --config=path/to/configs/dpo.py:tiny; other arguments stay."""
  flag, equals, value = argument.partition('=')
  if flag in ('--config', '-config') and equals:
    return f'{flag}={configs.resolve(value)}'
  return argument


def main(argv: Sequence[str]) -> int:
  config, workdir = parse(argv)
  if config is not None:
    from jaxpref import run  # after the flags: --help and typos should not wait for jax

    run.train(config, workdir)
  return 0
