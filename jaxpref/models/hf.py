"""Hugging Face folders in and out: config.json and safetensors, tensor by tensor.

What is read is written back byte for byte, in the dtype it was stored in.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors.numpy import save_file

from jaxpref.models.config import Config
from jaxpref.models.families import FAMILIES, Family, family_of, supported
from jaxpref.models.fields import ROPE_KEYS, Fields
from jaxpref.models.model import Model
from jaxpref.models.placement import placed
from jaxpref.models.tensors import (
  INDEX,
  WEIGHTS,
  Stored,
  checked,
  joined,
  opened,
  parameter_sources,
  read_part,
  read_text,
  some,
  stored_dtype,
  stored_tensors,
)
from jaxpref.typing import Params

Shardings = Callable[[str], Sharding] | Params
_SPECIAL = ('bos', 'eos', 'pad')


def load_hf(
  folder: str | os.PathLike, dtype=None, shardings: Shardings | None = None
) -> tuple[Model, Params]:
  """The model in a Hugging Face folder: config.json and model.safetensors, whole or sharded.

  Tensors are read one after another, each device's part by itself, so host memory stays near one
  of them. For the mesh's own rules, `params_sharding(mesh, Model(read_config(folder)[0])
  .param_shapes())` makes the shardings before anything is read.

  Args:
    folder: a local folder, as `save_pretrained` or a download leaves it.
    dtype: of the parameters; None keeps the stored one.
    shardings: where the parameters go: a function of the path ('layers/mlp/up/w'), or a tree like
      the parameters'. None: the default device.

  Returns:
    The model and its parameters; for a `*ForSequenceClassification` folder these hold `score/w` in
    place of a head, and `model.scores` works in place of `model.unembed`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: an unknown architecture or switch, a missing, extra or wrongly shaped tensor, or a
      file that is not what it claims; the message names it, what was expected and what is
      supported.
  """
  folder = pathlib.Path(folder)
  config, family = read_config(folder)
  model = Model(config)
  shapes = _flatten(model.param_shapes())
  places = _places(shapes, shardings)
  with contextlib.ExitStack() as stack:
    tensors = opened(folder, stack)
    if config.num_layers * max(1, config.num_experts) > len(tensors):
      raise ValueError(
        f'{folder}: {len(tensors)} tensors cannot be {config.num_layers} layers of '
        f'{max(1, config.num_experts)} experts; missing tensors, or another config.json'
      )
    expected = stored_tensors(family, shapes)
    tensors = checked(folder, tensors, expected, family, config)
    params = {}
    for path, sources in parameter_sources(expected).items():
      names = [source.name for source in sources.values()]
      kind = stored_dtype(folder, tensors, names) if dtype is None else jnp.dtype(dtype)
      read = functools.partial(read_part, tensors, sources, shapes[path].shape, kind)
      params[path] = placed(read, shapes[path].shape, kind, places[path])
  return model, _nest(params)


def _places(shapes: dict, shardings: Shardings | None) -> dict[str, Sharding | None]:
  if shardings is None:
    return dict.fromkeys(shapes)
  if callable(shardings):
    return {path: shardings(path) for path in shapes}
  places = _flatten(shardings)
  if wrong := sorted(set(shapes) ^ set(places)):
    raise ValueError(f"the shardings are not this model's: {some(wrong)} on one side only")
  return places


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
  stored = stored_tensors(FAMILIES[name], shapes)
  shards = _shards(stored, params, shard_bytes)
  files = [WEIGHTS]
  if len(shards) > 1:
    files = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  folder.mkdir(parents=True, exist_ok=True)
  for old in [folder / WEIGHTS, folder / INDEX, *folder.glob('model-*-of-*.safetensors')]:
    if old.name not in files:
      old.unlink(missing_ok=True)
  for file, names in zip(files, shards, strict=True):
    tensors = {name: joined(stored[name], params) for name in names}
    save_file(tensors, folder / file, metadata={'format': 'pt'})
  if len(shards) > 1:
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    size = sum(x.nbytes for x in params.values())
    _write_json(folder / INDEX, {'metadata': {'total_size': size}, 'weight_map': places})
  if tokenizer is not None:
    tokenizer.save(folder)
  _write_json(folder / 'config.json', source)  # last: an interrupted folder does not load


def read_config(folder: pathlib.Path) -> tuple[Config, Family]:
  """The decoder that config.json describes, and its family."""
  path = folder / 'config.json'
  text = read_text(path)
  try:
    source = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  if not isinstance(source, dict):
    raise ValueError(f'{path}: expected an object, got {type(source).__name__}')
  family = FAMILIES.get(str(source.get('model_type')))
  classes = [[family.architecture], [family.classifier]] if family else []
  if family is None or (source.get('architectures') or classes[0]) not in classes:
    raise ValueError(
      f'{path}: model_type {source.get("model_type")!r} with architectures '
      f'{source.get("architectures")} is not supported; supported: {supported()}, and their '
      '...ForSequenceClassification'
    )
  if source.get('quantization_config'):
    raise ValueError(f'{path}: quantised weights are not supported; export them in bfloat16')
  try:
    config = _read(family, source)
  except (ValueError, TypeError) as error:
    raise ValueError(f'{folder}: {error}') from error
  return dataclasses.replace(config, source=text), family


def _read(family: Family, source: dict) -> Config:
  fields = Fields(source)
  config = family.read(fields)
  if source.get('architectures') == [family.classifier]:
    labels = source.get('id2label')  # two of them go without saying
    number = len(labels) if isinstance(labels, dict) else fields.get('num_labels', 2)
    config = dataclasses.replace(config, num_labels=number)
  fields.finish()
  return config


def _config_json(config: Config, tokenizer) -> tuple[str, dict]:
  """The family's name and config.json: the imported one's fields as far as they still hold."""
  source = json.loads(config.source or '{}')
  name = family_of(config, preferred=source.get('model_type'))
  family = FAMILIES[name]
  head: dict = {'architectures': [family.architecture]}
  if config.num_labels:
    labels = {str(i): f'LABEL_{i}' for i in range(config.num_labels)}
    back = {label: int(i) for i, label in labels.items()}
    head = {'architectures': [family.classifier], 'id2label': labels, 'label2id': back}
  if source.get('model_type') != name:
    # Special ids are said outright: transformers would fill in its own and stop at them.
    ids = {f'{kind}_token_id': getattr(tokenizer, f'{kind}_id', None) for kind in _SPECIAL}
    return name, {'model_type': name, **head, **ids, **family.write(config)}
  before = _read(family, source)
  if before != config:
    head = {} if before.num_labels == config.num_labels else head
    source = {key: value for key, value in source.items() if key not in ROPE_KEYS}
    source |= head | family.write(config)
  return name, source


def _check_params(shapes: dict, params: dict):
  if wrong := sorted(set(shapes) ^ set(params)):
    kind = 'missing' if wrong[0] in shapes else 'unknown'
    raise ValueError(f"the parameters are not this model's: {kind} {some(wrong)}")
  for path, shape in shapes.items():
    if params[path].shape != shape.shape:
      raise ValueError(f'{path} has shape {params[path].shape}; the model asks for {shape.shape}')


def _shards(stored: dict[str, Stored], params: dict, limit: int) -> list[list[str]]:
  shards: list[list[str]] = [[]]
  room = limit
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


def _write_json(path: pathlib.Path, value: dict):
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
