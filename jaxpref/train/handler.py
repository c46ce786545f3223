"""Orbax's handler of pytrees, with a note of what should be in a checkpoint's folder.

TensorStore does not notice a flipped bit, nor always a short file.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

_NOTED = 'noted.json'


class Handler(ocp.PyTreeCheckpointHandler):
  """Orbax's own, which at last, before the folder gets its name, notes what should be in it.

  That is how large each file is, and the `checksums` of the leaves, which are set before a save.
  """

  checksums: Mapping[str, int] = {}

  def finalize(self, directory: Any) -> None:
    super().finalize(directory)
    sizes = _sizes(directory)
    sizes.pop('_CHECKPOINT_METADATA', None)  # Orbax adds the time of commit to it after this
    noted = {'sizes': sizes, 'checksums': dict(self.checksums)}
    (directory / _NOTED).write_text(json.dumps(noted))


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.PyTreeSave):
  """What makes Orbax save by `Handler`."""


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.PyTreeRestore):
  """What makes Orbax restore by `Handler`."""


def _sizes(folder: Any, prefix: str = '') -> dict[str, int]:
  """Bytes of every file below `folder`, by its path in it."""
  sizes: dict[str, int] = {}
  for file in folder.iterdir():
    name = f'{prefix}{file.name}'
    sizes |= _sizes(file, f'{name}/') if file.is_dir() else {name: file.stat().length}
  return sizes


def check_sizes(folder: Any) -> None:
  noted, found = json.loads((folder / _NOTED).read_text())['sizes'], _sizes(folder)
  for name, size in noted.items():
    if found.get(name) != size:
      what = f'has {found[name]} bytes instead of {size}' if name in found else 'is missing'
      raise OSError(f'{name} {what}')


def check_bits(folder: Any, sums: Mapping[str, int]) -> None:
  noted = json.loads((folder / _NOTED).read_text())['checksums']
  for name, found in sums.items():
    if noted[name] != found:
      raise OSError(f'{name} does not hold the numbers that were saved')
