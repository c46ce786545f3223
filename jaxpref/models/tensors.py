"""The tensors of a Hugging Face folder: which it should have, which it has, what they hold of ours.

Files are opened lazily: a tensor is read when, and as far as, it is wanted.
"""

import contextlib
import json
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpref.models.config import Config
from jaxpref.models.families import Family, supported

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
_DTYPES = ('F32', 'BF16', 'F16')


class Stored(NamedTuple):
  """One tensor of a file and what it holds of our parameters."""

  shape: tuple[int, ...]
  layer: int | None
  paths: tuple[str, ...]  # joined along our last axis
  sizes: tuple[int, ...]  # of that axis, for each path
  transposed: bool


class Source(NamedTuple):
  """A part of a stored tensor: `span` of our last axis."""

  name: str
  span: slice
  stored: Stored


def stored_tensors(family: Family, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Stored]:
  """Every tensor that a folder of this model holds, by name."""
  tensors: dict[str, Stored] = {}
  for path in sorted(shapes, key=lambda path: list(family.modules).index(path.rpartition('/')[0])):
    module, _, leaf = path.rpartition('/')
    name = family.modules[module] + ('.bias' if leaf in ('b', 'bias') else '.weight')
    layers = range(shapes[path].shape[0]) if module.startswith('layers/') else (None,)
    transposed = leaf == 'w' and module not in ('embed', 'positions')
    transposed = transposed and (module == 'head' or not family.conv1d)
    for layer in layers:
      key, shape = name.format(i=layer), shapes[path].shape[0 if layer is None else 1 :]
      before = tensors.get(key, Stored((), layer, (), (), transposed))
      sizes = (*before.sizes, shape[-1])
      shape = (*shape[:-1], sum(sizes))
      shape = shape[::-1] if transposed else shape
      tensors[key] = Stored(shape, layer, (*before.paths, path), sizes, transposed)
  return tensors


def parameter_sources(expected: dict[str, Stored]) -> dict[str, list[Source]]:
  """Where each of our parameters lies, layer by layer."""
  sources: dict[str, list[Source]] = {}
  for name, stored in expected.items():
    starts = np.cumsum((0, *stored.sizes))
    for path, start, size in zip(stored.paths, starts, stored.sizes, strict=False):
      span = slice(int(start), int(start) + size)
      sources.setdefault(path, []).append(Source(name, span, stored))
  return sources


def read_parameter(folder: pathlib.Path, tensors: dict, sources: list[Source], dtype) -> np.ndarray:
  """One of our parameters; no more of the files than that is held at once."""
  kinds = {tensors[source.name].get_dtype(): source.name for source in sources}
  if dtype is None and len(kinds) > 1:
    listed = ', '.join(f'{name} as {kind}' for kind, name in kinds.items())
    raise ValueError(f'{folder}: layers differ in dtype ({listed}); give the dtype to load them in')
  parts = (_part(tensors[name], span, stored) for name, span, stored in sources)
  if sources[0].stored.layer is None:
    part = next(parts)
    return part.astype(dtype or part.dtype)
  first = next(parts)
  whole = np.empty((len(sources), *first.shape), dtype or first.dtype)
  whole[0] = first
  for i, part in enumerate(parts, start=1):
    whole[i] = part
  return whole


def _part(tensor, span: slice, stored: Stored) -> np.ndarray:
  if stored.transposed:
    return tensor[span].T
  return tensor[span] if len(stored.shape) == 1 else tensor[:, span]


def joined(stored: Stored, params: dict[str, jax.Array]) -> np.ndarray:
  """The tensor to store, of our parameters by path."""
  parts = [params[p] if stored.layer is None else params[p][stored.layer] for p in stored.paths]
  whole = np.concatenate([np.asarray(part) for part in parts], axis=-1)
  return np.ascontiguousarray(whole.T if stored.transposed else whole)


def opened(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict:
  """Every tensor in the folder by name, as a slice that is not yet read."""
  if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
    try:
      places = json.loads(read_text(folder / INDEX))['weight_map']
      files = sorted(set(places.values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{folder / INDEX}: no weight_map of tensor to file: {error!r}') from None
  else:
    places, files = None, [WEIGHTS]
  tensors: dict = {}
  for file in files:
    if pathlib.PurePath(file).name != file:
      raise ValueError(f'{folder / INDEX}: {file!r} is not a file name')
    path = folder / file
    if not path.exists():
      raise FileNotFoundError(
        f'{path}: no such file; weights are read from {WEIGHTS} or from shards with {INDEX} '
        '(transformers converts others by save_pretrained)'
      )
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
    tensors = {n if n.startswith('lm_head.') else prefix + n: x for n, x in tensors.items()}
  if missing := [f'{name} {expected[name].shape}' for name in expected if name not in tensors]:
    raise ValueError(f'{folder}: missing {some(missing)}')
  extra = {n for n in set(tensors) - set(expected) if not re.fullmatch(family.buffers, n)}
  if config.tied and 'lm_head.weight' in extra:
    embed = next(name for name, stored in expected.items() if stored.paths == ('embed/w',))
    head = tensors['lm_head.weight']
    if list(head.get_shape()) != list(tensors[embed].get_shape()) or (
      head[:].tobytes() != tensors[embed][:].tobytes()
    ):
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


def some(names: list[str]) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def read_text(path: pathlib.Path) -> str:
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file; expected a Hugging Face model folder')
  return path.read_text(encoding='utf-8')
