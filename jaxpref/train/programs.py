"""Compiled programs, kept between runs: the second start of the same work compiles little."""

import os

import jax

from jaxpref.data.cache import default_folder

WORTH = 0.2  # seconds; what compiles faster is not kept


def keep_programs() -> None:
  """Lets jax keep compiled programs in `$JAXPREF_CACHE`/programs, or ~/.cache/jaxpref/programs.

  jax's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder,
  JAX_ENABLE_COMPILATION_CACHE=0 turns it off. A folder that cannot be written costs a warning.
  """
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    jax.config.update('jax_compilation_cache_dir', str(default_folder() / 'programs'))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', WORTH)
