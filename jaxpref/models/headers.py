"""The header of a safetensors file, checked before anything trusts it.

The format: 8 bytes little-endian, the header's length; a JSON object of tensor name to dtype, shape
and data_offsets (begin and end, counted from the header's end); then the data, without gaps.
"""

import json
import math
import pathlib

LONGEST = 100_000_000  # bytes of a header: the format's own limit
_BITS = {
  **dict.fromkeys(('F64', 'I64', 'U64', 'C64'), 64),
  **dict.fromkeys(('F32', 'I32', 'U32'), 32),
  **dict.fromkeys(('F16', 'BF16', 'I16', 'U16'), 16),
  **dict.fromkeys(('BOOL', 'I8', 'U8', 'F8_E4M3', 'F8_E5M2', 'F8_E8M0'), 8),
}


def check_header(path: pathlib.Path) -> None:
  """Raise ValueError, naming file and tensor, unless all of the header is as the format says.

  Nothing but the header is read, and no more of it than the file has.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or not 2 <= length <= min(LONGEST, size - 8):
      raise ValueError(
        f'{path}: not a whole safetensors file: {size} bytes, of which the header claims {length}'
      )
    text = file.read(length)
  try:
    header = json.loads(text.decode('utf-8'), object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: the safetensors header is not JSON: {error}') from None
  if not isinstance(header, dict):
    raise ValueError(f'{path}: the safetensors header is a {type(header).__name__}, not an object')
  header.pop('__metadata__', None)
  spans = []
  for name, entry in header.items():
    try:
      spans.append((*_span(entry), name))
    except ValueError as error:
      raise ValueError(f'{path}: {name}: {error}') from None
  end = 0
  for start, stop, name in sorted(spans):
    if start != end:
      what = 'overlaps the tensor before it' if start < end else 'leaves a gap before it'
      raise ValueError(f'{path}: {name}: its data begins at {start}, which {what} (expected {end})')
    end = stop
  if end != size - 8 - length:
    last = f' ({max(spans)[2]} ends at {end})' if spans else ''
    raise ValueError(
      f'{path}: not a whole safetensors file: the header describes {end} bytes of data{last}, '
      f'the file holds {size - 8 - length}'
    )


def _span(entry) -> tuple[int, int]:
  """The data_offsets of one tensor, if they fit its shape and dtype."""
  if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError('expected dtype, shape and data_offsets')
  dtype, shape, offsets = (entry[key] for key in ('dtype', 'shape', 'data_offsets'))
  if not isinstance(dtype, str) or dtype not in _BITS:
    raise ValueError(f'unknown dtype {dtype!r}; known: {", ".join(_BITS)}')
  for key, value in (('shape', shape), ('data_offsets', offsets)):
    # bool is an int to Python, and no size.
    if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**63 for x in value):
      raise ValueError(f'{key} must be a list of whole numbers, got {str(value)[:80]}')
  if len(offsets) != 2 or offsets[0] > offsets[1]:
    raise ValueError(f'data_offsets must be begin and end, got {offsets}')
  expected, given = math.prod(shape) * _BITS[dtype] // 8, offsets[1] - offsets[0]
  if expected != given:
    raise ValueError(f'{dtype} {shape} takes {expected} bytes; data_offsets give it {given}')
  return offsets[0], offsets[1]


def _unique(pairs: list[tuple]) -> dict:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'{twice!r} appears twice')
  return found
