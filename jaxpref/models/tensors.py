"""The tensors of a Hugging Face folder: which it should have, which it has, what they hold of ours.

Files are opened lazily: a tensor is read when, and as far as, it is wanted.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpref.models.config import Config
from jaxpref.models.families import Family, supported
from jaxpref.models.headers import check_header

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


class Stored(NamedTuple):
  """One tensor of a file and what it holds of our parameters."""

  shape: tuple[int, ...]
  where: tuple[int, ...]  # the layer, and the expert
  paths: tuple[str, ...]  # joined along our last axis
  sizes: tuple[int, ...]  # of that axis, for each path
  transposed: bool


class Source(NamedTuple):
  """A part of a stored tensor: our last axis begins at `start` of its own."""

  name: str
  start: int
  transposed: bool


def stored_tensors(family: Family, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Stored]:
  """Every tensor that a folder of this model holds, by name."""
  tensors: dict[str, Stored] = {}
  for path in sorted(shapes, key=lambda path: list(family.modules).index(path.rpartition('/')[0])):
    module, _, leaf = path.rpartition('/')
    name = family.modules[module] + ('.bias' if leaf in ('b', 'bias') else '.weight')
    axes = 2 if '{e}' in name else 1 if '{i}' in name else 0  # ours, that are names there
    lead, rest = shapes[path].shape[:axes], shapes[path].shape[axes:]
    transposed = leaf == 'w' and module not in ('embed', 'positions')
    transposed = transposed and (module in ('head', 'score') or not family.conv1d)
    for index in np.ndindex(lead):
      key = name.format(**dict(zip('ie', index, strict=False)))
      before = tensors.get(key, Stored((), index, (), (), transposed))
      sizes = (*before.sizes, rest[-1])
      shape = (*rest[:-1], sum(sizes))
      shape = shape[::-1] if transposed else shape
      tensors[key] = Stored(shape, index, (*before.paths, path), sizes, transposed)
  return tensors


def parameter_sources(expected: dict[str, Stored]) -> dict[str, dict[tuple[int, ...], Source]]:
  """Where each of our parameters lies, by its path and by its layer (and expert)."""
  sources: dict[str, dict[tuple[int, ...], Source]] = {}
  for name, stored in expected.items():
    starts = np.cumsum((0, *stored.sizes))
    for path, start in zip(stored.paths, starts, strict=False):
      sources.setdefault(path, {})[stored.where] = Source(name, int(start), stored.transposed)
  return sources


def stored_dtype(folder: pathlib.Path, tensors: dict, names: Iterable[str]) -> np.dtype:
  """The one dtype of the stored tensors called `names`."""
  kinds = {tensors[name].get_dtype(): name for name in names}
  if len(kinds) > 1:
    listed = ', '.join(f'{name} as {kind}' for kind, name in kinds.items())
    raise ValueError(f'{folder}: layers differ in dtype ({listed}); give the dtype to load them in')
  return np.dtype(_DTYPES[next(iter(kinds))])


def read_part(
  tensors: dict,
  sources: dict[tuple[int, ...], Source],
  shape: tuple[int, ...],
  dtype,
  index: tuple[slice, ...],
) -> np.ndarray:
  """`index` of a parameter of `shape`; nothing but that part of the files is read."""
  ranges = [range(n)[where] for n, where in zip(shape, index, strict=True)]
  axes = len(next(iter(sources)))
  whole = np.empty([len(r) for r in ranges], dtype)
  *rows, (start, stop) = [(r.start, r.stop) for r in ranges[axes:]]
  for place in np.ndindex(*whole.shape[:axes]):
    source = sources[tuple(ranges[axis][i] for axis, i in enumerate(place))]
    last = slice(source.start + start, source.start + stop)
    tensor, rest = tensors[source.name], [slice(*row) for row in rows]
    if source.transposed:
      whole[place] = tensor[last, *rest].T
    else:
      whole[place] = tensor[*rest, last]
  return whole


def joined(stored: Stored, params: dict[str, jax.Array]) -> np.ndarray:
  """The tensor to store, of our parameters by path."""
  parts = [np.asarray(params[path][stored.where]) for path in stored.paths]
  whole = np.concatenate(parts, axis=-1)
  return np.ascontiguousarray(whole.T if stored.transposed else whole)


def opened(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict:
  """Every tensor in the folder by name, as a slice that is not yet read."""
  if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
    try:
      places = json.loads(read_text(folder / INDEX))['weight_map']
      files = sorted(set(places.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{folder / INDEX}: no weight_map of tensor to file: {error!r}') from None
  else:
    places, files = None, [WEIGHTS]
  tensors: dict = {}
  for file in files:
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise ValueError(f'{folder / INDEX}: {file!r} is not a file name')
    path = folder / file
    if not path.is_file():
      raise FileNotFoundError(
        f'{path}: no such file; weights are read from {WEIGHTS} or from shards with {INDEX} '
        '(transformers converts others by save_pretrained)'
      )
    check_header(path)
    try:
      handle = stack.enter_context(safe_open(path, framework='numpy'))
    except SafetensorError as error:
      raise ValueError(f'{path}: not a whole safetensors file: {error}') from None
    found = {name: handle.get_slice(name) for name in handle.keys()}
    if places is not None and (
      wrong := sorted(set(found) ^ {name for name, place in places.items() if place == file})
    ):
      raise ValueError(f'{path}: {some(wrong)} not where {INDEX} says')
    tensors |= found
  return tensors


def checked(folder, tensors: dict, expected: dict, family: Family, config: Config) -> dict:
  """The tensors that are expected, once all is as it should be."""
  prefix = family.modules['embed'].partition('.')[0] + '.'
  if not any(name.startswith(prefix) for name in tensors):
    # Saved from the class without a head, as GPT-2's own folder is.
    heads = 'lm_head.', 'score.'
    tensors = {n if n.startswith(heads) else prefix + n: x for n, x in tensors.items()}
  if missing := [f'{name} {expected[name].shape}' for name in expected if name not in tensors]:
    raise ValueError(f'{folder}: missing {some(missing)}')
  extra = {n for n in set(tensors) - set(expected) if not re.fullmatch(family.buffers, n)}
  if config.tied and 'lm_head.weight' in extra:
    embed = next(name for name, stored in expected.items() if stored.paths == ('embed/w',))
    head = tensors['lm_head.weight']
    if not _equal(head, tensors[embed]):
      raise ValueError(
        f'{folder}: lm_head.weight differs from {embed}, which config.json says is the head; '
        'set "tie_word_embeddings": false to use both'
      )
    extra.remove('lm_head.weight')
  if extra:
    known = f'{config.num_layers} layers of {family.architecture}'
    listed = [f'{name} {tuple(tensors[name].get_shape())}' for name in sorted(extra)]
    raise ValueError(f'{folder}: {known} have no {some(listed)}; supported: {supported()}')
  for name, stored in expected.items():
    shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
    if shape != stored.shape:
      raise ValueError(f'{folder}: {name} has shape {shape}; config.json asks for {stored.shape}')
    if kind not in _DTYPES:
      raise ValueError(f'{folder}: {name} is stored as {kind}; known: {", ".join(_DTYPES)}')
  return tensors


def _equal(a, b) -> bool:
  """Whether two tensors are the same, byte for byte, read a few rows at a time."""
  (rows, *rest), same = a.get_shape(), a.get_shape() == b.get_shape()
  step = max(1, 2**22 // max(1, *rest))
  return same and all(
    a[i : min(i + step, rows)].tobytes() == b[i : min(i + step, rows)].tobytes()
    for i in range(0, rows, step)
  )


def some(names: list[str]) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def read_text(path: pathlib.Path) -> str:
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file; expected a Hugging Face model folder')
  return path.read_text(encoding='utf-8')
