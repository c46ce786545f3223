"""Runs that train adapters: what is saved, what stands still, and that they resume exactly."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxpref import config, models, program, run, sharding
from jaxpref.cli.main import main
from jaxpref.data.batches import Batches
from jaxpref.objectives import parse
from jaxpref.plan import costs
from jaxpref.train import lora, policy
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from jaxpref.train.writers import read_metrics
from tests.steps import scalars
from tests.worlds import random_pairs

QUIET = rich.console.Console(quiet=True)
SCALARS = scalars(0.1)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'pairs.jsonl'
  lines = [{'prompt': f'{n} is', 'chosen': f' {n % 7}', 'rejected': ' b'} for n in range(40)]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def settings(pairs, **changes):
  c = config.default()
  c.objective = 'dpo(beta=0.3)'
  c.data.train = f'jsonl:{pairs}'
  c.data.max_length = 32
  c.data.eval_fraction = 0.2
  c.batch.size = 8
  c.steps = 4
  c.lora.rank = 2
  c.optimizer.learning_rate = 1e-2
  c.checkpoint.every, c.checkpoint.keep_last = 2, 9
  c.log.tensorboard = False
  c.update_from_flattened_dict(changes)
  return c


KINDS = {
  'table': {},
  'live': {'reference': 'live', 'dtype': 'bfloat16', 'ema': 0.5},
  'reward': {'objective': 'bradley_terry()', 'reference': 'table'},
  'grpo': {
    'objective': 'grpo()', 'rewards': 'length_penalty(target=3)', 'rollout.kl': 0.1,
    'rollout.prompts': 8, 'rollout.samples': 4, 'rollout.max_new_tokens': 4, 'rollout.show': 0,
  },
  'ppo': {
    'objective': 'ppo_clip() + 0.1*value_loss()', 'rewards': 'length_penalty(target=3)',
    'rollout.advantages': 'gae()', 'rollout.kl': 0.1, 'rollout.prompts': 16, 'rollout.samples': 2,
    'rollout.max_new_tokens': 4, 'rollout.show': 0, 'rollout.minibatches': 2,
  },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_run_resumes_bit_for_bit_and_saves_little(kind, pairs, tmp_path):
  c = settings(pairs, **KINDS[kind])
  whole = run.train(c, tmp_path / 'whole', console=QUIET)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'killed')
  shutil.rmtree(tmp_path / 'killed' / 'checkpoints' / '4')
  resumed = run.train(c, tmp_path / 'killed', console=QUIET)
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (whole.state, resumed.state)))
  ours, theirs = (
    [line for line in read_metrics(tmp_path / name / 'metrics.jsonl') if 'loss' in line]
    for name in ('whole', 'killed')
  )
  assert [line['loss'] for line in ours] == [line['loss'] for line in theirs] and len(ours) == 4

  checkpoints = Checkpoints(tmp_path / 'whole', read_only=True)
  saved, base = checkpoints.restore_policy(), checkpoints.restore_reference()
  checkpoints.close()
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  assert size(saved) < size(base) / 10 and set(saved) <= {'layers', 'score'}
  first = policy.load('preset:tiny', whole.tokenizer)[1]
  kept = jax.tree.map(lambda x, b: np.asarray(x.astype(b.dtype)), {n: first[n] for n in base}, base)
  jax.tree.map(np.testing.assert_array_equal, base, kept)
  # What is read of the workdir does what the run's last parameters do.
  model, params = policy.load(str(tmp_path / 'whole'), whole.tokenizer)
  tokens = jnp.arange(12)[None]
  states = [
    np.asarray(model.hidden(p, tokens, models.mask_layout(tokens >= 0)), np.float32)
    for p in (params, whole.params)
  ]
  np.testing.assert_allclose(*states, atol=0.1 if c.dtype == 'bfloat16' else 1e-4)


@pytest.mark.slow
def test_the_reference_is_the_model_without_its_adapters(pairs, tmp_path):
  """A live one and a table say the same, and both what they say of a run of all parameters."""
  found = {
    name: run.train(settings(pairs, steps=2, **changes), tmp_path / name, console=QUIET).metrics
    for name, changes in {'table': {}, 'live': {'reference': 'live'}}.items()
  }
  for name, value in found['table'].items():
    assert found['live'][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
  lines = read_metrics(tmp_path / 'table' / 'metrics.jsonl')
  assert next(iter(lines))['loss'] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_it_learns_and_is_exported_dense(pairs, tmp_path):
  c = settings(pairs, steps=40, **{'lora.rank': 4, 'optimizer.learning_rate': 2e-2})
  trained = run.train(c, tmp_path / 'w', console=QUIET)
  assert trained.metrics['eval/rewards/accuracies'] > 0.9
  assert main(['export', f'--model={tmp_path / "w"}', f'--output={tmp_path / "hf"}']) == 0
  model, params = models.load_hf(tmp_path / 'hf')
  tokens = jnp.arange(12)[None]
  both = ((model, params), (trained.model, trained.params))
  logits = [model.logits(params, tokens, tokens >= 0) for model, params in both]
  np.testing.assert_allclose(*logits, atol=1e-3)


def test_frozen_weights_cost_no_gradient():
  """Of a layer's matrix products a third is theirs; counted in the compiled step."""
  c = models.preset('tiny', vocab_size=50, width=64, mlp_width=256, num_layers=2)
  model, params = models.init(c, jax.random.key(0))
  adapters = models.Lora(rank=1)
  data = random_pairs(8, seed=4)
  batch, hparams = Batches(data, 8, seed=0)[0], Hparams(parse('sft()'), SCALARS)
  flops = {}
  for name, chosen in {'dense': None, 'adapters': adapters}.items():
    optimizer = Optimizer('sgd')
    base, trained = lora.split(chosen, params, 0, jnp.float32)
    state = init_state(trained, optimizer.init(SCALARS, trained), reference=base or None)
    step = jax.jit(make_step(model, optimizer, lora=chosen))
    flops[name] = costs.count(step.lower(state, batch, hparams).compile().as_text()).flops
  assert flops['adapters'] < 0.8 * flops['dense']


