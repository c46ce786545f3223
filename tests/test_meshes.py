"""Eight devices on any mesh are one: losses, gradients, parameters after ten steps, samples."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from jaxpref import hosts, models, sharding
from jaxpref.data.batches import Batches
from jaxpref.log_probs import ActorCritic
from jaxpref.objectives import parse
from jaxpref.rollout.prompts import Prompts
from jaxpref.rollout.samples import Sampler
from jaxpref.train import policy
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from tests import rollouts
from tests.steps import MESHES, scalars
from tests.worlds import random_pairs

STEPS = 10
# Slow enough that rounding, which every step adds to the next one's parameters, stays below 1e-5.
SCALARS = scalars(0.005)
DATA = random_pairs(32, seed=4)
CONFIG = models.preset('tiny', vocab_size=50, width=32, num_layers=2, mlp_width=48)
POLICY, PARAMS = models.init(CONFIG, jax.random.key(0))
SCORED = policy.scored(POLICY)
SCORES = jax.tree.map(lambda x: 0.3 * x, models.init(SCORED.config, jax.random.key(1))[1])
CRITIC = policy.scored(rollouts.MODEL)
ACTOR = {
  'policy': rollouts.moved(0.02, 7),
  'critic': models.init(CRITIC.config, jax.random.key(1))[1],
}


class Noise:
  """A made-up reference table."""

  def __getitem__(self, i):
    rng = np.random.default_rng(i)
    return tuple(rng.normal(-3, 1, len(c)).astype(np.float32) for c in DATA[i].candidates)


class Case(NamedTuple):
  """A model and an objective, and `batches(groups)`: (step, params) -> Batch."""

  model: Any
  params: Any
  objective: str
  batches: Callable


def of_data(groups):
  batches = Batches(DATA, 8, seed=0, groups=groups, tables={'ref_logps': Noise()})
  return lambda step, params: batches[step]


def of_rollout(groups, **options):
  """Ten passes over one recorded rollout, whatever the policy has become."""
  rounds = {'prompts': 8, 'epochs': STEPS, 'shards': groups}
  made = rollouts.online(rounds=rounds, reference=rollouts.PARAMS, beta=0.1, **options)
  held = [recorded(**options)]

  def batch(step, params):
    found, held[0] = made.next(step, params, held[0])
    return found

  return batch


@functools.cache
def recorded(model=rollouts.MODEL, **options):
  rounds = {'prompts': 8, 'epochs': STEPS}
  made = rollouts.online(rounds=rounds, reference=rollouts.PARAMS, beta=0.1, model=model, **options)
  _, carry = made.next(
    0, ACTOR if isinstance(model, ActorCritic) else ACTOR['policy'], made.begin()
  )
  return {**carry, 'cursor': np.int32(0)}


PPO = {'model': ActorCritic(rollouts.MODEL, CRITIC), 'objective': 'ppo_clip() + 0.5*value_loss()'}
CASES = {
  'sft': Case(POLICY, PARAMS, 'sft()', of_data),
  'dpo': Case(POLICY, PARAMS, 'dpo(beta=0.3)', of_data),
  'reward': Case(SCORED, SCORES, 'bradley_terry()', of_data),
  'ppo': Case(
    PPO['model'], ACTOR, PPO['objective'],
    functools.partial(of_rollout, advantages='gae()', **PPO),
  ),
  'grpo': Case(rollouts.MODEL, ACTOR['policy'], 'grpo()', of_rollout),
}  # fmt: skip


def mesh_of(shape):
  devices = jax.devices()[: np.prod(shape)]
  return sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)), devices)


@functools.cache
def run(name, shape, optimizer='sgd', steps=STEPS):
  """([(loss, gradients or None)], parameters) of a case's steps on a mesh of this shape."""
  case, scalars = CASES[name], SCALARS
  mesh = mesh_of(shape)
  batches, found = case.batches(sharding.groups(mesh)), []
  with jax.set_mesh(mesh):
    made = Optimizer(optimizer)
    state = jax.jit(lambda p: init_state(p, made.init(scalars, p)))(case.params)
    state = jax.device_put(state, sharding.params_sharding(mesh, state))
    step = jax.jit(make_step(case.model, made))
    for n in range(steps):
      batch = hosts.place(batches(n, state.params), sharding.batch_sharding(mesh))
      state, metrics = step(state, batch, Hparams(parse(case.objective), scalars))
      assert not metrics['skipped']
      # Without momentum the trace that SGD keeps is the gradient itself.
      grads = jax.device_get(state.opt_state) if optimizer == 'sgd' else None
      found.append((float(metrics['loss']), grads))
  return found, jax.device_get(state.params)


def assert_near(one, other, tolerance, floor=0.0):
  """‖a - b‖ <= tolerance · ‖b‖ for every array; `floor`: norms below count as this much."""
  for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
    norm = max(np.linalg.norm(b), floor)
    assert np.linalg.norm(a - b) <= tolerance * norm, (jax.tree_util.keystr(path), norm)


