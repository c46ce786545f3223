"""A small state and a run that saved it, for tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.state import init_state


def make_state(seed=0, *, ema=True):
  """float32 and bfloat16 leaves, under an optimizer with empty and masked parts."""
  key = jax.random.key(seed)
  params = {
    'embed': jax.random.normal(key, (16, 8)),
    'layers': {'w': jax.random.normal(key, (2, 8, 8)), 'scale': jnp.ones((2, 8), jnp.bfloat16) / 3},
  }
  decayed = {'embed': False, 'layers': {'w': True, 'scale': False}}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), decayed))
  return init_state(params, tx.init(params), ema=ema)._replace(step=jnp.asarray(seed, jnp.int32))


def assert_equal(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_run(folder):
  checkpoints = Checkpoints(folder)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {'position': step}, {'accuracy': 0.5 + step / 10})
  checkpoints.save_reference(make_state(7).params)
  checkpoints.close()