@pytest.mark.parametrize('mesh', [(2, 2, 1, 2), pytest.param((2, 1, 4, 1), marks=pytest.mark.slow)])
def test_eight_devices_are_one(mesh, pairs):
  """Loss and gradients of a step whose adapters add something already."""
  c = settings(pairs, reference='live')
  found = []
  for shape in ((1, 1, 1, 1), mesh):
    made = sharding.make_mesh(
      dict(zip(sharding.AXES, shape, strict=True)), jax.devices()[: np.prod(shape)]
    )
    with jax.set_mesh(made):
      found.append(one_step(c, made))
  (loss, grads), (other, theirs) = found
  assert other == pytest.approx(loss, rel=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def one_step(c, mesh):
  model, params = models.init(models.preset('tiny', vocab_size=50, num_layers=1), jax.random.key(0))
  chosen = lora.chosen(c)
  base, trained = lora.split(chosen, params, 0, model.dtype)
  drawn = lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
  trained = jax.tree.map(drawn, trained)
  c.optimizer.name, c.optimizer.b1, c.optimizer.clip = 'sgd', 0.0, 0.0
  assembled = program.assemble(c, parse(c.objective), model, 4, mesh, live=True)
  place = lambda x, s: jax.device_put(x, s.sharding)  # noqa: E731
  state = jax.tree.map(place, assembled.begin(trained), assembled.state)
  state = state._replace(reference=jax.tree.map(place, base, assembled.reference))
  groups = sharding.groups(mesh)
  batch = Batches(random_pairs(8, seed=4), 8, seed=0, groups=groups)[0]
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  state, metrics = assembled.step(state, batch, assembled.hparams)
  return float(metrics['loss']), jax.device_get(state.opt_state)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'reference': 'live', 'reference_sync.every': 2}, 'cannot follow'),
    ({'reference': 'live', 'reference_memory': 'host'}, 'always at work'),
    ({**KINDS['grpo'], 'rollout.reference_devices': 1}, 'lives where the policy does'),
    ({'lora.targets': ('q_proj',)}, 'got targets'),
    ({'lora.rank': 1000}, 'rank 1000 is more than'),
  ],
)
def test_mistakes_are_named_before_anything_runs(changes, message, pairs, tmp_path):
  with pytest.raises(ValueError, match=message):
    run.train(settings(pairs, **changes), tmp_path / 'w', console=QUIET)
  assert not (tmp_path / 'w').exists()
