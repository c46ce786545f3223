"""Eight devices on any mesh are one: losses and gradients of every step, parameters after ten."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxpref import hosts, models, sharding
from jaxpref.data.batches import Batches
from jaxpref.log_probs import ActorCritic
from jaxpref.objectives import parse
from jaxpref.train import policy
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from tests import rollouts
from tests.worlds import random_pairs

STEPS = 10
SCALARS = {
  'learning_rate': 0.02, 'weight_decay': 0.0, 'b1': 0.0, 'b2': 0.95, 'eps': 1e-8, 'clip': np.inf,
}  # fmt: skip
MESHES = {
  '8x1x1x1': (8, 1, 1, 1),
  '1x8x1x1': (1, 8, 1, 1),
  '2x2x1x2': (2, 2, 1, 2),
  '1x4x1x2': (1, 4, 1, 2),
  '2x1x4x1': (2, 1, 4, 1),
}
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


@functools.cache
def run(name, shape, optimizer='sgd', steps=STEPS):
  """([(loss, gradients or None)], parameters) of a case's steps on a mesh of this shape."""
  case, scalars = CASES[name], SCALARS
  mesh = sharding.make_mesh(
    dict(zip(sharding.AXES, shape, strict=True)), jax.devices()[: np.prod(shape)]
  )
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
