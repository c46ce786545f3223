"""What every test runs under: eight fake CPU devices, no network, strict ranks, a cache of its own.

All of it has to be in the environment before jax is first imported, so it stands above the imports;
programs that tests start inherit it.
"""

import gc
import itertools
import os
import pathlib
import shutil
import tempfile

import pytest

os.environ['JAX_PLATFORMS'] = os.environ.get('JAXPREF_TESTS_ON', 'cpu')
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['MPLBACKEND'] = 'Agg'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = '0'  # a test measures what it compiles
os.environ['JAXPREF_CACHE'] = tempfile.mkdtemp(prefix='jaxpref-tests-')

DEVICES = '--xla_force_host_platform_device_count=8'
if DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES}'.strip()


# A compiled program takes several memory mappings, of which Linux gives a process 65,530: beyond
# them the compiler crashes. So programs are dropped where many have come together.
MAPPINGS, LOOK_EVERY = pathlib.Path('/proc/self/maps'), 50
run_tests = itertools.count(1)


def pytest_runtest_teardown():
  if next(run_tests) % LOOK_EVERY == 0 and MAPPINGS.is_file():
    if MAPPINGS.read_bytes().count(b'\n') > 25_000:
      import jax

      jax.clear_caches()
      gc.collect()


def pytest_unconfigure():
  shutil.rmtree(os.environ['JAXPREF_CACHE'], ignore_errors=True)


@pytest.fixture(scope='module')
def saved_run(tmp_path_factory):
  """A finished run with the checkpoints of steps 1 and 2, and a reference; not to be touched."""
  from tests.states import save_run

  folder = tmp_path_factory.mktemp('saved')
  save_run(folder)
  return folder


@pytest.fixture
def copied_run(saved_run, tmp_path):
  return shutil.copytree(saved_run, tmp_path / 'run')
