"""What each of several processes has to say: <workdir>/logs/<process>.log, opened by every start.

Process 0's progress and summary are on its standard output; the others say only what is here and
on their standard error.
"""

import logging
import os
import socket
from types import TracebackType
from typing import Any

import jax

from jaxpref.storage import Growing

FORM = '%(asctime)s %(levelname)s %(name)s: %(message)s'


class HostLog:
  """`with HostLog() as log: ... log.open(workdir)`: log messages, and the error that ends it, too.

  With one process there is no file.
  """

  _handler: logging.StreamHandler | None = None

  def __enter__(self) -> 'HostLog':
    return self

  def open(self, workdir: Any) -> None:
    if jax.process_count() == 1:
      return
    index = jax.process_index()
    (workdir / 'logs').mkdir(exist_ok=True)
    # Each message is flushed: they are few.
    self._handler = logging.StreamHandler(Growing(workdir / 'logs' / f'{index}.log'))
    self._handler.setFormatter(logging.Formatter(FORM))
    logging.getLogger().addHandler(self._handler)
    where = f'{socket.gethostname()}, pid {os.getpid()}'
    devices = f'{jax.local_device_count()} of {jax.device_count()} {jax.devices()[0].device_kind}'
    self._say(logging.INFO, f'process {index} of {jax.process_count()} on {where}: {devices}')

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._handler is None:
      return
    if error is None:
      self._say(logging.INFO, 'ended')
    else:
      self._say(logging.ERROR, f'ended by {type(error).__name__}: {error}', error)
    logging.getLogger().removeHandler(self._handler)
    self._handler.close()

  def _say(self, level: int, message: str, error: BaseException | None = None) -> None:
    """To the file alone: standard error hears of it elsewhere."""
    assert self._handler is not None
    trace = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord('jaxpref', level, '', 0, message, None, trace)
    self._handler.emit(record)