ONCE = [('dpo', '2x2x1x2'), ('grpo', '2x1x4x1')]  # the rest is slow


@pytest.mark.parametrize(
  ('name', 'mesh'),
  [
    pytest.param(name, mesh, marks=() if (name, mesh) in ONCE else pytest.mark.slow)
    for name in CASES
    for mesh in MESHES
  ],
)
def test_every_step_is_that_of_one_device(name, mesh):
  one, params = run(name, (1, 1, 1, 1))
  many, theirs = run(name, MESHES[mesh])
  for (loss, grads), (other, others) in zip(one, many, strict=True):
    # GRPO's terms, of size 1, cancel: its loss before the first step is 0.
    assert other == pytest.approx(loss, rel=1e-5, abs=1e-6)
    whole = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
    assert_near(others, grads, 1e-5, floor=0.01 * whole)
  assert_near(theirs, params, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_under_adam_losses_are_those_of_one_device(name):
  """Its update is a sign where gradients vanish, so parameters may differ by a step there."""
  one, many = (run(name, shape, 'adamw', 5)[0] for shape in ((1, 1, 1, 1), (2, 2, 1, 2)))
  np.testing.assert_allclose([x for x, _ in many], [x for x, _ in one], rtol=1e-4, atol=1e-6)


@functools.cache
def sampled(shape, slots):
  """Four completions of each of eight prompts."""
  rng, mesh = np.random.default_rng(0), mesh_of(shape)
  tokens = [rng.integers(1, 50, 1 + i) for i in range(8)]
  prompts = Prompts(tokens, [''] * 8, [{}] * 8, [''] * 8)
  sampler = Sampler(POLICY, prompts, 4, 12, slots=slots, stop_ids=(1, 2, 3, 4), mesh=mesh)
  params = jax.tree.map(lambda x: 1.5 * x, PARAMS)  # less uniform
  params = jax.device_put(params, sharding.params_sharding(mesh, params))
  return hosts.whole(sampler(params, range(8), np.arange(8, dtype=np.int32)))


@pytest.mark.parametrize(
  ('mesh', 'slots'),
  [
    pytest.param(mesh, slots, marks=() if (mesh, slots) == ('2x2x1x2', 0) else pytest.mark.slow)
    for mesh in MESHES
    for slots in (0, 8)
  ],
)
def test_samples_are_those_of_one_device(mesh, slots):
  one, many = sampled((1, 1, 1, 1), slots), sampled(MESHES[mesh], slots)
  for name in ('tokens', 'mask', 'finished'):
    np.testing.assert_array_equal(getattr(many, name), getattr(one, name), err_msg=name)
  for name in ('logps', 'sampling_logps'):
    np.testing.assert_allclose(getattr(many, name), getattr(one, name), atol=1e-5, err_msg=name)
  assert one.logps[one.mask].std() > 0.2 and one.finished.any() and not one.finished.all()


@dataclasses.dataclass(frozen=True)
class Device:
  """What jax asks a device of a multi-slice TPU job."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'cpu'
  device_kind: str = 'stand-in'


def test_slices_are_arranged_as_jax_arranges_them():
  devices = [Device(i, slice_index=i % 2) for i in range(16)]
  found = sharding.make_mesh({'slices': 2, 'data': 2, 'fsdp': -1, 'tensor': 2}, devices)
  theirs = mesh_utils.create_hybrid_device_mesh((2, 2, 1, 2), (2, 1, 1, 1), devices)
  assert dict(found.shape) == {'data': 4, 'fsdp': 2, 'context': 1, 'tensor': 2}
  assert [d.id for d in found.devices.flat] == [d.id for d in theirs.flat]
  for slice_, part in enumerate(np.split(found.devices, 2)):  # only data crosses
    assert {device.slice_index for device in part.flat} == {slice_}
  with pytest.raises(ValueError, match=r'slices=4: there are 16 devices in slices of \[8, 8\]'):
    sharding.make_mesh({'slices': 4, 'fsdp': -1}, devices)


@pytest.mark.parametrize('size', [0, -2])
def test_a_size_that_no_axis_has_is_named(size):
  with pytest.raises(ValueError, match=f'mesh.fsdp={size}: expected 1 or more, or -1'):
    sharding.make_mesh({'fsdp': size})


def test_devices_that_know_no_slices_are_taken_in_their_order():
  found = sharding.make_mesh({'slices': 2, 'data': 1, 'fsdp': 2, 'tensor': 2})
  assert dict(found.shape) == {'data': 2, 'fsdp': 2, 'context': 1, 'tensor': 2}
  assert list(found.devices.flat) == jax.devices()
  with pytest.raises(ValueError, match='needs 8 devices; there are 4 in each of 2 slices'):
    sharding.make_mesh({'slices': 2, 'fsdp': 8})
  with pytest.raises(ValueError, match='slices=3: there are 8'):
    sharding.make_mesh({'slices': 3, 'fsdp': -1})
