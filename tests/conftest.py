"""Eight CPU devices for every test, set before anything imports jax."""

import os
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
# The command line keeps compiled programs; tests must not find those of another
# run, nor of the worker beside them.
_CACHE = tempfile.TemporaryDirectory()
os.environ['XDG_CACHE_HOME'] = _CACHE.name
# But programs are compiled once for all workers, who find this in what they
# inherit, and for all processes that tests start.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{_CACHE.name}/compiled'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
