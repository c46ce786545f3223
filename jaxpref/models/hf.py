"""Hugging Face folders in and out: config.json and safetensors, tensor by tensor.

What is read is written back byte for byte, in the dtype it was stored in.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpref.models.config import Config
from jaxpref.models.families import FAMILIES, ROPE_KEYS, Family, family_of, supported
from jaxpref.models.model import Model
from jaxpref.typing import Params

_WEIGHTS, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_SPECIAL = ('bos', 'eos', 'pad')
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


class Stored(NamedTuple):
  """One tensor of a file and what it holds of our parameters."""

  shape: tuple[int, ...]
  layer: int | None
  paths: tuple[str, ...]  # joined along our last axis
  sizes: tuple[int, ...]  # of that axis, for each path
  transposed: bool


def load_hf(folder: str | os.PathLike, dtype=None) -> tuple[Model, Params]:
  """The model in a Hugging Face folder: config.json and model.safetensors, whole or sharded.

  Args:
    folder: a local folder, as `save_pretrained` or a download leaves it.
    dtype: of the parameters; None keeps the stored one.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: an unknown architecture or switch, or a missing, extra or wrongly shaped tensor; the
      message names it, what was expected and what is supported.
  """
  folder = pathlib.Path(folder)
  config, family = read_config(folder)
  model = Model(config)
  shapes = _flatten(model.param_shapes())
  expected = _stored(family, shapes)
  with contextlib.ExitStack() as stack:
    tensors = _open(folder, stack)
    tensors = _checked(folder, tensors, expected, family, config)
    params = {}
    for name, stored in expected.items():
      start = 0
      for path, size in zip(stored.paths, stored.sizes, strict=True):
        part = _part(tensors[name], stored, start, size)
        if dtype is not None:
          part = part.astype(dtype)
        if stored.layer is None:
          params[path] = part
        else:
          if stored.layer == 0:
            params[path] = np.empty(shapes[path].shape, part.dtype)
          if part.dtype != params[path].dtype:
            raise ValueError(
              f'{folder}: {name} is stored as {part.dtype}, earlier layers as '
              f'{params[path].dtype}; give a dtype to load all of them in'
            )
          params[path][stored.layer] = part
        start += size
  return model, _nest({path: jnp.array(params.pop(path)) for path in list(params)})


def save_hf(
  folder: str | os.PathLike, model: Model, params: Params, tokenizer=None, shard_bytes=5 * 10**9
):
  """Write a folder that `load_hf` and transformers load; parameters keep their dtype.

  Args:
    folder: made if need be; a model that it already holds is replaced.
    tokenizer: saved beside the model by its own `save(folder)`.
    shard_bytes: a larger model is split over several files with an index.
  """
  folder = pathlib.Path(folder)
  name, source = _config_json(model.config, tokenizer)
  shapes, params = _flatten(model.param_shapes()), _flatten(params)
  _check_params(shapes, params)
  source['dtype' if 'dtype' in source else 'torch_dtype'] = params['embed/w'].dtype.name
  stored = _stored(FAMILIES[name], shapes)
  shards = _shards(stored, params, shard_bytes)
  files = [_WEIGHTS]
  if len(shards) > 1:
    files = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  folder.mkdir(parents=True, exist_ok=True)
  for old in [folder / _WEIGHTS, folder / _INDEX, *folder.glob('model-*-of-*.safetensors')]:
    if old.name not in files:
      old.unlink(missing_ok=True)
  for file, names in zip(files, shards, strict=True):
    tensors = {name: _joined(stored[name], params) for name in names}
    save_file(tensors, folder / file, metadata={'format': 'pt'})
  if len(shards) > 1:
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    size = sum(x.nbytes for x in params.values())
    _write_json(folder / _INDEX, {'metadata': {'total_size': size}, 'weight_map': places})
  if tokenizer is not None:
    tokenizer.save(folder)
  _write_json(folder / 'config.json', source)  # last: an interrupted folder does not load


def read_config(folder: pathlib.Path) -> tuple[Config, Family]:
  """The decoder that config.json describes, and its family."""
  path = folder / 'config.json'
  text = _text(path)
  try:
    source = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  if not isinstance(source, dict):
    raise ValueError(f'{path}: expected an object, got {type(source).__name__}')
  family = FAMILIES.get(source.get('model_type'))
  architectures = source.get('architectures') or [family and family.architecture]
  if family is None or architectures != [family.architecture]:
    raise ValueError(
      f'{path}: model_type {source.get("model_type")!r} with architectures '
      f'{source.get("architectures")} is not supported; supported: {supported()}'
    )
  if source.get('quantization_config'):
    raise ValueError(f'{path}: quantised weights are not supported; export them in bfloat16')
  try:
    config = family.read(source)
  except (ValueError, TypeError) as error:
    raise ValueError(f'{folder}: {error}') from error
  return dataclasses.replace(config, source=text), family


def _config_json(config: Config, tokenizer) -> tuple[str, dict]:
  """The family's name and config.json: the imported one's fields as far as they still hold."""
  source = json.loads(config.source or '{}')
  name = family_of(config, preferred=source.get('model_type'))
  family = FAMILIES[name]
  if source.get('model_type') != name:
    # Special ids are said outright: transformers would fill in its own and stop at them.
    ids = {f'{kind}_token_id': getattr(tokenizer, f'{kind}_id', None) for kind in _SPECIAL}
    head = {'model_type': name, 'architectures': [family.architecture]}
    return name, head | ids | family.write(config)
  if family.read(source) != config:
    source = {key: value for key, value in source.items() if key not in ROPE_KEYS}
    source |= family.write(config)
  return name, source


def _stored(family: Family, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Stored]:
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


def _part(tensor, stored: Stored, start: int, size: int) -> np.ndarray:
  """Our array of a stored tensor's slice; only that slice is read."""
  span = slice(start, start + size)
  if stored.transposed:
    return tensor[span].T
  return tensor[span] if len(stored.shape) == 1 else tensor[:, span]


