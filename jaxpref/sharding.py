"""The mesh, and where every array lives on it.

Axes are `(data, fsdp, context, tensor)`; an unused axis has size 1. Data groups G go over data x
fsdp, so packing and scattering never leave a shard; `context` divides a group's rows further.
Parameters get their PartitionSpecs from path rules: the first rule whose pattern matches wins, and
a path that none matches is an error.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref.typing import Params

AXES = ('data', 'fsdp', 'context', 'tensor')
GROUPS = ('data', 'fsdp')  # the axes that G is divided over

Rules = Sequence[tuple[str, P]]

# Layers are stacked on axis 0. Columns of what fans out and rows of what fans in go over `tensor`,
# so a sub-layer needs one reduction; the other matrix axis is kept in shards over `fsdp` and
# gathered at use. Adapters lie as the side that they share with what they adapt.
PARAMS: Rules = (
  (r'(embed|positions)/w$', P('tensor', 'fsdp')),
  (r'head/w$', P('fsdp', 'tensor')),
  (r'experts/(gate|up)/w(/base)?$', P(None, None, 'fsdp', 'tensor')),
  (r'experts/(gate|up)/w/lora_a$', P(None, None, 'fsdp')),
  (r'experts/(gate|up)/w/lora_b$', P(None, None, None, 'tensor')),
  (r'experts/down/w(/base)?$', P(None, None, 'tensor', 'fsdp')),
  (r'experts/down/w/lora_a$', P(None, None, 'tensor')),
  (r'experts/down/w/lora_b$', P(None, None, None, 'fsdp')),
  (r'router/w$', P(None, 'fsdp')),
  (r'score/w$', P('fsdp')),
  (r'(q|k|v|gate|up)/w(/base)?$', P(None, 'fsdp', 'tensor')),
  (r'(q|k|v|gate|up)/w/lora_a$', P(None, 'fsdp')),
  (r'(q|k|v|gate|up)/w/lora_b$', P(None, None, 'tensor')),
  (r'(out|down)/w(/base)?$', P(None, 'tensor', 'fsdp')),
  (r'(out|down)/w/lora_a$', P(None, 'tensor')),
  (r'(out|down)/w/lora_b$', P(None, None, 'fsdp')),
  (r'(q|k|v|gate|up)/b$', P(None, 'tensor')),
  (r'(/b|scale|bias)$', P()),
  (r'^(count|step|skipped)$|/count$', P()),
)


def make_mesh(
  sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over `devices` (default: all); `sizes` as in `axis_sizes`.

  Slices follow one another along `data`, as in jax's `create_hybrid_device_mesh`.

  Raises:
    ValueError: as for `axis_sizes`, or slices of several sizes.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = sizes or {'data': -1}
  slices = _slices(devices, sizes.get('slices', 1))
  shape = tuple(axis_sizes(sizes, len(devices)).values())
  array = np.array([device for one in slices for device in one]).reshape(shape)
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """The sizes of all `AXES` over so many devices.

  Args:
    sizes: by axis, 1 where none is given; one may be -1 (what is left). `sizes['slices']` counts
      groups of devices that slow links join (slices of TPUs): the others are the sizes within one,
      and `data` grows by that factor. So gradients alone cross between slices.

  Raises:
    ValueError: unknown axis, or sizes that do not multiply to the number of devices.
  """
  given = dict(sizes)
  count = given.pop('slices', 1)
  unknown = set(given) - set(AXES)
  if unknown:
    raise ValueError(f'unknown mesh axes {sorted(unknown)}; the axes are {AXES}')
  for axis, size in given.items():
    if size < 1 and size != -1:
      raise ValueError(f'mesh.{axis}={size}: expected 1 or more, or -1 for all that is left')
  if count < 1 or devices % count:
    raise ValueError(f'mesh.slices={count} does not divide {devices} devices')
  own = devices // count
  shape = [given.get(axis, 1) for axis in AXES]
  rest = int(np.prod([s for s in shape if s != -1]))
  if shape.count(-1) > 1 or (-1 in shape and own % rest):
    raise ValueError(f'mesh {given}: at most one -1, and {rest} must divide {own} devices')
  shape = [own // rest if s == -1 else s for s in shape]
  if int(np.prod(shape)) != own:
    raise ValueError(
      f'mesh {dict(zip(AXES, shape, strict=True))} needs {np.prod(shape)} devices; there are {own}'
      + (f' in each of {count} slices' if count > 1 else '')
    )
  return dict(zip(AXES, (count * shape[0], *shape[1:]), strict=True))


def _slices(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
  """The devices of each of `count` slices; where they do not tell, those that follow another."""
  if count == 1:
    return [list(devices)]
  found: dict[int, list[jax.Device]] = {}
  for device in devices:
    found.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  slices = [found[index] for index in sorted(found)]
  if len(slices) == 1 and count > 0 and len(devices) % count == 0:
    own = len(devices) // count
    slices = [list(devices[i : i + own]) for i in range(0, len(devices), own)]
  if len(slices) != count or len({len(one) for one in slices}) > 1:
    raise ValueError(
      f'mesh.slices={count}: there are {len(devices)} devices in slices of '
      f'{[len(one) for one in slices]}; give the number of equal slices'
    )
  return slices


def groups(mesh: Mesh) -> int:
  """G: the number of data shards."""
  return int(np.prod([mesh.shape[axis] for axis in GROUPS]))


def path_of(key_path: tuple) -> str:
  """'layers/attention/q/w' for a pytree key path."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in key_path
  )


def match(rules: Sequence[tuple[str, object]], path: str) -> object:
  """The value of the first rule whose pattern is found in `path`."""
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  raise ValueError(f'no rule matches parameter {path!r}; patterns: {[p for p, _ in rules]}')


def by_path(rules: Sequence[tuple[str, object]], tree: Params) -> Params:
  """A tree like `tree` of the matching rules' values."""
  return jax.tree_util.tree_map_with_path(lambda kp, _: match(rules, path_of(kp)), tree)


def params_sharding(mesh: Mesh, params: Params, rules: Rules = PARAMS) -> Params:
  """NamedShardings for parameters, or for anything whose paths end like theirs (Adam's moments).

  An axis that does not divide a dimension is left out there: small tensors stay whole.
  """

  def one(key_path: tuple, leaf: jax.Array) -> NamedSharding:
    shape = np.shape(leaf)
    if not shape:
      return NamedSharding(mesh, P())
    spec = match(rules, path_of(key_path))
    assert isinstance(spec, P)
    fits = []
    for size, axes in zip(shape, tuple(spec) + (None,) * len(shape), strict=False):
      names = (axes,) if isinstance(axes, str) else axes or ()
      fits.append(
        axes if names and size % int(np.prod([mesh.shape[n] for n in names])) == 0 else None
      )
    return NamedSharding(mesh, P(*fits))

  return jax.tree_util.tree_map_with_path(one, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """For a `Batch`: arrays [M, G, ...], G over data x fsdp.

  Rows are whole on all devices of `context`: the masks of each need the ids of all keys, a few
  integers a token. What is computed of them is divided (models/context.py).
  """
  return NamedSharding(mesh, P(None, GROUPS))
