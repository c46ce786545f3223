import contextlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.train.checkpoint import Checkpoints
from tests.states import assert_equal, make_state

AXES = jax.sharding.PartitionSpec


def test_a_state_comes_back_bit_for_bit_with_its_metadata(saved_run):
  checkpoints = Checkpoints(saved_run, read_only=True)
  state, meta = checkpoints.restore(make_state())
  assert_equal(state, make_state(2))
  assert meta == {'position': 2, 'step': 2, 'metrics': {'accuracy': 0.7}}
  state, meta = checkpoints.restore(make_state(), step=1)
  assert_equal(state, make_state(1))
  assert meta['position'] == 1
  checkpoints.close()


def test_donating_the_state_right_after_save_does_not_reach_the_files(tmp_path):
  devices = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharded = jax.device_put(make_state(3), jax.sharding.NamedSharding(devices, AXES()))
  sharded = sharded._replace(
    params=sharded.params
    | {'embed': jax.device_put(sharded.params['embed'], jax.NamedSharding(devices, AXES('data')))}
  )

  @partial(jax.jit, donate_argnums=0)
  def step(state):
    return jax.tree.map(lambda x: (x * 2 + 1).astype(x.dtype), state)

  for name, state in (('one', make_state(3)), ('eight', sharded)):
    checkpoints = Checkpoints(tmp_path / name)
    checkpoints.save(1, state)
    for _ in range(3):
      state = step(state)
    jax.block_until_ready(state)
    assert_equal(checkpoints.restore(make_state())[0], make_state(3))
    checkpoints.close()


def test_restores_onto_the_shardings_asked_for(saved_run):
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def place(x):
    spec = AXES('fsdp') if x.ndim and x.shape[0] % 4 == 0 else AXES()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

  abstract = jax.tree.map(place, jax.eval_shape(make_state))
  checkpoints = Checkpoints(saved_run, read_only=True)
  state, _ = checkpoints.restore(abstract)
  assert_equal(state, make_state(2))
  jax.tree.map(lambda x, want: x.sharding == want.sharding or pytest.fail(str(x)), state, abstract)
  assert state.params['embed'].addressable_shards[0].data.shape == (4, 8)

  shardings = jax.tree.map(lambda x: x.sharding, abstract.params)
  params = checkpoints.restore_params(shardings=shardings)
  assert_equal(params, make_state(2).params)
  assert params['embed'].sharding == shardings['embed']
  checkpoints.close()


def test_parameters_come_without_the_optimizer(saved_run, tmp_path):
  checkpoints = Checkpoints(saved_run, read_only=True)
  params = checkpoints.restore_params()
  assert_equal(params, make_state(2).params)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
  assert_equal(checkpoints.restore_params(1, ema=True), make_state(1).ema)
  checkpoints.close()
  without = Checkpoints(tmp_path)
  without.save(1, make_state(1, ema=False))
  with pytest.raises(ValueError, match=r"holds no 'ema'; it holds \['opt_state', 'params'"):
    without.restore_params(ema=True)
  without.close()


def test_a_policy_comes_without_its_critic_and_onto_its_devices(tmp_path):
  policy, critic = {'w': np.arange(8.0, dtype=np.float32)}, {'w': np.zeros(3, np.float32)}
  where = {'w': jax.sharding.SingleDeviceSharding(jax.devices()[-1])}
  with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
    checkpoints.save(1, {'params': {'policy': policy, 'critic': critic}, 'ema': {}})
    checkpoints.save(2, {'params': policy, 'ema': {}})
    for step in (1, 2):
      found = checkpoints.restore_policy(step, shardings=where)
      assert_equal(found, policy)
      assert found['w'].sharding == where['w']
      assert_equal(checkpoints.restore_policy(step), policy)


