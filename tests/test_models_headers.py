"""Safetensors headers: what is not as the format says is refused by file and tensor, unread."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpref.models.headers import check_header


def entry(dtype='F32', shape=(2, 3), offsets=(0, 24)):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}


def write(path, header, data=b'\0' * 24, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text) if length is None else length) + text + data)
  return path


def test_whole_files_pass(tmp_path):
  path = tmp_path / 'a.safetensors'
  tensors = {'x': np.ones((2, 3), np.float32), 'none': np.ones((0, 4)), 'one': np.array(3, np.int8)}
  save_file(tensors, path, metadata={'format': 'pt'})
  check_header(path)
  check_header(write(path, {'x': entry()}))
  check_header(write(path, {}, b''))


@pytest.mark.parametrize(
  ('header', 'message'),
  [
    ({'x': entry(offsets=(0, 20))}, r'x: F32 \[2, 3\] takes 24 bytes; data_offsets give it 20'),
    ({'x': entry(offsets=(24, 0))}, r'x: data_offsets must be begin and end, got \[24, 0\]'),
    ({'x': entry(offsets=(-24, 0))}, r'x: data_offsets must be a list of whole numbers'),
    ({'x': entry(offsets=(0, 24, 24))}, 'x: data_offsets must be begin and end'),
    ({'x': entry(offsets=(0, 2**70))}, 'x: data_offsets must be a list of whole numbers'),
    ({'x': entry(shape=(2, 3.0))}, 'x: shape must be a list of whole numbers'),
    ({'x': entry(shape=(True, 6))}, 'x: shape must be a list of whole numbers'),
    ({'x': entry(shape=(2**40, 2**40))}, 'x: F32 .* takes 4835703278458516698824704 bytes'),
    ({'x': entry(dtype='F31')}, "x: unknown dtype 'F31'; known: F64"),
    ({'x': entry(dtype=['F32'])}, 'x: unknown dtype'),
    ({'x': entry(dtype='F64')}, 'x: F64 .* takes 48 bytes; data_offsets give it 24'),
    ({'x': {'dtype': 'F32', 'shape': [6]}}, 'x: expected dtype, shape and data_offsets'),
    ({'x': 3}, 'x: expected dtype, shape and data_offsets'),
    ({'x': entry(shape=(3,), offsets=(12, 24))}, 'x: its data begins at 12, which leaves a gap'),
    (
      {'x': entry(shape=(4,), offsets=(0, 16)), 'y': entry(shape=(3,), offsets=(12, 24))},
      r'y: its data begins at 12, which overlaps the tensor before it \(expected 16\)',
    ),
    ({'x': entry(shape=(5,), offsets=(0, 20))}, r'describes 20 bytes of data \(x ends at 20\)'),
    ({'x': entry(shape=(9, 1), offsets=(0, 36))}, 'describes 36 bytes .*, the file holds 24'),
    ([1, 2], 'header is a list, not an object'),
    (b'{"x": {', 'header is not JSON'),
    (b'\xff\xfe', 'header is not JSON'),
    (b'{"x": 1, "x": 2}', "header is not JSON: 'x' appears twice"),
    (b'[' * 100_000, 'header is not JSON'),
    (b'{"x": ' + b'9' * 5000 + b'}', 'header is not JSON'),
  ],
)
def test_a_wrong_header_is_refused_by_file_and_tensor(header, message, tmp_path):
  path = write(tmp_path / 'bad.safetensors', header)
  with pytest.raises(ValueError, match=message) as error:
    check_header(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize('length', [0, 1, 25, 10**9, 2**63, 2**64 - 1])
def test_a_length_that_the_file_does_not_have_takes_no_memory(length, tmp_path):
  path = write(tmp_path / 'bad.safetensors', b'{}', b'', length)
  tracemalloc.start()
  with pytest.raises(ValueError, match=rf'not a whole safetensors file.* header claims {length}'):
    check_header(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20


@pytest.mark.parametrize('size', [0, 3, 8])
def test_a_stump_is_refused(size, tmp_path):
  path = tmp_path / 'bad.safetensors'
  path.write_bytes(b'\2' + b'\0' * (size - 1) if size else b'')
  with pytest.raises(ValueError, match=f'not a whole safetensors file: {size} bytes'):
    check_header(path)
