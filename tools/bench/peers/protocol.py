"""How the bench speaks to a worker: JSON lines, `MARK` before each one that the worker writes.

A worker says when it is ready, then takes as many steps as each line of its input asks for and
says what they took. It waits in between, so that two workers may take turns on one machine. Only
the standard library is used here: peers run it in environments of their own.
"""

import json
import platform
import resource
import sys
import time
from importlib import metadata

MARK = '@bench '


def say(**values):
  print(MARK + json.dumps(values), flush=True)


def asked():
  """The number of steps to take next, or None where there are no more."""
  line = sys.stdin.readline().strip()
  return int(line) if line else None


def versions(*packages):
  found = {'python': platform.python_version()}
  for package in packages:
    found[package] = metadata.version(package)
  return found


def peak_gib():
  """The most memory that this process has held, in GiB."""
  if sys.platform == 'linux':  # its getrusage begins with what the process held before exec
    with open('/proc/self/status', encoding='ascii') as lines:
      return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2**20
  scale = 2**30 if sys.platform == 'darwin' else 2**20
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def spelt(ids):
  """Token ids as text: 't17 t4'."""
  return ' '.join(f't{i}' for i in ids)


def variety(completions):
  """GRPO's reward, of texts: how many different words each has, a share of 64."""
  return [len(set(text.split())) / 64 for text in completions]


class Clock:
  """Seconds, and those of all cores together, since it was made."""

  def __init__(self):
    self._wall, self._cpu = time.perf_counter(), time.process_time()

  def read(self):
    return {
      'seconds': time.perf_counter() - self._wall,
      'cpu_seconds': time.process_time() - self._cpu,
    }


def turns(notes, held=peak_gib):
  """Yields, for each step to take, the list that its loss belongs in, until the input ends.

  A step is over when the next is asked for. `notes` are said after each round, and `held()`, the
  most memory in use so far in GiB.
  """
  count = asked()
  while count is not None:
    clock, losses = Clock(), []
    for _ in range(count):
      yield losses
    taken = clock.read()
    say(steps=count, losses=losses, peak_gib=held(), **taken, **notes)
    count = asked()


def serve(step, notes, held=peak_gib):
  """Takes the steps, each `step() -> loss` (or None)."""
  for losses in turns(notes, held):
    losses.append(step())
