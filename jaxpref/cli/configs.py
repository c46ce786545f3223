"""Finds the config file that `--config` names: `dpo:tiny`, `configs/dpo.py:tiny` or any path.

Names are those of the files in `configs/`: the repository's folder in a checkout,
`jaxpref/configs/` in a wheel. What follows the first colon is the argument of `get_config`.
"""

import difflib
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


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
