"""Messages between devices: what a compiled program sends, within a slice and between slices."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxpref.plan.hlo import Array, Instruction, Step, numbers

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # as [2,4]T(1,0)
BETWEEN = ' between slices'  # marks the kind of a message that leaves its slice


class Collective(NamedTuple):
  """A message between devices, or several alike.

  Its size is that of the whole array, on one device: what all-gather gives, what all-reduce and
  reduce-scatter take.
  """

  kind: str
  arrays: tuple[Array, ...]  # what it gives; several may travel as one message
  size: float  # bytes of one
  group: int  # devices that take part together
  times: float
  op_name: str = ''
  slices: int = 1  # that these devices belong to

  @property
  def bytes(self) -> float:
    return self.size * self.times

  @property
  def wire(self) -> float:
    """Bytes that a device sends within its slice, at least: on a ring, all but its own share."""
    if self.kind == 'collective-permute':
      return self.bytes if self.slices == 1 else 0.0
    return self._sent(self.bytes, self.group / self.slices)

  @property
  def far(self) -> float:
    """Bytes that it sends to other slices, at least: the devices of one share the work."""
    if self.kind == 'collective-permute':
      return self.bytes - self.wire
    return self._sent(self.bytes * self.slices / self.group, self.slices)

  def _sent(self, size: float, among: float) -> float:
    return size * (among - 1) / among * (2 if self.kind == 'all-reduce' else 1)


def by_kind(messages: Iterable[Collective]) -> dict[str, tuple[float, float]]:
  """kind -> (count, bytes), as in `Collective`; those between slices apart."""
  found: dict[str, tuple[float, float]] = {}
  for one in messages:
    kind = one.kind + BETWEEN * (one.slices > 1)
    count, total = found.get(kind, (0, 0))
    found[kind] = count + one.times, total + one.bytes
  return found


def collective(step: Step, slice_size: int = 0) -> Collective | None:
  """The message that a step sends; None for all else, and for the later parts of one begun before.

  On a TPU a message is often laid over several fusions: each repeats the instruction, and only the
  first starts it. And what an all-reduce gives may be cut up at once, in one fusion: that is a
  reduce-scatter.
  """
  one, where = step.instruction, step.computation
  if one.opcode == 'send' and 'xla_megascale_runtime' in one.rest:
    return _far(step)
  kind = one.opcode.removesuffix('-start')
  if kind not in KINDS:
    return None
  inside = where.instructions.values()
  if step.fused and 'chain_id=' in one.rest:
    if not any(other.target == 'AsyncCollectiveStart' for other in inside):
      return None
  if step.fused and kind == 'all-reduce':
    parts = {x.name for x in inside if x.opcode == 'get-tuple-element' and one.name in x.operands}
    users = [x for x in inside if ({one.name} | parts) & {*x.operands} and x.name not in parts]
    if users and all(user.opcode == 'dynamic-slice' for user in users):
      kind = 'reduce-scatter'
  given = [array for name in one.operands for array in where.instructions[name].arrays]
  taken, made = (sum(array.bytes for array in part) for part in (given, one.arrays))
  if one.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute'):
    made -= taken  # its tuple holds the operands too
  size = taken if kind == 'reduce-scatter' else made
  group, slices = _reach(one, slice_size)
  return Collective(kind, one.arrays, size, group, step.times, one.op_name, slices)


def _far(step: Step) -> Collective:
  """What a TPU hands to its host, which exchanges it with its likes in other slices."""
  one = step.instruction
  said = lambda name: re.search(rf'_xla_megascale_{name}="(.*?)"', one.rest)  # noqa: E731
  transfer, target = said('transfer_type'), said('target')
  kind = transfer[1].lower().replace('_', '-') if transfer else 'collective-permute'
  slices = _counted(target[1]) if target else 2
  size = one.arrays[0].bytes * (slices if kind == 'all-gather' else 1)  # of which it gives a part
  return Collective(kind, one.arrays[:1], size, slices, step.times, one.op_name, slices)


def _counted(target: str) -> int:
  """How many slices '{1,3:4}x{0:3}' names: 3, here."""
  parts = [numbers(part.replace(':', ',')) for part in target.split('}')[0].strip('{').split(',')]
  return sum(part[-1] - part[0] + 1 for part in parts)


def _reach(one: Instruction, slice_size: int) -> tuple[int, int]:
  """(devices that a collective joins, slices that these belong to); of a permutation its pairs."""
  home = lambda device: device // slice_size if slice_size else 0  # noqa: E731
  if pairs := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', one.rest):
    ends = [numbers(pair) for pair in re.findall(r'\{(.*?)\}', pairs[1])]
    return len(ends) or 1, 1 + any(home(start) != home(end) for start, end in ends)
  group = members(one)
  return len(group), len(set(map(home, group)))


def members(one: Instruction) -> tuple[int, ...]:
  """The devices of a collective's first group; the others are like it."""
  if plain := re.search(r'replica_groups=\{\{([\d,]*)\}', one.rest):
    return tuple(numbers(plain[1]))
  if iota := re.search(rf'replica_groups=\[\d+,(\d+)\]<={_IOTA}', one.rest):
    return tuple(_iota(iota[2], iota[3])[: int(iota[1])])
  mesh = rf'replica_groups=mesh\[(.*?)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))?\s*\{{(.*?)\}}'
  if named := re.search(mesh, one.rest):
    places = _along(named[1], named[5])
    if not (named[2] or named[4]):
      return places
    devices = _iota(named[2], named[3]) if named[2] else numbers(named[4])
    return tuple(devices[place] for place in places)
  return (0,)


def _iota(sizes: str, order: str | None) -> list[int]:
  """0, 1, ... laid out in an array of these sizes, whose axes are then put in this order."""
  shape = numbers(sizes)
  axes = numbers(order) if order else range(len(shape))
  return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1).tolist()


def _along(mesh: str, axes: str) -> tuple[int, ...]:
  """The first group of a mesh "'x'=4,'y'=4" along "'x','y':(1)2", which is x and halves of y."""
  joined = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
  found, stride = np.zeros(1, int), {}
  after = 1
  for name, size in reversed(re.findall(r"'([^']+)'=(\d+)", mesh)):
    stride[name] = (after, int(size))
    after *= int(size)
  for name, before, part in joined:
    step, size = stride[name]
    if part:
      step, size = step * (size // (int(before) * int(part))), int(part)
    found = (found[:, None] + step * np.arange(size)).reshape(-1)
  return tuple(found.tolist())
