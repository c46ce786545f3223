"""What a compiled program does: arithmetic, memory traffic, messages; loops count as they turn.

Of one device. FLOPs are those of matrix products and convolutions, two for each multiply-add; a
kernel written by hand is an opaque call, and counts what it says it costs (`pl.CostEstimate`).
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxpref.plan.hlo import (
  HBM,
  HOST,
  Array,
  Computation,
  Instruction,
  Program,
  Step,
  numbers,
  read,
)
from jaxpref.plan.messages import KINDS, Collective, by_kind, collective

KERNELS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'mosaic_gpu')  # written by hand
# Neither read nor write memory themselves.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
  'partition-id', 'replica-id', 'after-all', 'copy-done', 'async-done', 'async-update',
  'optimization-barrier', 'iota', 'send-done', 'recv-done', *(f'{kind}-done' for kind in KINDS),
}  # fmt: skip
_IN_PLACE = ('AllocateBuffer', 'AsyncCollectiveDone', 'ConcatBitcast', 'AssumeGatherIndicesInBound')


class Costs(NamedTuple):
  """Of one run on one device.

  `kernels` are the opaque calls of hand-written kernels: name -> (times, FLOPs of all, None where
  one does not say). `unknown` names the loops whose turns had to be guessed.
  """

  flops: float
  hbm: float  # bytes read and written
  host: float  # bytes moved to and from the host's memory
  collectives: tuple[Collective, ...]
  kernels: dict[str, tuple[float, float | None]]
  unknown: tuple[str, ...]

  def by_kind(self) -> dict[str, tuple[float, float]]:
    """As `messages.by_kind`."""
    return by_kind(self.collectives)


def count(
  program: str | Program,
  unknown: float = 1,
  price: Callable[[Instruction], float | None] = lambda one: None,
  slice_size: int = 0,
) -> Costs:
  """The costs of a program, given as `compiled.as_text()` or read already.

  Args:
    unknown: turns of a loop that only running it would tell, such as a sampler's.
    price: the FLOPs of one call of a kernel, better than it says; None where they are not known.
    slice_size: devices of a slice, which follow one another; 0: there is one slice.
  """
  program = read(program) if isinstance(program, str) else program
  flops = hbm = host = 0.0
  messages, loops = [], []
  kernels: dict[str, tuple[float, float | None]] = {}
  for step in program.steps(unknown):
    one = step.instruction
    if one.opcode == 'while' and step.trips is None:
      loops.append(one.op_name or one.name)
    if one.opcode in ('dot', 'convolution', 'ragged-dot'):
      flops += step.times * product_flops(one, step.computation)
    elif one.opcode == 'custom-call' and one.target in KERNELS:
      said = price(one)
      said = _estimate(one) if said is None else said
      name = one.op_name.rpartition('/')[2] or one.name
      times, known = kernels.get(name, (0.0, 0.0))
      total = None if said is None or known is None else known + step.times * said
      kernels[name] = times + step.times, total
      flops += step.times * (said or 0)
    elif message := collective(step, slice_size):
      messages.append(message)
    if not step.fused:
      hbm += step.times * _traffic(program, step, HBM)
      host += step.times * _traffic(program, step, HOST)
  return Costs(flops, hbm, host, tuple(messages), kernels, tuple(loops))


def collectives(program: str | Program, unknown: float = 1) -> tuple[Collective, ...]:
  """The messages alone, in the program's order."""
  return count(program, unknown).collectives


def product_flops(one: Instruction, where: Computation) -> int:
  """Of a dot or a convolution: two for each multiply-add that touches no padding."""
  left, right = (where.instructions[name].arrays[0].shape for name in one.operands[:2])
  result = one.arrays[0].shape
  if one.opcode == 'convolution':
    return 2 * _convolution(one, left, right, result)
  contracted = [left[i] for i in numbers(one.attribute('lhs_contracting_dims'))]
  return 2 * math.prod(result) * math.prod(contracted)


