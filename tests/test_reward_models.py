"""Reward models from training to use: learnt, resumed, exported, centred, and asked for scores."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxpref import config as configs
from jaxpref import data, models, rewards, run, sharding
from jaxpref.cli.configs import load
from jaxpref.cli.main import main
from jaxpref.data.batches import Batches
from jaxpref.evals.heldout import collect
from jaxpref.objectives import bradley_terry, process_reward
from jaxpref.objectives.candidates import last_scored
from jaxpref.rollout.reward_models import RewardModel
from jaxpref.train import normalisation, policy
from jaxpref.train.reward_models import makers, reward_model
from jaxpref.train.step import make_fields

BYTES = data.load_tokenizer('byte')
QUIET = rich.console.Console(quiet=True)
STEPS = 40


def pairs(count):
  """More 'a's are better; the lengths say nothing."""
  rng = np.random.default_rng(0)
  found = []
  while len(found) < count:
    sides = [''.join(rng.choice(list('ab'), rng.integers(4, 10))) for _ in range(2)]
    worse, better = sorted(sides, key=lambda text: text.count('a'))
    if better.count('a') - worse.count('a') >= 2:
      found.append({'prompt': f'{len(found)}:', 'chosen': better, 'rejected': worse})
  return found


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  file = tmp_path_factory.mktemp('data') / 'pairs.jsonl'
  file.write_text(''.join(json.dumps(record) + '\n' for record in pairs(400)))
  return f'jsonl:{file}'


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A Hugging Face folder with a language model of one layer."""
  folder = tmp_path_factory.mktemp('hf')
  config = models.preset('tiny', width=32, mlp_width=48, num_layers=1)
  models.save_hf(folder, *models.init(config, jax.random.key(0)), BYTES)
  return str(folder)


def settings(base, source, **changes):
  c = configs.default()
  c.model = base
  c.objective = 'bradley_terry(centring=0.01)'
  c.data.train = source
  c.data.eval_fraction = 0.25
  c.batch.size = 32
  c.batch.row_lengths = (64,)
  c.steps = STEPS
  c.optimizer.learning_rate = 1e-2
  c.optimizer.schedule = 'constant'
  c.optimizer.warmup = 0.0
  c.checkpoint.every = STEPS // 2
  c.log.tensorboard = False
  c.update_from_flattened_dict(changes)
  return c


