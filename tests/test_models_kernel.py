"""The Pallas kernels, interpreted on a CPU: values and gradients of dense attention, tiles skipped.

Where libtpu or jax's CUDA plugin is installed they are compiled for TPUs and GPUs as well, which
needs none of them. JAXPREF_TESTS_ON=cuda or tpu runs these tests there, compiled.
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
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxpref.models import Model, blocked, kernel_gpu, kernel_tpu, preset, row_attention, spans
from jaxpref.models.attention import visible, within
from jaxpref.models.blocked import ByRows, Form
from jaxpref.models.kernel import FORWARD, PRODUCTS, TO_KEYS, TO_QUERIES
from jaxpref.models.tiles import needed, visits
from jaxpref.sharding import make_mesh
from jaxpref.typing import Layout
from tests.attentions import WIDTH, dense, drawn, rows

pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')
KERNELS = {'gpu': kernel_gpu.attend_rows, 'tpu': kernel_tpu.attend_rows}

TRITON = '__gpu$xla.gpu.triton'
GPU = """gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.4
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 1536
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 102400 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 101376
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2000000000000 l2_cache_size: 40000000 device_memory_size: 80000000000
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "NVIDIA A100"
"""  # a small one of each kind


@pytest.fixture(params=KERNELS)
def attend_rows(request, monkeypatch):
  """A kernel, interpreted, or compiled where it belongs."""
  if jax.default_backend() not in ('cpu', request.param):
    pytest.skip(f'for {request.param}, this is {jax.default_backend()}')
  if jax.default_backend() == 'cpu':
    monkeypatch.setattr(pl, 'pallas_call', functools.partial(pl.pallas_call, interpret=True))
  with jax.default_matmul_precision('highest'):
    yield KERNELS[request.param]


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
  attend_rows, length, longest, window, limit
):
  arrays, layout = jax.tree.map(lambda x: x[None], drawn(length, length, 2, longest))
  window = None if window is None else jnp.int32(window)
  ours, theirs = (results(how, arrays, layout, window, limit) for how in (attend_rows, dense))
  jax.tree.map(close, ours, theirs)


def test_in_bfloat16_nothing_but_rounding_differs(attend_rows):
  """Against blocked attention of the same numbers in float32; bfloat16 has 8 bits."""
  arrays, layout = jax.tree.map(lambda x: x[None], drawn(3, 150, count=1))
  arrays = [x.astype(jnp.bfloat16) for x in arrays]
  (_, out), gradients = results(attend_rows, arrays, layout, jnp.int32(20), None)
  exact = results(
    blocked.attend_rows, [jnp.float32(x) for x in arrays], layout, jnp.int32(20), None
  )
  for ours, theirs in zip((out, *gradients), (exact[0][1], *exact[1]), strict=True):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(ours), theirs, atol=2.0**-6 * float(abs(theirs).max()))


@pytest.mark.parametrize('sizes', [{'fsdp': 4, 'tensor': 2}, {'data': 2, 'tensor': 4}])
def test_groups_and_heads_stay_where_the_mesh_puts_them(attend_rows, sizes):
  """Two key heads over four devices: they are repeated there, and their gradients added."""
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  arrays, layout = drawn(5, 130, count=4)
  arrays, layout = jax.tree.map(lambda x: x[:, None], (arrays, layout))
  alone = results(dense, arrays, layout, None, None)
  with jax.set_mesh(make_mesh(sizes)):
    jax.tree.map(close, results(attend_rows, arrays, layout, None, None), alone)


def test_padding_gets_nothing_and_gives_nothing(attend_rows):
  (q, k, v, given), layout = jax.tree.map(lambda x: x[None], drawn(0, 140))
  padding = (layout.examples == 0)[:, :, None, :, None]
  attend = jax.jit(functools.partial(attend_rows, Form(8.0)))
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


def test_kernels_are_chosen_where_they_run(monkeypatch):
  plain = ByRows(blocked.attend_rows)
  assert [row_attention('auto', platform) for platform in ('cpu', 'gpu', 'tpu')] == [
    spans.attend, ByRows(kernel_gpu.attend_rows), ByRows(kernel_tpu.attend_rows),
  ]  # fmt: skip
  assert row_attention('blocked', 'gpu') == row_attention('blocked', 'tpu') == plain
  monkeypatch.setattr(kernel_gpu, 'available', lambda: False)
  assert row_attention('auto', 'gpu') == plain
  # And jax says what it lacks.
  assert row_attention('kernel', 'gpu') == ByRows(kernel_gpu.attend_rows)


def gradient_of_rows(width: int, dtype: str, sharding=None):
  """Value and gradient of attention in 2 rows of 500 tokens, and what they are lowered with."""
  arrays = [jax.ShapeDtypeStruct((1, 2, heads, 500, width), dtype) for heads in (4, 2, 2)]
  arrays += [jax.ShapeDtypeStruct((1, 2, 500), 'int32')] * 3
  arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]

  def total(q, k, v, *layout):
    out = kernel_gpu.attend_rows(Form(8.0, 30.0), q, k, v, Layout(*layout), jnp.int32(100))
    return out.astype(jnp.float32).sum()

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))).trace(*arrays)


@pytest.mark.parametrize(('width', 'dtype'), [(64, 'float32'), (128, 'bfloat16')])
def test_it_lowers_for_gpus(width, dtype):
  """To Triton's code, which jaxlib writes without a GPU."""
  device = AbstractDevice('NVIDIA A100', None, 'gpu')
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    text = gradient_of_rows(width, dtype).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count(TRITON) == 3
  assert not re.search(r'x(500|512)x(500|512)x', text)