def _convolution(
  one: Instruction, data: tuple[int, ...], kernel: tuple[int, ...], result: tuple[int, ...]
) -> int:
  """Multiply-adds. TPUs write matrix products as convolutions over windows that are mostly padding,
  of which only the places that meet data count."""
  left, right = one.attribute('dim_labels').split('_')
  right, out = right.split('->')
  total = data[left.index('b')] * kernel[right.index('i')] * kernel[right.index('o')]
  total //= int(one.attribute('batch_group_count') or 1)
  window = one.attribute('window')
  for axis in sorted(set(left) - {'b', 'f'}):
    number = int(axis)
    low = int(_window(window, 'pad', number, '0_0').split('_')[0])
    total *= _meetings(
      data[left.index(axis)],
      kernel[right.index(axis)],
      result[out.index(axis)],
      int(_window(window, 'stride', number, '1')),
      low,
      int(_window(window, 'lhs_dilate', number, '1')),
      int(_window(window, 'rhs_dilate', number, '1')),
    )
  return total


@functools.cache
def _meetings(
  data: int, kernel: int, result: int, stride: int, low: int, lhs: int, rhs: int
) -> int:
  """Pairs of an output and a kernel place that meet an element of the data along one axis."""
  return sum(
    0 <= place <= (data - 1) * lhs and place % lhs == 0
    for out in range(result)
    for place in range(out * stride - low, out * stride - low + (kernel - 1) * rhs + 1, rhs)
  )


def _window(text: str, name: str, axis: int, default: str) -> str:
  match = re.search(rf'\b{name}=(\S+)', text)
  return match[1].split('x')[axis] if match else default


def _estimate(one: Instruction) -> float | None:
  said = re.search(r'"cost_estimate": ?\{[^}]*"flops": ?"?(\d+)', one.rest)
  return float(said[1]) if said else None


def _traffic(program: Program, step: Step, space: int) -> int:
  """Bytes that an instruction outside of fusions reads and writes in a memory space.

  A slice reads what it cuts out, and an update in place writes what it puts in, alone and within
  fusions.
  """
  one, where = step.instruction, step.computation
  if one.opcode in _FREE or one.target in _IN_PLACE:
    return 0
  if one.opcode == 'fusion':
    (inner,) = one.called['calls']
    body = program.computations[inner]
    read_ = sum(_read(program, body, number, space) for number in body.parameters())
    return read_ + _written(program, body, body.root, space)
  if one.opcode == 'copy-start':  # gives (destination, source, context)
    return sum(x.bytes for x in one.arrays[:2] if x.space == space)
  operands = [where.instructions[name] for name in one.operands if name in where.instructions]
  if one.opcode == 'dynamic-slice':
    return sum(x.bytes for x in _in(one.arrays, space)) + sum(
      one.bytes for x in operands[0].arrays if x.space == space
    )
  if one.opcode == 'dynamic-update-slice':
    return 2 * operands[1].bytes if operands[0].arrays[0].space == space else 0
  arrays = [array for operand in operands for array in operand.arrays]
  return sum(x.bytes for x in _in([*arrays, *one.arrays], space))


def _in(arrays: Iterable[Array], space: int) -> list[Array]:
  return [array for array in arrays if array.space == space]


def _read(program: Program, body: Computation, number: int, space: int) -> int:
  """Bytes that a fusion reads of its parameter `number`."""
  name = body.parameters()[number]
  whole = sum(x.bytes for x in _in(body.instructions[name].arrays, space))
  return min(whole, _used(program, body, name, whole)) if whole else 0


def _used(program: Program, body: Computation, name: str, whole: int) -> int:
  total = 0
  for user in body.instructions.values():
    if name not in user.operands:
      continue
    if user.opcode == 'bitcast':
      total += _used(program, body, user.name, whole)
    elif user.opcode == 'dynamic-slice' and user.operands[0] == name:
      total += user.bytes
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      continue
    elif user.opcode == 'fusion':
      inner = program.computations[user.called['calls'][0]]
      places = [i for i, operand in enumerate(user.operands) if operand == name]
      parameters = inner.parameters()
      total += sum(_used(program, inner, parameters[i], whole) for i in places)
    else:
      return whole
  return total


def _written(program: Program, body: Computation, name: str, space: int) -> int:
  """Bytes that a fusion writes for the instruction `name`, its root or a part of it."""
  one = body.instructions[name]
  if one.opcode == 'tuple':
    return sum(_written(program, body, part, space) for part in one.operands)
  if one.opcode == 'bitcast':
    return _written(program, body, one.operands[0], space)
  if one.opcode == 'dynamic-update-slice' and one.arrays[0].space == space:
    return body.instructions[one.operands[1]].bytes
  if one.opcode == 'parameter':
    return 0
  return sum(x.bytes for x in _in(one.arrays, space))
