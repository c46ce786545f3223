"""The promises of conftest.py hold in a test."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest


def test_eight_cpu_devices():
  assert [device.platform for device in jax.devices()] == ['cpu'] * 8


def test_rank_promotion_raises():
  with pytest.raises(ValueError, match='rank'):
    jnp.ones((2, 3)) + jnp.ones(3)


def test_warnings_are_errors():
  with pytest.raises(UserWarning):
    warnings.warn('a warning', UserWarning, stacklevel=1)


def test_the_cache_is_not_the_users():
  assert 'jaxpref-tests-' in os.environ['JAXPREF_CACHE']
  assert os.path.isdir(os.environ['JAXPREF_CACHE'])


@pytest.mark.parametrize('heavy', ['tensorflow_datasets', 'grain', 'matplotlib', 'flax'])
def test_importing_jaxpref_loads_nothing_heavy(heavy):
  program = f'import sys, jaxpref; sys.exit({heavy!r} in sys.modules)'
  subprocess.run([sys.executable, '-c', program], check=True)