def topology(name: str):
  """The devices of TPUs by their slice; four GPUs by what they compute, such as 'sm_90'."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  try:
    if name.startswith('sm_'):
      target = GPU.format(major=name[3], minor=name[4])
      found = topologies.get_topology_desc('', 'cuda', target_config=target, topology='1x1x4')
    else:
      found = topologies.get_topology_desc(name, 'tpu')
  except RuntimeError as error:
    pytest.skip(f'what compiles for {name} is not installed: {error}')
  return found.devices


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1', 'sm_90'])
def test_a_model_compiles_for_accelerators_with_its_heads_and_groups_divided(name):
  """Each device's kernels read 2 of 4 key heads and 1 of 2 groups: nothing is on all of them."""
  mesh = make_mesh({'fsdp': 2, 'tensor': 2}, topology(name))
  config = preset('tiny', num_heads=8, num_kv_heads=4, head_dim=64, windows=(128, None))
  attend = row_attention('kernel', 'gpu' if name.startswith('sm_') else 'tpu')
  model = Model(config, dtype='bfloat16', attention=attend, remat='full')
  ints = jax.ShapeDtypeStruct((2, 1, 2048), jnp.int32)
  loss = lambda p, x, at: model.hidden(p, x, at).astype(jnp.float32).sum()  # noqa: E731
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss)).lower(model.param_shapes(), ints, Layout(*[ints] * 3))
    text = compiled.compile().as_text()
  targets = ('"tpu_custom_call"', f'"{TRITON}"')
  kernels = [line for line in text.splitlines() if 'custom_call_target=' in line]
  kernels = [line for line in kernels if any(target in line for target in targets)]
  names = [name for line in kernels for name in PRODUCTS if f'/{name}/' in line]
  # Forward, again in the backward pass, queries, keys.
  assert sorted(names) == [FORWARD, FORWARD, TO_KEYS, TO_QUERIES] and len(kernels) == 4
  assert all(re.search(r'bf16\[1,2,2,2048,64\]', line) for line in kernels)
  assert not re.search(r'f32\[[\d,]*2048,2048\]', text)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('width', [64, 80, 256])
def test_it_compiles_for_gpus_with_little_shared_memory(width, dtype):
  """XLA refuses what does not fit the 99 KB of sm_89."""
  sharding = jax.sharding.SingleDeviceSharding(topology('sm_89')[0])
  text = gradient_of_rows(width, dtype, sharding).lower().compile().as_text()
  assert text.count(f'custom_call_target="{TRITON}"') == 3
