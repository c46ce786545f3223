"""Says which host hangs, and in what, while it still does.

Every process times its own parts of a step against their median. Where one host hangs, the others
soon wait for it: those that report 'step' wait, the one that reports something else is why.
"""

import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import jax
from absl import logging

KNOWN = 5  # times that a part must have been timed before it is judged
KEPT = 100  # times that the median is of
LEAST = 30.0  # seconds; less is not worth a word


class Watchdog:
  """`with Watchdog(10.0) as watch: watch('data', step); ...; watch('step', step); ...`.

  Args:
    factor: a part that lasts this many times its median is reported, and again whenever it has
      lasted twice as long; 0: never.
    least: seconds below which nothing is reported.
    clock: the time in seconds.
    report: is given what there is to say.
  """

  def __init__(
    self,
    factor: float,
    *,
    least: float = LEAST,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] = logging.warning,
  ):
    if factor and factor < 2:
      raise ValueError(
        f'config.log.stuck={factor}: give 2 or more times the median, or 0 for never'
      )
    self._factor, self._least, self._clock, self._report = factor, least, clock, report
    self._lock, self._ended = threading.Lock(), threading.Event()
    self._times: dict[str, deque[float]] = {}
    self._part, self._step, self._began, self._limit = '', 0, clock(), float('inf')
    self._thread: threading.Thread | None = None

  def __enter__(self) -> 'Watchdog':
    if self._factor:
      self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
      self._thread.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._ended.set()
    if self._thread:
      self._thread.join()

  def __call__(self, part: str, step: int) -> None:
    """The part that went on has ended, and `part` of `step` begins; '' is none."""
    with self._lock:
      now = self._clock()
      if self._part:
        self._times.setdefault(self._part, deque(maxlen=KEPT)).append(now - self._began)
      self._part, self._step, self._began = part, step, now
      known = self._times.get(part, ())
      self._limit = float('inf')
      if part and self._factor and len(known) >= KNOWN:
        self._limit = max(self._least, self._factor * statistics.median(known))

  def look(self) -> None:
    """Reports the part that goes on if it has lasted too long; the thread does so by itself."""
    with self._lock:
      part, step, lasted = self._part, self._step, self._clock() - self._began
      if lasted < self._limit:
        return
      self._limit = 2 * lasted
      usual = statistics.median(self._times[part])
    self._report(
      f'{socket.gethostname()} (process {jax.process_index()}): step {step} hangs in {part!r} for '
      f'{lasted:.0f} s, {lasted / max(usual, 1e-9):.0f} times the median of {usual:.2g} s'
    )

  def _watch(self) -> None:
    while not self._ended.wait(self._least / 4):
      self.look()
