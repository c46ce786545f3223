"""Traces of steps, and programs that outlive their process."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxpref.train.profiler import Profiler


def traces(folder):
  return sorted(folder.rglob('*.xplane.pb'))


def run(profiler, steps):
  step = jax.jit(lambda x: x + 1)
  for n in steps:
    profiler.before(n)
    profiler.after(n, step(jnp.zeros(3)))


def test_steps_in_the_range_are_traced_and_others_are_not(tmp_path):
  profiler = Profiler(tmp_path, 3, 2)
  run(profiler, [1, 2])
  assert not list(tmp_path.iterdir())
  run(profiler, [3])
  with pytest.raises(RuntimeError):  # one is under way
    jax.profiler.start_trace(tmp_path)
  run(profiler, [4])
  assert len(traces(tmp_path)) == 1 and traces(tmp_path)[0].stat().st_size > 0
  run(profiler, [5, 6])
  profiler.close()
  assert len(traces(tmp_path)) == 1


def test_a_run_that_ends_within_the_range_leaves_its_trace(tmp_path):
  profiler = Profiler(tmp_path, 1, 9)
  run(profiler, [5])
  profiler.close()
  assert len(traces(tmp_path)) == 1


@pytest.mark.parametrize('given', [(0, 1), (2, 0)])
def test_a_range_without_steps_is_refused(tmp_path, given):
  with pytest.raises(ValueError, match='first step, how many'):
    Profiler(tmp_path, *given)


PROGRAM = """
import jax, jax.numpy as jnp
from jaxpref.train.programs import keep_programs
keep_programs()
jax.jit(lambda x: jnp.linalg.svd(x) if x.ndim else x)(jnp.eye(3))
"""


def kept(folder, **environment):
  environment = {
    **os.environ,
    'JAXPREF_CACHE': str(folder),
    'JAX_ENABLE_COMPILATION_CACHE': '1',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    **environment,
  }
  subprocess.run([sys.executable, '-c', PROGRAM], env=environment, check=True)
  return sorted(path.name for path in folder.glob('programs/*-cache'))


def test_compiled_programs_are_kept_in_the_cache_unless_jax_is_told_otherwise(tmp_path):
  first = kept(tmp_path / 'a')
  assert first and kept(tmp_path / 'a') == first  # read again, not added to
  assert not kept(tmp_path / 'b', JAX_ENABLE_COMPILATION_CACHE='0')
  assert not kept(tmp_path / 'c', JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'elsewhere'))
  assert any((tmp_path / 'elsewhere').iterdir())
