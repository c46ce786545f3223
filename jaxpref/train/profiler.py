"""An xprof trace of a few steps, for `xprof` or TensorBoard's profile tab."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
  """Traces `count` steps from step `first` on into `folder`; steps count from 1, as in metrics.

  Raises:
    ValueError: a range that holds no step.
  """

  def __init__(self, folder: Path, first: int, count: int):
    if first < 1 or count < 1:
      raise ValueError(
        f'config.profile must be (first step, how many), both at least 1; got {(first, count)}'
      )
    self.folder, self.first, self.stop = folder, first, first + count
    self._running = False

  def before(self, step: int) -> None:
    """A run that resumes within the range traces what is left of it."""
    if self.first <= step < self.stop and not self._running:
      jax.profiler.start_trace(self.folder)
      self._running = True

  def after(self, step: int, results: Any) -> None:
    """`results`: of the step, waited for where the trace ends with it."""
    if self._running and step + 1 == self.stop:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends a trace that the run did not live to end."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
