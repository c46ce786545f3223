"""The folder of one run, on a disk or at gs://, and the promise that it holds one run only.

  config.json      the configuration, sorted; written once, before anything else
  metrics.jsonl    one line a logged step (writers.py)
  samples.jsonl    what a policy wrote every so many rollouts, with rewards (rollout/tables.py)
  base/            the model's config.json or preset, and the tokenizer (policy.py)
  checkpoints/     one folder a saved step, and reference/ (checkpoint.py)
  normalisation.json   of a reward model: mean and std of its scores (normalisation.py)
  tensorboard/     event files (writers.py)
  logs/            of several processes, each its own (host_log.py)

Running the same command again resumes; running another one in the same folder is refused, unless
the first one failed before it had trained anything.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import logging

from jaxpref.storage import check_writable, open_path, remove_tree, write_atomically

# May differ when a run resumes: what is reported, kept and waited for, and what moves results by
# rounding only (where and in which pieces the same step is computed). The same bits are promised to
# the same command alone.
FREE = (
  'log',
  'eval',
  'checkpoint',
  'profile',
  'mesh',
  'remat',
  'keep_logits',
  'attention',
  'reference_memory',
  'batch.microbatches',
  'batch.chunk',
  'rollout.devices',
  'rollout.reference_devices',
  'rollout.reward_devices',
  'rollout.slots',
  'rollout.show',
  'rollout.timeout',
)
# May grow, to train for longer.
GROWING = ('steps', 'epochs')


class Workdir(NamedTuple):
  """`path` of the run, as `storage.open_path` gives it, and files in it."""

  path: Any

  @property
  def metrics(self) -> Any:
    return self.path / 'metrics.jsonl'

  @property
  def tensorboard(self) -> Any:
    return self.path / 'tensorboard'


def open_workdir(path: str | os.PathLike, config: Mapping[str, Any]) -> Workdir:
  """Makes the folder, or re-opens that of an earlier run with the same config.

  Raises ValueError that names every key whose value differs from the earlier run's, with both
  values; keys under FREE may differ and those in GROWING may grow. A run that got nowhere, without
  a checkpoint or a line of metrics, gives way to any other. Raises OSError where the folder cannot
  be made or written. Processes other than 0 write nothing, and come after it.
  """
  folder = open_path(path)
  now = _plain(config)
  file = folder / 'config.json'
  if file.exists() and _got_nowhere(folder):
    if jax.process_index() == 0 and _read(file) != now:
      for left in ('base', 'reference'):  # of a model that may be another now
        remove_tree(folder / left)
  elif file.exists():
    _refuse_other(file, _read(file), now)
  elif (folder / 'checkpoints').exists():
    raise ValueError(
      f'{folder} holds checkpoints but no config.json, so whose they are cannot be told; '
      'put the config.json back or choose another workdir'
    )
  elif jax.process_index() != 0:
    raise FileNotFoundError(
      f'process 0 has made {folder}, and process {jax.process_index()} on {socket.gethostname()} '
      'does not see it: the workdir must be on storage that all hosts share'
    )
  if jax.process_index() == 0:
    check_writable(folder)
    write_atomically(file, json.dumps(now, indent=2, sort_keys=True) + '\n')
  return Workdir(folder)


def read_config(path: str | os.PathLike) -> ml_collections.ConfigDict:
  """The configuration of the run in folder `path`; lists and tuples come back as tuples."""
  file = open_path(path) / 'config.json'
  if not file.exists():
    raise FileNotFoundError(f'{file} not found: {os.fspath(path)} is not the workdir of a run')
  return ml_collections.ConfigDict(_tuples(_read(file)))


def _got_nowhere(folder: Any) -> bool:
  steps, metrics = folder / 'checkpoints', folder / 'metrics.jsonl'
  saved = steps.is_dir() and any(steps.iterdir())
  return not saved and not (metrics.is_file() and metrics.read_bytes())


def _refuse_other(file: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
  old, new = dict(_flat(before)), dict(_flat(now))
  lines = []
  for key in sorted(old.keys() | new.keys()):
    was, now_is = old.get(key, _ABSENT), new.get(key, _ABSENT)
    if was == now_is or any(f'{key}.'.startswith(f'{free}.') for free in FREE):
      continue
    if key in GROWING and isinstance(was, int | float) and isinstance(now_is, int | float):
      if was < now_is:
        logging.warning(
          '%s grows from %s to %s: a schedule that ends with the run is another one from here on',
          key,
          was,
          now_is,
        )
        continue
      hint = ' (it may grow, not shrink)'
    else:
      hint = ''
    lines.append(f'  {key}: {was!r} there, {now_is!r} now{hint}')
  if lines:
    raise ValueError(
      f'{file} was written by a run with another config:\n'
      + '\n'.join(lines)
      + '\nTo resume that run restore these values; to start another one choose another workdir.'
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config as JSON reads it back (tuples are lists), so that two of them can be compared."""
  to_dict = getattr(config, 'to_dict', None)  # of ml_collections, frozen or not
  values = to_dict() if to_dict else dict(config)
  for key, value in _flat(values):
    try:
      json.dumps(value)
    except TypeError:
      raise TypeError(
        f'config.{key} = {value!r} is a {type(value).__name__}; a config holds numbers, strings, '
        'booleans, None, tuples and dicts of them'
      ) from None
  return json.loads(json.dumps(values))


def _read(file: Any) -> dict[str, Any]:
  try:
    return json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    message = f'{file} is not valid JSON ({error}); restore it or use another workdir'
    raise ValueError(message) from None


class _Absent:
  def __repr__(self):
    return 'absent'


_ABSENT = _Absent()


def _flat(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  return value
