"""Configs on a command line: `--config=dpo:tiny`, found by name, and `--config.key=value`, checked.

Names are those of the files in `configs/`: the repository's folder in a checkout,
`jaxpref/configs/` in a wheel. What follows the first colon is the argument of `get_config`.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

PACKAGE = Path(__file__).parent.parent
_KEY = re.compile(r'--?(?:no)?config\.([^=]+)')


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


def load(spec: str) -> ConfigDict:
  """The config called `spec`: what `get_config`, or `get_config(arg)`, in its file returns.

  Raises:
    ValueError: no such file, or one without such a function; and whatever that function raises.
  """
  path, _, arg = resolve(spec).partition(':')
  found = importlib.util.spec_from_file_location(f'config_{Path(path).stem}', path)
  assert found is not None and found.loader is not None  # it ends in .py
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{path} has no function get_config, which should return the config')
  config = module.get_config(arg) if arg else module.get_config()
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f'get_config in {path} should return an ml_collections.ConfigDict, got '
      f'{type(config).__name__}'
    )
  return config


def parse(own: flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """Reads `argv` into `own`, with `own.config` None or what --config names, changed by
  --config.key=value; returns what is no flag, without argv[0].

  Raises:
    ValueError: a config that is not found.
    flags.Error: an unknown flag, or a key that the config has not, with the nearest known.
  """
  spec, arguments = split(argv[1:])
  keys = [match[1] for match in map(_KEY.match, arguments) if match]
  if spec is not None:
    config = load(spec)
    for key in keys:
      check_key(key, config)
    config_flags.DEFINE_config_dict('config', config, flag_values=own, sys_argv=arguments)
  elif keys:
    raise flags.Error(f'--config.{keys[0]} changes a config; say which, as --config=dpo:tiny')
  else:
    flags.DEFINE_string('config', None, 'name or file of a config', flag_values=own)
  return own([argv[0], *arguments])[1:]


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
  """(the config's name or None, all else) of a command line with --config=name or --config name."""
  spec, others = None, []
  rest = iter(arguments)
  for argument in rest:
    flag, equals, value = argument.partition('=')
    if flag in ('--config', '-config'):
      spec = value if equals else next(rest, '')
    else:
      others.append(argument)
  return spec, others


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
