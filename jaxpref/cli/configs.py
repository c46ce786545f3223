"""Configs on a command line: `--config=dpo:tiny`, found by name, and `--config.key=value`, checked.

Names are those of the files in `configs/`: the repository's folder in a checkout,
`jaxpref/configs/` in a wheel. What follows the first colon is the argument of `get_config`.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

PACKAGE = Path(__file__).parent.parent
PREFIXES = ('--config.', '-config.')


def folder() -> Path:
  """Returns the folder of the shipped configs."""
  shipped = PACKAGE / 'configs'
  return shipped if shipped.is_dir() else PACKAGE.parent / 'configs'


def list_configs() -> list[str]:
  """Returns the names of the shipped configs, sorted."""
  return sorted(path.stem for path in folder().glob('*.py') if not path.stem.startswith('_'))


def resolve(spec: str) -> str:
  """Returns 'path/to/file.py' or 'path/to/file.py:arg' for a config's name or path.

  A name with a slash or ending in .py is a path. `configs/dpo.py`, as the documentation writes it,
  is the shipped file where no such file exists, so it works away from the repository too.

  Raises:
    ValueError: no such file or name; says which names are known and which is the nearest.
  """
  name, colon, arg = spec.partition(':')
  path = Path(name).expanduser()
  is_path = path.suffix == '.py' or len(path.parts) > 1
  if is_path and path.is_file():
    return f'{path}{colon}{arg}'
  known = list_configs()
  if path.stem in known and (not is_path or path.parts[:-1] == ('configs',)):
    return f'{folder() / path.stem}.py{colon}{arg}'
  what = f'no config file {name!r} here' if is_path else f'unknown config {name!r}'
  near = difflib.get_close_matches(path.stem, known, n=1)
  hint = f'; did you mean {near[0]!r}?' if near else '.'
  raise ValueError(
    f'--config={spec}: {what}{hint} Known configs: {", ".join(known) or "none"}; '
    'or give the path of a .py file with get_config(arg).'
  )


def parse(own: flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """Reads `argv` into `own` and its `--config`; returns what is no flag, without argv[0].

  Raises:
    ValueError: a config that is not found.
    flags.Error: an unknown flag, or a key that the config has not, with the nearest known.
  """
  arguments = list(_resolved(argv[1:]))
  chosen = [a for a in arguments if a.startswith(('--config=', '-config='))]
  keys = [a.partition('=')[0].split('config.', 1)[1] for a in arguments if a.startswith(PREFIXES)]
  if keys and not chosen:
    raise flags.Error(f'--config.{keys[0]} changes a config; give it first, as --config=<name>')
  if keys:
    first = flags.FlagValues()
    _define(first, chosen[-1:])
    first([argv[0], chosen[-1]])
    for key in keys:
      check_key(key, first.config)
  _define(own, arguments)
  return own([argv[0], *arguments])[1:]


def check_key(key: str, config: ConfigDict) -> None:
  """Raises flags.Error where `config` has no `key` ('data.train'), naming the nearest."""
  known = [name for name, _ in flat(config)]
  if key in known:
    return
  if group := [name for name in known if name.startswith(f'{key}.')]:
    raise flags.Error(f'--config.{key} is a group of keys: {", ".join(group)}')
  last = key.rpartition('.')[2]
  names = {name.rpartition('.')[2]: name for name in reversed(known)}
  near = difflib.get_close_matches(key, known, n=1)
  near = [names[last]] if last in names else near
  near = near or [names[n] for n in difflib.get_close_matches(last, names, n=1)]
  hint = f'did you mean --config.{near[0]}?' if near else f'known: {", ".join(known)}'
  raise flags.Error(f'--config.{key}: the config has no such key; {hint}')


def flat(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """('data.train', value) for every value of a config, as --config.data.train names it."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _define(own: flags.FlagValues, arguments: list[str]) -> None:
  what = 'config file or name'
  config_flags.DEFINE_config_file('config', None, what, flag_values=own, sys_argv=arguments)


def _resolved(arguments: Sequence[str]) -> Iterator[str]:
  """--config=dpo:tiny, or in two words, -> --config=path/to/configs/dpo.py:tiny; others stay."""
  rest = iter(arguments)
  for argument in rest:
    flag, equals, value = argument.partition('=')
    if flag in ('--config', '-config'):
      argument = f'{flag}={resolve(value if equals else next(rest, ""))}'
    yield argument
