"""Loading onto shards: what arrives, where, and how little of it the host holds on the way."""

import functools
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxpref.models import Model, hf, load_hf, placement, preset, save_hf
from jaxpref.sharding import make_mesh, params_sharding

HF = pathlib.Path(__file__).parent / 'testdata' / 'hf'
MESH = functools.cache(lambda: make_mesh({'fsdp': 4, 'tensor': 2}))


def equal(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.mark.parametrize('at_once', [0, 2**26])
@pytest.mark.parametrize('name', ['gpt2', 'phi3', 'mixtral'])
def test_every_shard_is_the_slice_that_it_should_be(name, at_once, monkeypatch):
  monkeypatch.setattr(placement, 'AT_ONCE', at_once)
  expected = load_hf(HF / name)[1]
  shardings = params_sharding(MESH(), Model(hf.read_config(HF / name)[0]).param_shapes())
  params = load_hf(HF / name, shardings=shardings)[1]
  assert equal(params, expected)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings
  w = params['layers']['attention']['q']['w']
  assert {shard.data.shape for shard in w.addressable_shards} == {(2, 8, w.shape[2] // 2)}


@pytest.mark.parametrize(
  'place',
  [
    lambda path: SingleDeviceSharding(jax.devices()[3]),
    lambda path: NamedSharding(MESH(), PartitionSpec()),
    # Layers apart: a stacked parameter whose layers do not lie together.
    lambda path: NamedSharding(MESH(), PartitionSpec('tensor' if 'layers' in path else None)),
  ],
)
def test_shardings_may_be_a_function_of_the_path(place, monkeypatch):
  monkeypatch.setattr(placement, 'AT_ONCE', 0)
  expected = load_hf(HF / 'qwen3', dtype=jnp.bfloat16)[1]
  params = load_hf(HF / 'qwen3', dtype=jnp.bfloat16, shardings=place)[1]
  assert equal(params, expected)
  for path, x in jax.tree.leaves_with_path(params):
    assert x.sharding == place('/'.join(key.key for key in path)) and x.dtype == jnp.bfloat16


def test_shardings_of_another_model_are_refused():
  shardings = params_sharding(MESH(), Model(preset('tiny')).param_shapes())
  with pytest.raises(ValueError, match=r"not this model's: head/w"):
    load_hf(HF / 'llama', shardings=shardings)


def test_loaded_on_the_default_device_parameters_may_still_move():
  params = load_hf(HF / 'gpt2_scores')[1]
  assert not any(x.committed for x in jax.tree.leaves(params))


class Recorder:
  """A stored tensor that notes how many bytes each read of it takes."""

  def __init__(self, tensor, reads):
    self.tensor, self.reads = tensor, reads

  def __getattr__(self, name):
    return getattr(self.tensor, name)

  def __getitem__(self, index):
    part = self.tensor[index]
    self.reads.append(part.nbytes)
    return part


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A folder of 25 MB whose largest tensors have 1 MB."""
  folder = tmp_path_factory.mktemp('large')
  model = Model(preset('tiny', width=256, num_layers=8, mlp_width=1024, vocab_size=300))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.param_shapes())
  save_hf(folder, model, params, shard_bytes=10**7)
  return folder


def test_the_host_holds_little_more_than_one_tensor(large, monkeypatch):
  monkeypatch.setattr(placement, 'AT_ONCE', 2**18)
  load_hf(large)  # compiled, imported
  tracemalloc.start()
  load_hf(large)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert 2**20 < peak < 4 * 2**20 < 25e6 / 5


def test_a_shard_is_read_for_itself(large, monkeypatch):
  reads, opened = [], hf.opened
  monkeypatch.setattr(
    hf, 'opened', lambda *a: {name: Recorder(x, reads) for name, x in opened(*a).items()}
  )
  shapes = Model(hf.read_config(large)[0]).param_shapes()
  params = load_hf(large, shardings=params_sharding(MESH(), shapes))[1]
  stored = sum(x.nbytes for x in jax.tree.leaves(params))
  assert max(reads) == 2**20 // 8  # an eighth of the largest tensor
  norms = sum(x.nbytes for x in jax.tree.leaves(params) if x.sharding.is_fully_replicated)
  assert sum(reads) <= stored + 7 * norms