def _joined(stored: Stored, params: dict[str, jax.Array]) -> np.ndarray:
  parts = [params[p] if stored.layer is None else params[p][stored.layer] for p in stored.paths]
  whole = np.concatenate([np.asarray(part) for part in parts], axis=-1)
  return np.ascontiguousarray(whole.T if stored.transposed else whole)


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict:
  """Every tensor in the folder by name, as a slice that is not yet read."""
  if (folder / _INDEX).exists() and not (folder / _WEIGHTS).exists():
    try:
      places = json.loads(_text(folder / _INDEX))['weight_map']
      files = sorted(set(places.values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{folder / _INDEX}: no weight_map of tensor to file: {error!r}') from None
  else:
    places, files = None, [_WEIGHTS]
  tensors = {}
  for file in files:
    if pathlib.PurePath(file).name != file:
      raise ValueError(f'{folder / _INDEX}: {file!r} is not a file name')
    path = folder / file
    if not path.exists():
      raise FileNotFoundError(
        f'{path}: no such file; weights are read from {_WEIGHTS} or from shards with {_INDEX} '
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
      raise ValueError(f'{path}: {_some(wrong)} not where {_INDEX} says')
    tensors |= found
  return tensors


def _checked(folder, tensors: dict, expected: dict, family: Family, config: Config) -> dict:
  """The tensors that are expected, once all is as it should be."""
  if not any(name.startswith('transformer.') for name in tensors) and family.conv1d:
    # Saved from the class without a head, as GPT-2's own folder is.
    tensors = {n if n.startswith('lm_head.') else f'transformer.{n}': x for n, x in tensors.items()}
  if missing := [f'{name} {expected[name].shape}' for name in expected if name not in tensors]:
    raise ValueError(f'{folder}: missing {_some(missing)}')
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
    raise ValueError(f'{folder}: {known} have no {_some(listed)}; supported: {supported()}')
  for name, stored in expected.items():
    shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
    if shape != stored.shape:
      raise ValueError(f'{folder}: {name} has shape {shape}; config.json asks for {stored.shape}')
    if kind not in _DTYPES:
      raise ValueError(f'{folder}: {name} is stored as {kind}; known: {", ".join(_DTYPES)}')
  return tensors


def _check_params(shapes: dict, params: dict):
  if wrong := sorted(set(shapes) ^ set(params)):
    kind = 'missing' if wrong[0] in shapes else 'unknown'
    raise ValueError(f"the parameters are not this model's: {kind} {_some(wrong)}")
  for path, shape in shapes.items():
    if params[path].shape != shape.shape:
      raise ValueError(f'{path} has shape {params[path].shape}; the model asks for {shape.shape}')


def _shards(stored: dict[str, Stored], params: dict, limit: int) -> list[list[str]]:
  shards, room = [[]], limit
  for name, tensor in stored.items():
    size = int(np.prod(tensor.shape)) * params[tensor.paths[0]].dtype.itemsize
    if size > room and shards[-1]:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= size
  return shards


def _flatten(tree: Params) -> dict:
  leaves = jax.tree.leaves_with_path(tree)
  return {'/'.join(key.key for key in path): leaf for path, leaf in leaves}


def _nest(flat: dict) -> Params:
  tree: dict = {}
  for path, leaf in flat.items():
    *folders, name = path.split('/')
    node = tree
    for key in folders:
      node = node.setdefault(key, {})
    node[name] = leaf
  return tree


def _some(names: list[str]) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def _text(path: pathlib.Path) -> str:
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such file; expected a Hugging Face model folder')
  return path.read_text(encoding='utf-8')


def _write_json(path: pathlib.Path, value: dict):
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
