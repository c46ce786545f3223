"""A host that hangs is named while it does, with what it hangs in."""

import threading

import pytest

from jaxpref.train.watchdog import KNOWN, Watchdog


class Time:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def steps(watch, clock, data=1.0, step=2.0, count=KNOWN):
  for n in range(count):
    watch('data', n)
    clock.now += data
    watch('step', n)
    clock.now += step


def test_a_part_is_held_against_its_own_median():
  clock, said = Time(), []
  watch = Watchdog(10.0, least=0.0, clock=clock, report=said.append)
  steps(watch, clock)
  watch('data', 7)
  clock.now += 9.9  # of a median of 1
  watch.look()
  assert not said
  clock.now += 0.2
  watch.look()
  watch.look()  # once, until it has lasted twice as long
  (line,) = said
  assert "(process 0): step 7 hangs in 'data' for 10 s, 10 times the median of 1 s" in line
  clock.now += 11
  watch.look()
  assert len(said) == 2 and 'for 21 s' in said[1]
  watch('step', 7)
  clock.now += 19  # of a median of 2
  watch.look()
  assert len(said) == 2
  watch('', 7)
  clock.now += 1000
  watch.look()
  assert len(said) == 2


def test_nothing_is_said_of_what_is_short_or_not_known_yet():
  clock, said = Time(), []
  watch = Watchdog(10.0, least=30.0, clock=clock, report=said.append)
  steps(watch, clock, data=0.1, count=KNOWN - 1)
  watch('data', 4)
  clock.now += 100
  watch.look()  # the median of too few
  watch('data', 5)
  clock.now += 29
  watch.look()  # 290 times as long, but not long
  assert not said
  clock.now += 1
  watch.look()
  assert len(said) == 1


def test_it_is_said_while_the_step_still_hangs():
  heard = threading.Event()
  with Watchdog(2.0, least=0.02, report=lambda line: heard.set()) as watch:
    for n in range(KNOWN + 1):
      watch('step', n)
    assert heard.wait(30)
  assert not any(thread.name == 'watchdog' for thread in threading.enumerate())


def test_never_is_a_choice():
  clock, said = Time(), []
  with Watchdog(0.0, least=0.0, clock=clock, report=said.append) as watch:
    steps(watch, clock)
    watch('data', 7)
    clock.now += 1000
    watch.look()
  assert not said
  with pytest.raises(ValueError, match=r'stuck=1\.5: give 2 or more'):
    Watchdog(1.5)
