"""`run.train`: what a config means, and mistakes found before anything is computed."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console
from ml_collections import ConfigDict

from jaxpref import config as configs
from jaxpref import models, program, run
from jaxpref.cli.configs import folder
from jaxpref.data import load_tokenizer
from jaxpref.train import policy
from jaxpref.train.workdir import open_workdir
from jaxpref.train.writers import read_metrics

QUIET = rich.console.Console(quiet=True)


def tiny(**changes) -> ConfigDict:
  c = configs.default()
  c.data.train = f'jsonl:{folder() / "tiny_pairs.jsonl"}'
  c.data.kind = 'preference'
  c.data.eval_fraction = 0.05
  c.data.max_length = 96
  c.objective = 'dpo()'
  c.batch.size = 8
  c.batch.row_lengths = (192,)
  c.steps = 2
  c.optimizer.learning_rate = 1e-3
  c.log.tensorboard = False
  c.update_from_flattened_dict(changes)
  return c


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'objective': 'dpoo()'}, "'dpo'"),
    ({'objective': 'dpo(bta=1)'}, 'beta'),
    ({'optimizer.name': 'adam'}, "did you mean 'adamw'"),
    ({'optimizer.schedule': 'cos'}, 'cosine'),
    ({'model': 'preset:tinny'}, 'tiny'),
    ({'model': '/nowhere'}, 'no model at'),
    ({'profile': (3,)}, 'first step, how many'),
    ({'attention': 'dense'}, "'auto' or one of blocked, kernel"),
    ({'attention': 'kernel'}, 'is for GPUs and TPUs, this is cpu'),
    ({'reference': 'none'}, "'table' or 'live'"),
    ({'data.train': ''}, 'config.data.train is empty'),
    ({'data.columns': 'promt=question'}, "did you mean 'prompt'"),
    ({'data.eval_fraction': 1.0}, 'leaves 0 examples'),
    ({'batch.size': 9, 'batch.microbatches': 2}, 'multiple of microbatches'),
    ({'checkpoint.keep_best': 'eval/loss'}, 'eval/loss min'),
    ({'mesh.data': 3}, 'devices'),
  ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, changes, message):
  with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
    run.train(tiny(**changes), tmp_path / 'w', console=QUIET)
  assert not (tmp_path / 'w').exists()


def test_schedules_and_scalars():
  c = configs.default().optimizer
  for name in ('constant', 'linear', 'cosine', 'wsd'):
    with c.unlocked():
      c.schedule, c.learning_rate, c.warmup, c.final, c.clip = name, 0.2, 0.1, 0.5, 0.0
    scalars = program.optimizer_scalars(c, 100)
    rate = scalars['learning_rate']
    assert float(rate(0)) < 0.03 and float(rate(10)) == pytest.approx(0.2, rel=1e-5)
    end = 0.2 if name == 'constant' else 0.1
    assert float(rate(100)) == pytest.approx(end, rel=1e-5)
    assert scalars['clip'] == np.inf


@pytest.mark.slow
def test_live_reference_equals_the_table(tmp_path):
  table = run.train(tiny(), tmp_path / 'table', console=QUIET)
  live = run.train(tiny(reference='live'), tmp_path / 'live', console=QUIET)
  for name, value in table.metrics.items():
    np.testing.assert_allclose(value, live.metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)
  lines = read_metrics(tmp_path / 'table' / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [1, 2, 2]
  assert lines[0]['loss'] == pytest.approx(np.log(2), abs=1e-5)
  again = run.train(tiny(), tmp_path / 'table', console=QUIET)  # nothing left to do
  assert again.metrics == table.metrics


def test_kto_reads_completions_of_other_prompts(tmp_path):
  more = {'data.kind': 'unpaired', 'batch.size': 16, 'batch.microbatches': 2}
  trained = run.train(tiny(objective='kto()', **more), tmp_path / 'w', console=QUIET)
  first = read_metrics(tmp_path / 'w' / 'metrics.jsonl')[0]
  assert first['loss'] == pytest.approx(0.5) and first['kl'] == pytest.approx(0, abs=1e-3)
  assert {'eval/kl', 'eval/rewards/margins'} <= trained.metrics.keys()


def test_a_reward_model_begins_as_a_language_model(tmp_path):
  c = tiny(objective='bradley_terry(centring=0.01)', steps=1, **{'data.max_length': 48})
  trained = run.train(c, tmp_path / 'w', console=QUIET)
  assert trained.model.config.num_labels == 1
  assert trained.metrics.keys() >= {'eval/loss', 'eval/rewards/accuracies', 'eval/rewards/margins'}
  assert 'eval/entropy' not in trained.metrics  # it has no vocabulary
  assert not (tmp_path / 'w' / 'reference').exists()


def test_other_data_under_the_same_config_is_refused(tmp_path):
  source = tmp_path / 'pairs.jsonl'
  lines = (folder() / 'tiny_pairs.jsonl').read_text().splitlines(keepends=True)
  source.write_text(''.join(lines[:60]))
  c = tiny(objective='sft()', **{'data.kind': 'sft', 'data.train': f'jsonl:{source}', 'steps': 1})
  run.train(c, tmp_path / 'w', console=QUIET)
  source.write_text(''.join(lines[:61]))
  with pytest.raises(ValueError, match='other data'):
    run.train(c, tmp_path / 'w', console=QUIET)


def test_a_workdir_outlives_what_it_began_with(tmp_path):
  tokenizer = load_tokenizer('byte')
  model, params = models.init(models.preset('tiny', width=32, mlp_width=48), jax.random.key(0))
  models.save_hf(tmp_path / 'hf', model, params, tokenizer)
  sft = {'objective': 'sft()', 'data.kind': 'sft', 'steps': 1}
  run.train(tiny(model=str(tmp_path / 'hf'), **sft), tmp_path / 'first', console=QUIET)
  run.train(tiny(model=str(tmp_path / 'first'), **sft), tmp_path / 'second', console=QUIET)
  shutil.rmtree(tmp_path / 'hf')
  shutil.rmtree(tmp_path / 'first')
  found, params, tokens = policy.load_policy(str(tmp_path / 'second'))
  assert found.config.width == 32 and params['embed']['w'].shape == (259, 32)
  assert tokens.fingerprint == tokenizer.fingerprint


def test_a_chain_of_runs_from_a_preset_outlives_its_links(tmp_path):
  """Each workdir keeps the preset itself, also where the run it began with has lost its base."""
  tokenizer = load_tokenizer('byte')
  spec = 'preset:tiny'
  for name in ('first', 'second', 'third'):
    folder = open_workdir(tmp_path / name, {'model': spec, 'tokenizer': ''}).path
    policy.remember(folder, spec, tokenizer)
    (folder / 'checkpoints').mkdir()
    if Path(spec).is_dir():
      shutil.rmtree(spec)
    spec = str(folder)
  expected = models.preset('tiny', vocab_size=tokenizer.vocab_size)
  assert policy.architecture(spec, tokenizer) == expected


@pytest.mark.slow
def test_a_run_with_divided_rows_is_one_on_a_device(tmp_path, monkeypatch):
  """Groups over data and fsdp, each row over two devices: every step, and the evaluation."""
  mesh = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.context': 2}
  many = run.train(tiny(steps=3, **mesh), tmp_path / 'many', console=QUIET)
  with monkeypatch.context() as patch:
    patch.setattr(run.roles, 'trainers', lambda config, devices: devices[:1])
    alone = run.train(tiny(steps=3, **{'mesh.data': 1}), tmp_path / 'alone', console=QUIET)
  assert {x.sharding.num_devices for x in jax.tree.leaves(many.params)} == {8}
  assert {x.sharding.num_devices for x in jax.tree.leaves(alone.params)} == {1}

  lines, theirs = (read_metrics(tmp_path / one / 'metrics.jsonl') for one in ('many', 'alone'))
  for ours, line in zip(lines, theirs, strict=True):
    assert ours.keys() == line.keys()
    for name in ('loss', 'grad_norm', 'rewards/margins', 'eval/loss', 'eval/rewards/margins'):
      if name in line:
        assert ours[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), name
        assert name != 'loss' or ours[name] == pytest.approx(line[name], rel=1e-5)
