"""The Pallas kernel, interpreted on a CPU: values and gradients of dense attention, tiles skipped.

Where libtpu is installed it is compiled for TPUs as well, which needs none of them.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies

from jaxpref.models import ATTENTION, Model, kernel, preset
from jaxpref.models.attention import visible, within
from jaxpref.models.blocked import Form
from jaxpref.models.tiles import needed, visits
from jaxpref.sharding import make_mesh
from jaxpref.typing import Layout
from tests.attentions import WIDTH, dense, drawn, rows


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(pl, 'pallas_call', functools.partial(pl.pallas_call, interpret=True))


def results(how, arrays, layout, window, limit):
  q, k, v, given = arrays
  real = (layout.examples > 0)[..., None, :, None]

  def weighted(q, k, v):
    out = how(Form(float(WIDTH), limit), q, k, v, layout, window) * real
    return jnp.sum(out * given), out

  return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)


close = functools.partial(np.testing.assert_allclose, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize(
  ('length', 'longest', 'window', 'limit'),
  [(100, 40, 9, 2.0), (300, 40, None, None), (600, 180, 50, 2.0)],
)
def test_values_and_gradients_are_those_of_dense_attention(
  interpreted, length, longest, window, limit
):
  arrays, layout = jax.tree.map(lambda x: x[None], drawn(length, length, 2, longest))
  window = None if window is None else jnp.int32(window)
  ours, theirs = (
    results(how, arrays, layout, window, limit) for how in (kernel.attend_rows, dense)
  )
  jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize('sizes', [{'fsdp': 4, 'tensor': 2}, {'data': 2, 'tensor': 4}])
def test_groups_and_heads_stay_where_the_mesh_puts_them(interpreted, sizes):
  """Two key heads over four devices: they are repeated there, and their gradients added."""
  arrays, layout = drawn(5, 130, count=4)
  arrays, layout = jax.tree.map(lambda x: x[:, None], (arrays, layout))
  alone = results(dense, arrays, layout, None, None)
  with jax.set_mesh(make_mesh(sizes)):
    jax.tree.map(close, results(kernel.attend_rows, arrays, layout, None, None), alone)


def test_padding_gets_nothing_and_gives_nothing(interpreted):
  (q, k, v, given), layout = jax.tree.map(lambda x: x[None], drawn(0, 140))
  padding = (layout.examples == 0)[:, :, None, :, None]
  attend = jax.jit(functools.partial(kernel.attend_rows, Form(8.0)))
  out, pull = jax.vjp(lambda *x: attend(*x, layout, None), q, k, v)
  assert bool(padding.any())
  np.testing.assert_array_equal(np.where(padding, out, 0), 0)
  for cotangent in pull(given * padding):
    np.testing.assert_array_equal(cotangent, 0)


@pytest.mark.parametrize('window', [None, 60])
@pytest.mark.parametrize('seed', range(2))
def test_a_tile_is_skipped_only_where_nobody_sees_anything(seed, window):
  layout = rows(np.random.default_rng(seed), 3, 512, longest=150)
  window = None if window is None else jnp.int32(window)
  seen = visible(layout, layout)
  if window is not None:
    seen &= within(layout, layout, window)
  tiles = seen.reshape(3, 8, 64, 16, 32).any((2, 4))
  found = needed(layout, window, 64, 32)
  assert bool((found | ~tiles).all())
  assert found.sum() < 2 * tiles.sum()  # and most that nobody needs are


def test_aligned_branches_visit_their_prompt_and_themselves_only():
  """Prompt, chosen, rejected of 64 tokens each, twice, and 128 of padding, in tiles of 64."""
  kinds = np.repeat([0, 1, 2, 0, 1, 2, 0, 0], 64)
  examples = np.repeat([1, 1, 1, 2, 2, 2, 0, 0], 64)
  positions = np.arange(512) % 64 + 64 * (kinds > 0)
  layout = Layout(*(jnp.asarray(x, jnp.int32)[None] for x in (positions, examples, kinds)))
  order, counts = visits(needed(layout, None, 64, 64))
  met = [row[:n].tolist() for row, n in zip(order[0], counts[0], strict=True)]
  assert met == [[0], [0, 1], [0, 2], [3], [3, 4], [3, 5], [], []]
  assert order[0, 2].tolist() == [0, 2, 2, 2, 2, 2, 2, 2]  # nothing new is fetched


def topology(name: str):
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  try:
    return topologies.get_topology_desc(name, 'tpu').devices
  except RuntimeError as error:
    pytest.skip(f'libtpu is not installed: {error}')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1'])
def test_a_model_compiles_for_tpus_with_its_heads_and_groups_divided(name):
  """Each device's kernels read 2 of 4 key heads and 1 of 2 groups: nothing is on all of them."""
  mesh = make_mesh({'fsdp': 2, 'tensor': 2}, topology(name))
  config = preset('tiny', num_heads=8, num_kv_heads=4, head_dim=64, windows=(128, None))
  model = Model(config, dtype='bfloat16', attention=ATTENTION['kernel'], remat='full')
  ints = jax.ShapeDtypeStruct((2, 1, 2048), jnp.int32)
  loss = lambda p, x, at: model.hidden(p, x, at).astype(jnp.float32).sum()  # noqa: E731
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss)).lower(model.param_shapes(), ints, Layout(*[ints] * 3))
    text = compiled.compile().as_text()
  kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
  assert len(kernels) == 4  # forward, again in the backward pass, queries, keys
  assert all(re.search(r'bf16\[1,2,2,2048,64\]', line) for line in kernels)
  assert not re.search(r'f32\[[\d,]*2048,2048\]', text)
