import json

import ml_collections
import pytest

from jaxpref.train.workdir import open_workdir, read_config


def config(**changes):
  values = {
    'seed': 0,
    'objective': 'dpo(beta=0.1)',
    'imports': ('my_losses',),
    'steps': 100,
    'optimizer': {'learning_rate': 3e-4, 'clip': None},
    'log': {'every': 10, 'wandb': ''},
    'mesh': {'data': 1},
    'batch': {'size': 8, 'chunk': 0},
    'reference_memory': 'device',
    'empty': {},
  }
  new = ml_collections.ConfigDict(values)
  new.update_from_flattened_dict(changes)
  return new


def test_a_config_round_trips_sorted(tmp_path):
  workdir = open_workdir(tmp_path / 'deep' / 'run', config())
  assert workdir.metrics.parent == workdir.path
  text = (workdir.path / 'config.json').read_text()
  assert list(json.loads(text)) == sorted(config().keys())
  assert read_config(workdir.path).to_dict() == config().to_dict()
  workdir.metrics.write_text('{"step": 1}\n')  # from here on another config would be refused
  open_workdir(workdir.path, read_config(workdir.path))
  frozen = ml_collections.FrozenConfigDict(config())
  open_workdir(workdir.path, frozen)
  assert sorted(p.name for p in workdir.path.iterdir()) == [
    'config.json',
    'metrics.jsonl',
  ]  # no half-written files


def begun(folder, **changes):
  """The workdir of a run that has got somewhere."""
  workdir = open_workdir(folder, config(**changes))
  workdir.metrics.write_text('{"step": 1}\n')
  return workdir


def test_another_config_is_refused_by_keys_with_both_values(tmp_path):
  begun(tmp_path)
  before = (tmp_path / 'config.json').read_text()
  other = config(**{'optimizer.learning_rate': 1e-3, 'seed': 1, 'log.every': 5})
  other.extra = 'new'
  del other.objective
  with pytest.raises(ValueError) as caught:
    open_workdir(tmp_path, other)
  lines = str(caught.value).splitlines()
  assert lines[1:-1] == [
    "  extra: absent there, 'new' now",
    "  objective: 'dpo(beta=0.1)' there, absent now",
    '  optimizer.learning_rate: 0.0003 there, 0.001 now',
    '  seed: 0 there, 1 now',
  ]
  assert 'another workdir' in lines[-1] and 'restore' in lines[-1]
  assert (tmp_path / 'config.json').read_text() == before


def test_what_does_not_change_results_may_change(tmp_path):
  begun(tmp_path)
  other = {'log.every': 1, 'mesh.data': 8, 'batch.chunk': 512, 'reference_memory': 'host'}
  open_workdir(tmp_path, config(**other))
  assert read_config(tmp_path).mesh.data == 8
  with pytest.raises(ValueError, match=r'batch\.size: 8 there, 16 now'):
    open_workdir(tmp_path, config(**{'batch.size': 16}))


def test_a_run_that_got_nowhere_gives_way(tmp_path):
  open_workdir(tmp_path, config())
  for left in ('base', 'reference', 'checkpoints'):
    (tmp_path / left).mkdir()
  open_workdir(tmp_path, config())
  assert (tmp_path / 'base').is_dir()
  open_workdir(tmp_path, config(seed=1))
  assert not (tmp_path / 'base').exists() and not (tmp_path / 'reference').exists()
  (tmp_path / 'checkpoints' / '5').mkdir()
  with pytest.raises(ValueError, match='seed: 1 there, 0 now'):
    open_workdir(tmp_path, config())


def test_only_whole_names_are_free(tmp_path):
  open_workdir(tmp_path, {'logits': 1})
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  with pytest.raises(ValueError, match='logits: 1 there, 2 now'):
    open_workdir(tmp_path, {'logits': 2})


def test_a_run_may_grow_but_not_shrink(tmp_path, caplog):
  begun(tmp_path)
  open_workdir(tmp_path, config(steps=200))
  assert 'steps grows from 100 to 200' in caplog.text
  with pytest.raises(ValueError, match=r'steps: 200 there, 150 now \(it may grow, not shrink\)'):
    open_workdir(tmp_path, config(steps=150))


def test_unusable_folders_say_what_would_work(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match=r'cannot write to .*/file/run: .*choose a folder'):
    open_workdir(tmp_path / 'file' / 'run', config())
  with pytest.raises(ValueError, match=r's3://bucket/run.* is a URL.*gs://'):
    open_workdir('s3://bucket/run', config())
  with pytest.raises(FileNotFoundError, match='not the workdir of a run'):
    read_config(tmp_path / 'nowhere')
  (tmp_path / 'old' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(ValueError, match='holds checkpoints but no config'):
    open_workdir(tmp_path / 'old', config())
  (tmp_path / 'config.json').write_text('{"seed": ')
  with pytest.raises(ValueError, match=r'config.json is not valid JSON'):
    open_workdir(tmp_path, config())


def test_a_value_that_json_cannot_hold_is_named(tmp_path):
  with pytest.raises(TypeError, match=r'config\.optimizer\.schedule = .* is a function'):
    open_workdir(tmp_path, {'optimizer': {'schedule': lambda step: step}})
  assert not list(tmp_path.iterdir())
