"""What every test runs under: eight fake CPU devices, no network, strict ranks, a cache of its own.

All of it has to be in the environment before jax is first imported, so it stands above the imports;
programs that tests start inherit it.
"""

import os
import shutil
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['MPLBACKEND'] = 'Agg'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['JAXPREF_CACHE'] = tempfile.mkdtemp(prefix='jaxpref-tests-')

DEVICES = '--xla_force_host_platform_device_count=8'
if DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES}'.strip()


def pytest_unconfigure():
  shutil.rmtree(os.environ['JAXPREF_CACHE'], ignore_errors=True)