@pytest.fixture(scope='module')
def trained(base, source, tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'rm'
  return folder, run.train(settings(base, source), folder, console=QUIET)


def ask(reward, records, **columns):
  """Scores of both completions of pairs, [n, 2]."""
  prompts = [r['prompt'] for r in records for _ in range(2)]
  completions = [r[side] for r in records for side in ('chosen', 'rejected')]
  found = reward(prompts, completions, [columns] * len(prompts))
  return np.array(found).reshape(-1, 2)


def test_a_rule_is_learnt_and_measured(trained):
  _, found = trained
  assert found.metrics['eval/rewards/accuracies'] > 0.9
  assert found.metrics['eval/rewards/margins'] > 1
  assert 0 <= found.metrics['eval/rewards/calibration_error'] < 0.2
  assert abs(found.metrics['eval/rewards/length_correlation']) <= 1
  assert 'eval/entropy' not in found.metrics


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_run_in_one(trained, base, source, tmp_path):
  _, whole = trained
  run.train(settings(base, source, steps=STEPS // 2), tmp_path / 'w', console=QUIET)
  assert normalisation.of_step(tmp_path / 'w', STEPS // 2)
  parts = run.train(settings(base, source), tmp_path / 'w', console=QUIET)
  assert normalisation.of_step(tmp_path / 'w', STEPS) == normalisation.read(trained[0])
  for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_reward_is_what_the_objective_reads_less_the_mean(trained, source):
  folder, found = trained
  dataset = data.load(source, tokenizer=BYTES, kind='preference')
  compute = jax.jit(make_fields(found.model, bradley_terry()))
  fields = collect(lambda batch: compute(found.params, None, batch), Batches(dataset, 100, None))
  raw = np.asarray(last_scored(fields['rewards'], fields['mask']), np.float64)
  known = normalisation.read(folder)
  ours = ask(reward_model(str(folder)), pairs(400))
  np.testing.assert_allclose(ours, raw - known.mean, atol=2e-5)
  scaled = ask(reward_model(str(folder), spread=2.0), pairs(20))
  np.testing.assert_allclose(scaled, (raw[:20] - known.mean) * 2 / known.std, atol=1e-4)


def test_training_completions_have_mean_0_and_the_spread_asked_for(trained, source):
  folder, _ = trained
  dataset = data.load(source, tokenizer=BYTES, kind='preference')
  kept, held_out = dataset.split(0.25, 0)
  scores = ask(reward_model(str(folder), spread=3.0), [pairs(400)[i] for i in kept.indices])
  np.testing.assert_allclose([scores.mean(), scores.std()], [0.0, 3.0], atol=1e-4)
  assert normalisation.read(folder).completions == 2 * len(kept) == 800 - 2 * len(held_out)


def test_export_keeps_scores_and_their_mean(trained, base, source, tmp_path, capsys):
  folder, found = trained
  assert main(['export', f'--model={folder}', f'--output={tmp_path / "hf"}']) == 0
  assert 'scores have mean' in capsys.readouterr().out
  written = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert written['architectures'] == ['LlamaForSequenceClassification']
  assert len(written['id2label']) == 1
  before, after = reward_model(str(folder)), reward_model(str(tmp_path / 'hf'))
  np.testing.assert_array_equal(ask(before, pairs(40)), ask(after, pairs(40)))
  # The same numbers once more: evaluation of the folder, and a run that starts from it.
  again = run.train(
    settings(str(tmp_path / 'hf'), source, **{'steps': 1, 'optimizer.learning_rate': 0.0}),
    tmp_path / 'w',
    console=QUIET,
  )
  for name, value in found.metrics.items():
    assert again.metrics[name] == pytest.approx(value, rel=1e-5), name
  # Of another checkpoint the mean is not known, and the old one does not stay behind.
  earlier = ['export', f'--model={folder}', f'--output={tmp_path / "hf"}', '--overwrite']
  assert main([*earlier, f'--step={STEPS // 2}']) == 0
  assert 'is not known' in capsys.readouterr().out
  assert normalisation.read(tmp_path / 'hf') is None


def test_eval_reports_a_reward_model(trained, tmp_path):
  folder, found = trained
  assert main(['eval', f'--model={folder}', f'--json={tmp_path / "out.json"}']) == 0
  metrics = json.loads((tmp_path / 'out.json').read_text())['metrics']
  assert 'entropy' not in metrics
  for name, value in metrics.items():
    assert found.metrics[f'eval/{name}'] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_padding_neighbours_and_devices_change_no_score(trained, monkeypatch):
  folder, _ = trained
  together = ask(reward_model(str(folder)), pairs(37))
  one = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  reward = reward_model(str(folder), mesh=one)
  monkeypatch.setattr('jaxpref.rollout.reward_models.AT_ONCE', 1)
  np.testing.assert_allclose(ask(reward, pairs(37)[:3]), together[:3], atol=1e-5)


def test_a_workdir_loads_on_devices_that_do_not_train(trained):
  """As with rollout.reward_devices, where the mesh that is set is the training's."""
  folder, _ = trained
  together = ask(reward_model(str(folder)), pairs(8))
  devices = jax.devices()
  with jax.set_mesh(sharding.make_mesh({'fsdp': -1}, devices[:6])):
    reward = reward_model(str(folder), mesh=sharding.make_mesh({'fsdp': -1}, devices[6:]))
    apart = ask(reward, pairs(8))
  assert {d for x in jax.tree.leaves(reward.params) for d in x.devices()} == set(devices[6:])
  np.testing.assert_allclose(apart, together, atol=1e-5)


def test_what_is_read_of_a_completion(trained):
  reward = reward_model(str(trained[0]))
  bos, eos = BYTES.bos_id, BYTES.eos_id
  text = [bos, *BYTES.encode('xy')]
  assert reward.read('x', 'y', {})[0].tolist() == [*text, eos]
  assert reward.read('x', 'y', {'finished': False})[0].tolist() == text
  assert reward.read('x', '', {'finished': True})[0].tolist() == [*text[:-1], eos]
  chat = [{'role': 'user', 'content': 'x'}]
  said = BYTES.encode(f'{BYTES.decode([bos])}<user>x{BYTES.decode([eos])}<assistant>y')
  assert reward.read('?', 'y', {'prompt': chat, 'finished': False})[0].tolist() == said
  assert reward.read('?', 'y', {'prompt': chat})[0].tolist() == [*said, eos]


def test_one_sample_too_long_does_not_fail_the_others(trained, monkeypatch):
  reward = reward_model(str(trained[0]))
  monkeypatch.setattr(models.Config, 'position_limit', property(lambda self: 12))
  good, bad = reward(['p', 'p'], ['a', 'a' * 20], [{}, {}])
  assert math.isfinite(good) and '23 tokens' in str(bad) and '12 positions' in str(bad)


def test_steps_are_read_at_their_ends(base, tmp_path):
  """The loss on packed rows is the cross-entropy at the line ends of unpacked text."""
  records = [
    {'prompt': 'p:', 'completions': ['aa\n', 'b\n'], 'labels': [True, False]},
    {'prompt': 'q:', 'completions': ['abc\n', 'ba\n', 'c\n'], 'labels': [False, None, True]},
  ]
  file = tmp_path / 'steps.jsonl'
  file.write_text(''.join(json.dumps(record) + '\n' for record in records))
  dataset = data.load(f'jsonl:{file}', tokenizer=BYTES, kind='stepwise')
  model, params = policy.load_scored(base, BYTES)
  params = {**params, 'score': {'w': jnp.linspace(-1, 1, 32)[:, None] * 3}}
  compute = jax.jit(make_fields(model, process_reward()))
  fields = collect(lambda batch: compute(params, None, batch), Batches(dataset, 2, None))
  loss, _ = process_reward()({name: fields[name] for name in fields if name != 'ids'})

  terms = []
  for record in records:
    tokens = jnp.array(
      [[BYTES.bos_id, *BYTES.encode(record['prompt'] + ''.join(record['completions']))]]
    )
    states = model.hidden(params, tokens, models.mask_layout(jnp.ones(tokens.shape, bool)))
    scores = np.asarray(model.scores(params, states)[0, :, 0], np.float64)
    ends = np.flatnonzero(np.asarray(tokens[0]) == ord('\n'))
    for end, label in zip(ends, record['labels'], strict=True):
      if label is not None:
        terms.append(np.logaddexp(0, -scores[end] if label else scores[end]))
  np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


def test_a_policy_learns_from_a_reward_model(trained, base, tmp_path):
  """Rewards by name in a config; every member of an ensemble is asked."""
  folder, _ = trained
  file = tmp_path / 'prompts.jsonl'
  file.write_text(''.join(json.dumps({'prompt': f'{i}:'}) + '\n' for i in range(8)))
  c = settings(
    base,
    f'jsonl:{file}',
    **{
      'objective': 'reinforce()',
      'rewards': f"minimum(reward_model('{folder}'), reward_model('{folder}', spread=1.0))",
      'steps': 1,
      'rollout.prompts': 8,
      'rollout.samples': 2,
      'rollout.max_new_tokens': 4,
      'data.eval_fraction': 0.0,
      'batch.row_lengths': (),
    },
  )
  run.train(c, tmp_path / 'w', console=QUIET)
  first = json.loads((tmp_path / 'w' / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['rewards/minimum/scored'] == 1
  assert math.isfinite(first['reward/mean'])


def test_another_tokenizer_is_said(trained, tmp_path, caplog):
  folder, _ = trained
  other = dataclasses.replace(BYTES, fingerprint='another', name='theirs')
  make = makers(sharding.make_mesh(), other)['reward_model']
  (term,) = rewards.parse(f"reward_model('{folder}', name=quality)", {'reward_model': make})
  assert term.name == 'quality' and "policy 'theirs'" in caplog.text
  assert str(term) == f"reward_model({str(folder)!r}, name='quality')"


def test_a_vocabulary_too_small_is_refused(trained):
  reward = reward_model(str(trained[0]))
  with pytest.raises(ValueError, match='tokenizer has 300 tokens, the model only 259'):
    dataclasses.replace(reward, tokenizer=dataclasses.replace(BYTES, vocab_size=300))
  assert isinstance(reward, RewardModel)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ("reward_model('{base}')", 'it has no scores'),
    ("reward_model('preset:tiny')", 'it has no scores'),
    ('reward_model(3)', "as reward_model\\('runs/rm'\\), got 3"),
    ("reward_model('{rm}', spread=0)", 'must be a positive number, got 0'),
    ("reward_model('{rm}', scale=1)", "has no 'scale'"),
    ("reward_model('{rm}', mesh=1)", "has no 'mesh'"),
  ],
)
def test_mistakes_in_text_are_named(text, message, trained, base):
  more = makers(sharding.make_mesh(), BYTES)
  with pytest.raises(ValueError, match=message):
    rewards.parse(text.format(base=base, rm=trained[0]), more)


def test_unknown_models_and_broken_files_are_named(trained, tmp_path, caplog):
  with pytest.raises(FileNotFoundError, match="no model at 'nowhere'"):
    reward_model('nowhere')
  reward = reward_model(str(trained[0]))
  models.save_hf(tmp_path, reward.model, reward.params, BYTES)
  plain = reward_model(str(tmp_path))
  assert (plain.mean, plain.scale) == (0.0, 1.0) and 'not centred' in caplog.text
  with pytest.raises(ValueError, match='no std of its scores is known'):
    reward_model(str(tmp_path), spread=1.0)
  (tmp_path / normalisation.FILE).write_text('{"mean": 0}')
  with pytest.raises(ValueError, match='should hold mean, std, completions and step'):
    reward_model(str(tmp_path))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'objective': 'bradley_terry() + 0.1*sft()'}, r"there is no \['logps'\]"),
    ({'objective': 'sft()', 'model': '{rm}'}, 'is a reward model'),
    ({'objective': 'reinforce()', 'model': '{rm}', 'rewards': 'length_penalty()'}, 'cannot write'),
  ],
)
def test_a_reward_model_is_no_policy(changes, message, trained, base, source, tmp_path):
  changes = {k: v.format(rm=trained[0]) if isinstance(v, str) else v for k, v in changes.items()}
  with pytest.raises(ValueError, match=message):
    run.train(settings(base, source, **changes), tmp_path / 'w', console=QUIET)
  assert not (tmp_path / 'w').exists()


def test_generate_refuses_a_reward_model(trained, capsys):
  assert main(['generate', f'--model={trained[0]}', '--prompt=a']) == 2
  assert 'it scores completions and cannot write any' in capsys.readouterr().err


@pytest.mark.parametrize('arg', ['', 'tiny', 'process', 'process,tiny'])
def test_the_shipped_config(arg):
  c = configs_of(arg)
  assert c.objective.startswith('process_reward' if 'process' in arg else 'bradley_terry')
  assert bool(c.data.train) == ('tiny' in arg)


def configs_of(arg):
  return load(f'reward:{arg}' if arg else 'reward')


def test_the_shipped_config_knows_its_arguments():
  with pytest.raises(ValueError, match="'process,tiny', not 'tinny'"):
    configs_of('tinny')
