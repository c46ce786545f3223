"""What a run leaves on disk so that it can go on, or be evaluated and exported (Orbax).

  <folder>/checkpoints/<step>/state   the whole TrainState, sharded as it was
  <folder>/checkpoints/<step>/meta    JSON: step, metrics, and what the caller adds
  <folder>/reference                  the reference's parameters, written once

A state is stored as nested dicts under the names of its leaves ('params/layers/...'), so that its
parts can be read without the classes, the optimizer or the devices that it was made with.
Only this file and `handler.py` import Orbax.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jaxpref import hosts
from jaxpref.log_probs import policy_params
from jaxpref.storage import check_writable, is_url, naming, open_path
from jaxpref.train.checksums import checksums
from jaxpref.train.handler import Handler, Restore, Save, check_bits, check_sizes
from jaxpref.train.retention import Retention
from jaxpref.typing import Params

# Orbax's marker of what is whole, where it cannot give a folder its name at last.
_COMMITTED = 'commit_success.txt'
_NAMED = 5  # leaves that an error lists before it only counts


class Checkpoints:
  """The checkpoints of one run.

  Kept are the newest `keep_last` and, with `keep_best=(metric, 'max' | 'min')`, also the one with
  the best value of that metric. With `read_only` nothing is made, cleaned or moved, so that a
  running training can be looked at.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep_last: int = 3,
    keep_best: tuple[str, str] | None = None,
    read_only: bool = False,
  ):
    steps_folder = open_path(folder) / 'checkpoints'
    if read_only and not steps_folder.is_dir():
      raise FileNotFoundError(f'{steps_folder} not found: {folder} is not the workdir of a run')
    if not read_only:
      check_writable(steps_folder)
    self._read_only = read_only
    self._keep = Retention(keep_last, keep_best)
    self._handler = Handler()
    self._manager = ocp.CheckpointManager(
      steps_folder,
      item_handlers={'state': self._handler, 'meta': ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
        create=False, preservation_policy=self._keep, cleanup_tmp_directories=not read_only
      ),
    )
    self._steps_folder = self._manager.directory  # in Orbax's own path type
    self._reference = self._steps_folder.parent / 'reference'
    for step in self.steps():
      try:
        self._keep.note(step, self._meta(step)['metrics'])
      except Exception as error:  # whatever the damage, restore() is the one to judge it
        logging.warning(
          'checkpoint %s has no readable metadata: %s', self._path(step), _line(error)
        )

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending; waits for one that this object is writing."""
    if self._read_only:
      self._manager.reload()
    else:
      self.wait()
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step that `keep_best` holds; None without it or before its metric was seen."""
    return self._keep.best(self.steps())

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts to write `state`, a pytree of numbers, and returns; False if `step` is there already.

    The caller may donate `state` at once. `meta` is JSON (config, data position, ...); `metrics`
    decide what is best. An error of the write before this one is raised here, in `wait` or `close`.
    """
    self._refuse_read_only()
    self.wait()
    if step in self._manager.all_steps():
      return False
    numbers = {name: float(value) for name, value in (metrics or {}).items()}
    record = {**(meta or {}), 'step': int(step), 'metrics': numbers}
    try:
      json.dumps(record)
    except TypeError as error:
      raise TypeError(f'the metadata of a checkpoint must be JSON: {error}') from None
    self._keep.note(step, numbers)
    nested = _nest(state)
    self._handler.checksums = _leaves(checksums(nested))
    items = ocp.args.Composite(state=Save(nested), meta=ocp.args.JsonSave(record))
    with naming(self._steps_folder):
      return self._manager.save(step, args=items, force=True)

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """(state, meta) of `step`, by default of the newest checkpoint that can be read.

    `abstract_state` is the state's pytree with jax.ShapeDtypeStruct (or arrays) as leaves; each
    leaf is restored onto its `sharding`, whatever it was saved from (numpy where it has none).
    Without `step`, a damaged checkpoint is named in a warning and moved aside to `<step>.corrupt`,
    and the one before it is taken. Raises ValueError, naming leaves, if the tree, a shape or a
    dtype differs from what was saved; FileNotFoundError without any readable checkpoint.
    """
    wanted = _nest(abstract_state)

    def read(path: Any) -> Any:
      saved = self._saved(path)
      _check_same(path, _leaves(saved), _leaves(wanted))
      return self._read(path, wanted)

    tree, meta = self._first_readable(read, step)
    leaves = _leaves(tree)
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract_state)
    return jax.tree.unflatten(structure, [leaves[_name(path)] for path, _ in paths]), meta

  def restore_params(
    self, step: int | None = None, *, ema: bool = False, shardings: Any = None
  ) -> Params:
    """The parameters (or their running average) of `step`, by default of the newest readable one.

    Nested dicts of numpy arrays, or, with `shardings` (a tree like the parameters), jax arrays.
    """
    return self._params(step, ema, lambda saved: _abstract(saved, shardings))

  def restore_policy(
    self, step: int | None = None, *, ema: bool = False, shardings: Any = None
  ) -> Params:
    """As `restore_params`, of the policy alone: what a critic beside it holds is not read."""

    def wanted(saved: Params) -> Params:
      policy = policy_params(saved)
      return (
        _abstract(policy, shardings)
        if policy is saved
        else {'policy': _abstract(policy, shardings)}
      )

    found = self._params(step, ema, wanted)
    return found['policy'] if set(found) == {'policy'} else found

  def _params(self, step: int | None, ema: bool, wanted: Callable[[Params], Params]) -> Params:
    part = 'ema' if ema else 'params'

    def read(path: Any) -> Any:
      saved = self._saved(path)
      if not saved.get(part):
        raise _Mismatch(f'{path} holds no {part!r}; it holds {sorted(saved)}')
      return self._read(path, {part: wanted(saved[part])})[part]

    return self._first_readable(read, step)[0]

  def has_reference(self) -> bool:
    if is_url(self._reference):
      return (self._reference / _COMMITTED).exists()
    return self._reference.is_dir()

  def save_reference(self, params: Params) -> None:
    """Writes the reference's parameters, and returns when they are on disk."""
    if self.has_reference():
      raise FileExistsError(f'{self._reference} exists; the reference of a run is written once')
    self._refuse_read_only()
    handler = Handler()
    handler.checksums = _leaves(checksums(params))
    with naming(self._reference), ocp.Checkpointer(handler) as writer:
      writer.save(self._reference, args=Save(params))

  def restore_reference(self, shardings: Any = None) -> Params:
    """As `restore_params`, of the reference."""
    if not self.has_reference():
      raise FileNotFoundError(f'{self._reference} not found: this run saved no reference')
    try:
      return self._read(self._reference, _abstract(self._saved(self._reference), shardings))
    except _SOUND:
      raise
    except Exception as error:
      message = f'{self._reference} cannot be read ({_line(error)}); remove it and start again'
      raise OSError(message) from error

  def wait(self) -> None:
    """Returns when what was saved is on disk."""
    with naming(self._steps_folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def _first_readable(
    self, read: Callable[[Any], Any], step: int | None
  ) -> tuple[Any, dict[str, Any]]:
    steps = self.steps()
    if step is not None and step not in steps:
      raise FileNotFoundError(f'no checkpoint of step {step} in {self._steps_folder}; have {steps}')
    damaged = {}
    for candidate in [step] if step is not None else reversed(steps):
      try:
        found = read(self._path(candidate) / 'state'), self._meta(candidate)
      except _SOUND:
        raise
      except Exception as error:  # Orbax and TensorStore raise whatever they stumble over
        damaged[candidate] = error
        logging.warning('checkpoint %s is damaged: %s', self._path(candidate), _line(error))
        continue
      if not self._read_only:
        self._move_aside(damaged)
      return found
    if not damaged:
      raise FileNotFoundError(f'no checkpoint in {self._steps_folder}')
    names = ', '.join(f'{self._path(one)} ({_line(error)})' for one, error in damaged.items())
    raise OSError(f'no readable checkpoint: {names}')

  def _move_aside(self, steps: Collection[int]) -> None:
    """Frees the names of damaged checkpoints: the run will reach these steps again.

    An object store cannot rename a folder. There they lose their marker, and Orbax deletes what
    has none.
    """
    for step in steps:
      self._keep.forget(step)
      if jax.process_index() == 0:
        if is_url(self._steps_folder):
          (self._path(step) / _COMMITTED).unlink()
          continue
        aside = f'{step}.corrupt'
        count = len(list(self._steps_folder.glob(f'{aside}*')))
        self._path(step).rename(self._steps_folder / (f'{aside}.{count}' if count else aside))
    if steps:
      ocp.multihost.sync_global_processes('jaxpref:damaged checkpoints moved')
      self._manager.reload()

  def _path(self, step: int) -> Any:
    return self._steps_folder / str(step)

  def _meta(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

  def _saved(self, path: Any) -> dict[str, Any]:
    """The stored tree, with shapes and dtypes as leaves; raises OSError for damaged files."""

    def look() -> dict[str, Any]:
      check_sizes(path)
      return self._handler.metadata(path).tree

    return hosts.together(look)

  def _read(self, path: Any, tree: Any) -> Any:
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    args = Restore(item=tree, restore_args=how, partial_restore=True)
    found = hosts.together(lambda: self._handler.restore(path, args=args))
    try:
      sums = _leaves(checksums(found))
    except ValueError as error:
      raise _Mismatch(f'{path} is read, and cannot be computed with: {error}') from error
    hosts.together(lambda: check_bits(path, sums))
    return found

  def _refuse_read_only(self) -> None:
    if self._read_only:
      raise ValueError(f'{self._steps_folder} was opened read_only; open it without to save')


class _Mismatch(ValueError):
  """The checkpoint is sound but is not what the caller asks for."""


# The caller's or the machine's fault, not the file's.
_SOUND = (_Mismatch, MemoryError, jax.errors.JaxRuntimeError)


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _leaves(tree: Any) -> dict[str, Any]:
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nest(tree: Any) -> dict[str, Any]:
  """Nested dicts under the keys, field names and indices on the way to each leaf."""
  nested: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    node = nested
    *folders, last = (_name((key,)) for key in path)
    for key in folders:
      node = node.setdefault(key, {})
    node[last] = leaf
  return nested


def _abstract(saved: Any, shardings: Any) -> Any:
  if shardings is None:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    saved,
    shardings,
  )


def _check_same(path: Any, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  wrong = [f'{name} is saved but not asked for' for name in saved if name not in wanted]
  wrong += [f'{name} is asked for but not saved' for name in wanted if name not in saved]
  for name in saved.keys() & wanted.keys():
    have, want = saved[name], wanted[name]
    if tuple(have.shape) != tuple(want.shape) or np.dtype(have.dtype) != np.dtype(want.dtype):
      wrong.append(
        f'{name} is saved as {have.dtype}{list(have.shape)}, '
        f'asked for as {want.dtype}{list(want.shape)}'
      )
  if wrong:
    rest = f'\n  and {len(wrong) - _NAMED} more' if len(wrong) > _NAMED else ''
    listed = '\n  '.join(sorted(wrong)[:_NAMED])
    raise _Mismatch(
      f'{path} holds another state:\n  {listed}{rest}\n'
      'Build the state with the model and optimizer of the config that the run was started with.'
    )


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error).strip()[:200]}'.replace('\n', ' ')
