"""An experiment's settings, a dataclass with defaults, from the command line and back."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TypeVar

Settings = TypeVar('Settings')


def parse(
  kind: type[Settings], about: str | None, out: str, argv: Sequence[str] | None = None
) -> tuple[Settings, pathlib.Path]:
  """(settings, folder): `--<field>` for each field of `kind`, `--out` for the folder."""
  parser = argparse.ArgumentParser(
    description=about, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(out))
  for field in dataclasses.fields(kind):  # type: ignore[arg-type]
    parser.add_argument(f'--{field.name}', type=type(field.default), default=field.default)
  given = vars(parser.parse_args(argv))
  folder = given.pop('out')
  return kind(**given), folder


def changed(settings: object) -> list[str]:
  """The options that differ from the defaults."""
  defaults = vars(type(settings)())
  return [
    f'--{name}={value!r}' for name, value in vars(settings).items() if value != defaults[name]
  ]
