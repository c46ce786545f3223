"""The reference store: right values, computed once, the same to the bit however it was built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import sharding
from jaxpref.data.batches import Batches
from jaxpref.log_probs import log_probs
from jaxpref.models import init, preset
from jaxpref.train import anchor, reference
from tests.worlds import PairData, random_pairs


@pytest.fixture(scope='module')
def tiny():
  return init(preset('tiny', vocab_size=50, width=32), jax.random.key(0))


@pytest.fixture(scope='module')
def data():
  return random_pairs(70, seed=9, longest=80)


def computed(monkeypatch):
  """Counts the blocks that `build` computes from here on."""
  count = []
  blocks = reference._blocks

  def counting(*args):
    for block in blocks(*args):
      count.append(block)
      yield block

  monkeypatch.setattr(reference, '_blocks', counting)
  return count


def equal(left, right):
  assert len(left) == len(right)
  for i in range(len(left)):
    for a, b in zip(left[i], right[i], strict=True):
      np.testing.assert_array_equal(a, b)


def test_table_holds_what_the_step_would_compute(tiny, data, tmp_path):
  model, params = tiny
  table = reference.build(model, params, data, tmp_path)
  batch = Batches(data, 16, tables={'ref_logps': table})[0]
  micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
  logps = jax.jit(lambda p, b: log_probs(model, p, b)['logps'])(params, micro)
  np.testing.assert_allclose(micro.fields['ref_logps'], logps, atol=1e-5)

  live = jax.jit(anchor.attach, static_argnums=0)(model, params, batch)
  np.testing.assert_allclose(live.fields['ref_logps'], batch.fields['ref_logps'], atol=1e-5)


def test_computed_once_whatever_else_changes(tiny, data, tmp_path, monkeypatch):
  model, params = tiny
  count = computed(monkeypatch)
  table = reference.build(model, params, data, tmp_path)
  assert count
  count.clear()
  equal(table, reference.build(model, params, data, tmp_path))
  part = PairData(data.examples[10:20])
  equal(reference.build(model, params, part, tmp_path), [table[i] for i in range(10, 20)])
  assert not count
  moved = jax.tree.map(lambda x: x + 1e-6, params)
  reference.build(model, moved, part, tmp_path)
  assert count  # other weights are another reference
  count.clear()
  reference.build(model.replace(temperature=2.0), params, part, tmp_path)
  assert count  # and so is another temperature


def test_equal_examples_are_computed_once(tiny, data, tmp_path):
  model, params = tiny
  twice = PairData(data.examples[:40] + data.examples[:40])
  table = reference.build(model, params, twice, tmp_path)
  for i in range(40):
    np.testing.assert_array_equal(np.concatenate(table[i]), np.concatenate(table[40 + i]))
  assert len(reference.Store(next(tmp_path.iterdir())).read()) == 40


def test_interrupted_build_equals_uninterrupted_one_to_the_bit(tiny, data, tmp_path, monkeypatch):
  model, params = tiny
  whole = reference.build(model, params, data, tmp_path / 'whole')

  def stop(done, total):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    reference.build(model, params, data, tmp_path / 'cut', progress=stop)
  count = computed(monkeypatch)
  equal(whole, reference.build(model, params, data, tmp_path / 'cut'))
  assert 0 < len(count) < len(list((tmp_path / 'whole').rglob('block-*.npz')))


def test_a_damaged_block_is_computed_again(tiny, data, tmp_path, caplog):
  model, params = tiny
  table = reference.build(model, params, data, tmp_path)
  for damage in (lambda raw: raw[:100], lambda raw: raw[:500] + b'\xff' * 8 + raw[508:]):
    file = sorted(tmp_path.rglob('block-*.npz'))[0]
    file.write_bytes(damage(file.read_bytes()))
    caplog.clear()
    equal(table, reference.build(model, params, data, tmp_path))
    assert str(file) in caplog.text and 'damaged' in caplog.text


def test_eight_devices_agree_with_one(tiny, data, tmp_path):
  model, params = tiny
  one = reference.build(model, params, data, tmp_path / 'one')
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 2})
  placed = jax.device_put(params, sharding.params_sharding(mesh, params))
  many = reference.build(model, placed, data, tmp_path / 'many', mesh=mesh)
  for i in range(len(data)):
    np.testing.assert_allclose(np.concatenate(one[i]), np.concatenate(many[i]), atol=1e-5)