def test_reference_is_written_once(saved_run, tmp_path):
  checkpoints = Checkpoints(saved_run)
  assert checkpoints.has_reference()
  assert_equal(checkpoints.restore_reference(), make_state(7).params)
  with pytest.raises(FileExistsError, match='written once'):
    checkpoints.save_reference(make_state(1).params)
  checkpoints.close()
  empty = Checkpoints(tmp_path)
  assert not empty.has_reference()
  with pytest.raises(FileNotFoundError, match='saved no reference'):
    empty.restore_reference()
  empty.close()


@pytest.mark.parametrize(
  ('mode', 'values', 'best', 'kept'),
  [
    ('max', [0.1, 0.9, 0.2, 0.3, 0.4], 2, [2, 4, 5]),
    ('min', [0.1, 0.9, 0.2, 0.3, 0.4], 1, [1, 4, 5]),
    ('max', [0.1, 0.5, 0.5, 0.3, None], 3, [3, 4, 5]),  # of equal ones the newest
    ('max', [0.1, float('nan'), None, 0.0, None], 1, [1, 4, 5]),  # nan is never best
    ('max', [0.1, 0.2, 0.3, 0.4, 0.5], 5, [4, 5]),
    ('max', [None] * 5, None, [4, 5]),
  ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, mode, values, best, kept):
  checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=('accuracy', mode))
  for step, value in enumerate(values, 1):
    metrics = {} if value is None else {'accuracy': value}
    checkpoints.save(step, {'w': jnp.ones(2)}, metrics=metrics)
  checkpoints.wait()
  assert (checkpoints.best_step(), checkpoints.steps()) == (best, kept)
  checkpoints.close()
  again = Checkpoints(tmp_path, keep_last=2, keep_best=('accuracy', mode))
  assert (again.best_step(), again.latest_step()) == (best, 5)
  again.close()


def test_a_step_is_saved_once(copied_run):
  checkpoints = Checkpoints(copied_run)
  assert not checkpoints.save(2, make_state(9))
  assert checkpoints.save(3, make_state(3))
  assert_equal(checkpoints.restore(make_state(), step=2)[0], make_state(2))
  checkpoints.close()


def test_another_state_is_refused_by_the_names_of_its_leaves(saved_run):
  checkpoints = Checkpoints(saved_run, read_only=True)
  state = make_state()
  params = {
    'embed': jnp.ones((3, 8)),
    'layers': {'w': state.params['layers']['w'].astype(jnp.bfloat16), 'bias': jnp.ones(2)},
  }
  with pytest.raises(ValueError) as caught:
    checkpoints.restore(state._replace(params=params))
  for part in (
    'params/embed is saved as float32[16, 8], asked for as float32[3, 8]',
    'params/layers/w is saved as float32[2, 8, 8], asked for as bfloat16[2, 8, 8]',
    'params/layers/scale is saved but not asked for',
    'params/layers/bias is asked for but not saved',
    'checkpoints/2/state',
  ):
    assert part in str(caught.value)
  checkpoints.close()


def test_mistakes_are_named(tmp_path, saved_run):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match=r'cannot write to .*file/run/checkpoints: .*choose a folder'):
    Checkpoints(tmp_path / 'file' / 'run')
  with pytest.raises(FileNotFoundError, match='not the workdir of a run'):
    Checkpoints(tmp_path / 'nowhere', read_only=True)
  with pytest.raises(ValueError, match='keep >= 1'):
    Checkpoints(tmp_path, keep_last=0)
  with pytest.raises(ValueError, match=r'expected .metric, .max'):
    Checkpoints(tmp_path, keep_best=('accuracy', 'best'))
  watcher = Checkpoints(saved_run, read_only=True)
  with pytest.raises(ValueError, match='read_only'):
    watcher.save(5, make_state())
  watcher.close()
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(TypeError, match=r'metadata .* must be JSON: .*not JSON serializable'):
    checkpoints.save(1, make_state(), {'sharding': AXES()})
  assert checkpoints.latest_step() is None
  checkpoints.close()


def test_metadata_is_plain_json(saved_run):
  text = (saved_run / 'checkpoints' / '2' / 'meta' / 'metadata').read_text()
  assert json.loads(text)['step'] == 2
