"""Reads a compiled program's text: computations, their instructions, and how often loops turn.

`compiled.as_text()` of any backend goes in. The compiler's own `cost_analysis` counts the body of a
loop once, and a model whose layers are scanned is nearly all loop; so what is counted is up to
`costs`, on the program as it stands here.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32, 'u32': 32,
  's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128,
}  # fmt: skip
HBM, FAST, HOST = 0, 1, 5  # memory spaces, as TPU layouts name them: S(1) is on the chip's cores

_ARRAY = re.compile(r'([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?')
_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) ?(\(.*)?\{$')
_END = re.compile(r'\}(, execution_thread=.*)?$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
_NAME = re.compile(r'([\w.\-]+)$')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition|branch_computations|\w+_computation)=')


class Array(NamedTuple):
  """An array's type; `space` is its memory: HBM, FAST or HOST."""

  dtype: str
  shape: tuple[int, ...]
  space: int = HBM

  @property
  def bytes(self) -> int:
    bits = BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 0)  # 0: tokens
    return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
  """`arrays` are what it gives, several of a tuple; `rest` is the text after the operands."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  inner: str  # the text between the parentheses: a constant's value, a parameter's number
  rest: str

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.arrays)

  @property
  def op_name(self) -> str:
    """Where it comes from, as jax names it."""
    return _attribute(self.rest, r'op_name="([^"]*)"')

  @property
  def target(self) -> str:
    """What a custom call calls; '' for all else."""
    name = self.attribute('custom_call_target') if self.opcode == 'custom-call' else ''
    return name.strip('"')

  def attribute(self, name: str) -> str:
    """The value of `name={...}` or `name=value`, without its braces; '' where it is not there."""
    return _attribute(self.rest, rf'\b{name}=\{{([^}}]*)\}}') or _attribute(
      self.rest, rf'\b{name}=([^,\s]+)'
    )

  @property
  def called(self) -> dict[str, tuple[str, ...]]:
    """Computations by the attribute that names them, such as body and condition."""
    found = {}
    for match in _CALLED.finditer(self.rest):
      text = self.rest[match.end() :]
      text = text[1 : text.index('}')] if text.startswith('{') else re.split(r'[,\s]', text)[0]
      found[match[1]] = tuple(name.strip().lstrip('%') for name in text.split(','))
    return found


class Computation(NamedTuple):
  name: str
  instructions: dict[str, Instruction]
  root: str

  def parameters(self) -> dict[int, str]:
    """Names of the parameters by number."""
    return {int(i.inner): i.name for i in self.instructions.values() if i.opcode == 'parameter'}


class Program(NamedTuple):
  computations: dict[str, Computation]
  entry: str

  def steps(self, unknown: float = 1) -> 'Iterator[Step]':
    """All instructions with how often each runs; `unknown`: turns of loops that do not say."""
    return _steps(self, self.computations[self.entry], 1, False, unknown)


class Step(NamedTuple):
  instruction: Instruction
  computation: Computation
  times: float
  fused: bool  # inside a fusion, so what it gives does not go through memory
  trips: float | None = None  # of a loop; None: not a loop, or it does not say


def read(text: str) -> Program:
  """Parses `compiled.as_text()`.

  Raises:
    ValueError: a line of a computation that cannot be read, or no entry computation.
  """
  computations, entry, name, root, last = {}, '', '', '', ''
  texts: dict[str, str] = {}
  for line in text.splitlines():
    if not name:
      if (head := _HEAD.match(line)) and not line.startswith('HloModule'):
        name, texts, root, last = head[2], {}, '', ''
        entry = name if head[1] else entry
    elif _END.match(line):
      found = {one: _instruction(one, said) for one, said in texts.items()}
      computations[name] = Computation(name, found, root)
      name = ''
    elif start := _INSTRUCTION.match(line):
      last = start[2]
      texts[last] = line[start.end() :]
      root = last if start[1] else root
    elif last:  # what a kernel says of itself goes over several lines
      texts[last] += line
  if not entry:
    raise ValueError('no ENTRY computation: expected the text of a compiled program')
  return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  kind, text = _balanced(text) if text.startswith('(') else text.split(' ', 1)
  arrays = tuple(Array(m[1], _dimensions(m[2]), _space(m[3] or '')) for m in _ARRAY.finditer(kind))
  head = _OPCODE.match(text)
  if not head:
    raise ValueError(f'cannot read the instruction {name!r}: {text[:80]!r}')
  inner, rest = _balanced(text[head.end() - 1 :])
  operands = tuple(
    match[1] for part in _split(inner[1:-1]) if (match := _NAME.search(part.strip()))
  )
  return Instruction(name, head[1], arrays, operands, inner[1:-1], rest)


def _balanced(text: str) -> tuple[str, str]:
  """`text`, which begins with a parenthesis, parted where that one closes."""
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return text[: match.end()], text[match.end() :]
  raise ValueError(f'unbalanced parentheses in {text[:80]!r}')


def _split(text: str) -> list[str]:
  """At the commas that no bracket holds."""
  parts, depth, start = [], 0, 0
  for match in re.finditer(r'[(){}\[\],]', text):
    if match[0] == ',' and not depth:
      parts.append(text[start : match.start()])
      start = match.end()
    elif match[0] != ',':
      depth += 1 if match[0] in '({[' else -1
  return [*parts, text[start:]]


def _dimensions(text: str) -> tuple[int, ...]:
  return tuple(int(size.strip().lstrip('<=')) for size in text.split(',') if size.strip())


def _space(layout: str) -> int:
  return int(_attribute(layout, r'S\((\d+)\)') or HBM)


def numbers(text: str) -> list[int]:
  """[1, 2] of '1,2'."""
  return [int(number) for number in text.split(',') if number.strip()]


def _attribute(text: str, pattern: str) -> str:
  match = re.search(pattern, text)
  return match[1] if match else ''


def _steps(
  program: Program, computation: Computation, times: float, fused: bool, unknown: float
) -> Iterator[Step]:
  for one in computation.instructions.values():
    trips = trip_count(program, computation, one) if one.opcode == 'while' else None
    yield Step(one, computation, times, fused, trips)
    if one.opcode in ('async-update', 'async-done'):
      continue  # of what async-start runs
    for role, names in one.called.items():
      if role == 'to_apply' and one.opcode != 'call':
        continue  # of one element, in a reduction
      turns = 1.0
      if one.opcode == 'while':
        turns = (unknown if trips is None else trips) + (role == 'condition')
      elif one.opcode == 'conditional':
        turns = 1 / len(names)  # one of them runs
      for name in names:
        inside = fused or one.opcode == 'fusion'
        if name in program.computations:
          yield from _steps(program, program.computations[name], times * turns, inside, unknown)


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
  """How often `loop`, a while of `computation`, turns; None where only running it would tell.

  The compiler writes it down on CPU and GPU. Else the loop must count an element of its state up
  by a constant, from a constant, to a constant.
  """
  if known := _attribute(loop.rest, r'"known_trip_count":\{"n":"(\d+)"\}'):
    return int(known)
  at = functools.partial(_value, program)
  called = loop.called
  test = at(called['condition'][0], program.computations[called['condition'][0]].root)
  if test is None or test[0] != 'compare':
    return None
  _, direction, counter, bound = test
  if direction == 'GT':
    direction, counter, bound = 'LT', bound, counter
  if direction not in ('LT', 'LE') or counter is None or counter[0] != 'element':
    return None
  start = computation.instructions[loop.operands[0]]
  body = program.computations[called['body'][0]]
  turned = body.instructions[body.root]
  if start.opcode != 'tuple' or turned.opcode != 'tuple':
    return None
  index = counter[1]
  if bound is not None and bound[0] == 'element':  # carried along unchanged
    if at(body.name, turned.operands[bound[1]]) != bound:
      return None
    bound = at(computation.name, start.operands[bound[1]])
  first = at(computation.name, start.operands[index])
  step = at(body.name, turned.operands[index])
  if step is None or step[0] != 'add' or counter not in step or not _constant(first, bound):
    return None
  by = step[2] if step[1] == counter else step[1]
  if not _constant(by) or by[1] <= 0:
    return None
  distance = bound[1] - first[1] + (direction == 'LE')
  return max(0, -(-distance // by[1]))


def _constant(*values: Any) -> bool:
  return all(value is not None and value[0] == 'constant' for value in values)


def _value(program: Program, computation: str, name: str, given: tuple = ()) -> Any:
  """What an integer or a test is made of, as far as a loop's counter goes; None: something else.

  ('constant', n), ('element', i) of the computation's one parameter, ('add', x, y) or ('compare',
  direction, x, y). `given` are the values of a fusion's parameters.
  """
  one = program.computations[computation].instructions.get(name)
  if one is None:
    return None
  within = functools.partial(_value, program, computation, given=given)
  match one.opcode:
    case 'constant':
      return ('constant', int(one.inner)) if re.fullmatch(r'-?\d+', one.inner) else None
    case 'copy' | 'bitcast' | 'convert' | 'reshape':
      return within(one.operands[0])
    case 'parameter':
      return given[int(one.inner)] if given else None
    case 'get-tuple-element':
      of = program.computations[computation].instructions[one.operands[0]]
      return ('element', int(one.attribute('index'))) if of.opcode == 'parameter' else None
    case 'add':
      return 'add', *map(within, one.operands)
    case 'compare':
      return 'compare', one.attribute('direction'), *map(within, one.operands)
    case 'fusion' | 'call':
      (inner,) = one.called.get('calls') or one.called['to_apply']
      values = tuple(map(within, one.operands))
      return _value(program, inner, program.computations[inner].root, values)
  return None
