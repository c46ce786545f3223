"""Which devices do what in online training.

Policy and critic train in one step, so they share the mesh that `config.mesh` describes. The others
may have devices of their own, the last of the machine's: first the reference's, then those of the
reward models, then those that sample. Who has none of its own works on the training mesh. Between
them go host arrays (samples, log-probs, scores), and to the sampler the policy's parameters, which
are resharded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import sharding

KEYS = {'reference': 'reference_devices', 'rewards': 'reward_devices', 'sampler': 'devices'}
# The sampler's devices hold all parameters each, the others' shards of them.
AXES = {'reference': {'fsdp': -1}, 'rewards': {'fsdp': -1}, 'sampler': {'data': -1}}


class Roles(NamedTuple):
  """The mesh of each role."""

  training: Mesh
  reference: Mesh
  rewards: Mesh
  sampler: Mesh

  def __str__(self) -> str:
    apart = {name: mesh for name, mesh in self._asdict().items() if mesh is not self.training}
    counts = {'training': self.training, **apart}
    return ', '.join(f'{name} {mesh.size}' for name, mesh in counts.items())


def counts(config: ConfigDict) -> dict[str, int]:
  """How many devices of its own each role has; without rewards there are no roles."""
  return {role: config.rollout[key] if config.rewards else 0 for role, key in KEYS.items()}


def trainers(config: ConfigDict, devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
  """The devices that are left to train.

  Raises:
    ValueError: there are none, or several processes, as devices of a role belong to one.
  """
  asked = counts(config)
  own = sum(asked.values())
  said = ', '.join(f'rollout.{key}={asked[role]}' for role, key in KEYS.items() if asked[role])
  if min(asked.values()) < 0 or own >= len(devices):
    raise ValueError(f'{said} of {len(devices)} devices: leave at least one to train')
  if own and jax.process_count() > 1:
    raise ValueError(
      f'{said} with {jax.process_count()} processes: devices of a role must belong to the one '
      'process; set it to 0'
    )
  return devices[: len(devices) - own]


def divide(
  config: ConfigDict, training: Mesh, devices: Sequence[jax.Device] | None = None
) -> Roles:
  """Every role's mesh; `training` is of those `devices` (default: all) that `trainers` left."""
  devices = jax.devices() if devices is None else devices
  asked, meshes = counts(config), {}
  rest = devices[len(devices) - sum(asked.values()) :]
  for role, count in asked.items():
    own, rest = rest[:count], rest[count:]
    meshes[role] = sharding.make_mesh(AXES[role], own) if count else training
  return Roles(training, **meshes)
