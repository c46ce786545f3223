"""Calls with a time limit.

Python cannot stop a thread, and a reward may hold a device, a connection or a closure that no other
process can have. So a call that runs out of time is left alone: its thread goes on in the
background (it ends with the program) and what it returns is thrown away. When `MAX_ABANDONED` of
them are still running, no further call is started until one ends.

The thread is another one than the caller's: jax's contexts (`jax.set_mesh`, `jax.enable_x64`) are
entered inside the function that needs them, or there is no limit.

A call that holds Python's lock all along, inside C code, cannot even be left: bound it in a process
of its own, as `regex` does.
"""

import threading
from collections.abc import Callable
from typing import Any

MAX_ABANDONED = 16

_abandoned: list[threading.Thread] = []


def limited(function: Callable[[], Any], seconds: float | None) -> Any:
  """What `function()` returns, or raises, within `seconds`; None is no limit, on this thread.

  Raises:
    TimeoutError: there is no answer in time, or too many calls are still running.
  """
  if seconds is None:
    return function()
  _abandoned[:] = [thread for thread in _abandoned if thread.is_alive()]
  if len(_abandoned) >= MAX_ABANDONED:
    raise TimeoutError(
      f'not called: {len(_abandoned)} calls that ran out of time are still running, and they '
      'cannot be stopped'
    )
  outcome: list[Any] = []

  def call() -> None:
    try:
      outcome.append((True, function()))
    except BaseException as error:
      outcome.append((False, error))

  thread = threading.Thread(target=call, daemon=True, name='jaxpref reward')
  thread.start()
  thread.join(min(seconds, threading.TIMEOUT_MAX))
  if not outcome:
    _abandoned.append(thread)
    raise TimeoutError(f'no answer within {seconds:.3g} s; the call goes on in the background')
  returned, value = outcome[0]
  if returned:
    return value
  raise value
