"""Where metrics go: `metrics.jsonl`, TensorBoard and Weights & Biases behind one small protocol.

A killed run repeats the steps after its last checkpoint; opening the writers removes what they had
written about those steps, so that every step stands once in each file.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from jaxpref.storage import Growing, before, is_url, naming, open_path, write_atomically
from jaxpref.train.workdir import Workdir


class Writer(Protocol):
  def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

  def flush(self) -> None:
    """Comes before each checkpoint: what was written of the steps before it has to last."""

  def close(self) -> None: ...


class Writers:
  """Several writers as one."""

  def __init__(self, writers: Sequence[Writer] = ()):
    self.writers = tuple(writers)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    for writer in self.writers:
      writer.write(step, metrics)

  def flush(self) -> None:
    for writer in self.writers:
      writer.flush()

  def close(self) -> None:
    for writer in self.writers:
      writer.close()


def open_writers(
  workdir: Workdir,
  resume_step: int = 0,
  *,
  tensorboard: bool = True,
  wandb: str = '',
  config: Mapping[str, Any] | None = None,
) -> Writers:
  """The run's writers, with everything after `resume_step` (0: a new run) removed.

  `wandb` names a Weights & Biases project, '' is off; `config` (plain values) is shown there.
  Processes other than 0 get a writer that does nothing.
  """
  if jax.process_index() != 0:
    return Writers()
  writers: list[Writer] = []
  if wandb:  # first, for it may be missing
    writers.append(Wandb(workdir.path, wandb, config or {}))
  if tensorboard:
    writers.append(TensorBoard(workdir.tensorboard, resume_step))
  return Writers([*writers, JsonLines(workdir.metrics, resume_step)])


class JsonLines:
  """One JSON object a line: `step` and the metrics.

  Floats round-trip exactly; nan and infinities, which JSON lacks, are the strings 'nan', 'inf' and
  '-inf'. Every line reaches a file at once; at gs:// the object is written anew by `flush`.
  """

  def __init__(self, path: Any, resume_step: int = 0):
    self._file = Growing(path, before('step', resume_step + 1))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    line = {'step': int(step)} | {name: _jsonable(value) for name, value in metrics.items()}
    self._file.write(json.dumps(line, allow_nan=False) + '\n')

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self.flush()


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of a `metrics.jsonl`; what a killed run left half-written is skipped."""
  text = open_path(path).read_bytes().decode(errors='replace')
  return [line for line in map(_parse, text.splitlines()) if line is not None]


class TensorBoard:
  """Event files; a reader drops earlier events from `resume_step` + 1 on.

  Written by the caller: tensorboardX's own thread would die of a full disk, and its queue wait.
  """

  def __init__(self, folder: Any, resume_step: int = 0):
    from tensorboardX.event_file_writer import EventsWriter  # slow to import: only runs need it
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._folder, self._event = folder, Event
    with naming(folder):
      if not is_url(folder):
        folder.mkdir(parents=True, exist_ok=True)
      # The suffix keeps apart files opened in the same second, which is all that names them else.
      self._events = EventsWriter(f'{folder}/events', f'.{resume_step}')
      start = SessionLog(status=SessionLog.START)
      self._events.write_event(Event(step=resume_step + 1, session_log=start))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    from tensorboardX.summary import scalar

    with naming(self._folder):
      for name, value in metrics.items():
        event = self._event(wall_time=time.time(), step=int(step))
        event.summary.CopyFrom(scalar(name, float(value)))
        self._events.write_event(event)

  def flush(self) -> None:
    with naming(self._folder):
      self._events.flush()

  def close(self) -> None:
    with naming(self._folder):
      self._events.close()


class Wandb:
  """One Weights & Biases run per workdir: its id is kept there, in `wandb_id`.

  After a resume the service ignores the steps that it already has; they are the same.
  """

  def __init__(self, folder: Any, project: str, config: Mapping[str, Any]):
    try:
      import wandb
    except ImportError:
      raise ImportError(
        f'config.log.wandb={project!r} needs the wandb package: `pip install jaxpref[wandb]`, '
        "or set config.log.wandb=''"
      ) from None
    known = folder / 'wandb_id'
    if not known.exists():
      write_atomically(known, secrets.token_hex(8))
    self._run = wandb.init(
      project=project,
      name=folder.name,
      id=known.read_text(encoding='utf-8'),
      resume='allow',
      dir=None if is_url(folder) else str(folder),
      config=dict(config),
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log({name: float(value) for name, value in metrics.items()}, step=int(step))

  def flush(self) -> None:
    pass

  def close(self) -> None:
    self._run.finish()


def _jsonable(value: float) -> int | float | str:
  if isinstance(value, int):
    return value
  number = float(value)
  return number if math.isfinite(number) else str(number)


def _parse(line: str) -> dict[str, float] | None:
  try:
    values = json.loads(line)
    return {name: float(x) if isinstance(x, str) else x for name, x in values.items()}
  except (ValueError, AttributeError):
    return None
