"""Configs are found by name and by path, in a checkout and in a wheel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref.cli import configs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def shipped(tmp_path, monkeypatch):
  """A package folder with the configs dpo and sft, seen from an empty working folder."""
  folder, elsewhere = tmp_path / 'package' / 'configs', tmp_path / 'elsewhere'
  folder.mkdir(parents=True)
  elsewhere.mkdir()
  for name in ('dpo', 'sft', '_private'):
    (folder / f'{name}.py').write_text('def get_config(arg=None): return arg\n')
  monkeypatch.setattr(configs, 'PACKAGE', folder.parent)
  monkeypatch.chdir(elsewhere)
  return folder


def test_the_known_names(shipped):
  assert configs.list_configs() == ['dpo', 'sft']


@pytest.mark.parametrize('spec', ['dpo', 'dpo:tiny', 'dpo:tiny,beta=0.1', 'dpo:model=a:b'])
def test_a_name_resolves_to_the_shipped_file(shipped, spec):
  name, colon, arg = spec.partition(':')
  assert configs.resolve(spec) == f'{shipped / name}.py{colon}{arg}'


def test_a_repository_path_resolves_away_from_the_repository(shipped):
  assert configs.resolve('configs/dpo.py:tiny') == f'{shipped / "dpo.py"}:tiny'


def test_a_file_here_comes_before_the_shipped_one(shipped):
  Path('configs').mkdir()
  Path('configs/dpo.py').touch()
  Path('mine.py').touch()
  assert configs.resolve('configs/dpo.py:tiny') == 'configs/dpo.py:tiny'
  assert configs.resolve('mine.py') == 'mine.py'
  assert configs.resolve('dpo') == str(shipped / 'dpo.py')


@pytest.mark.parametrize(
  'spec, message',
  [
    ('dop:tiny', r"unknown config 'dop'; did you mean 'dpo'\? Known configs: dpo, sft;"),
    ('grpo_gsm8k', "unknown config 'grpo_gsm8k'. Known configs"),
    ('configs/spt.py', r"no config file 'configs/spt.py' here; did you mean 'sft'\?"),
    ('other/dpo.py:tiny', "no config file 'other/dpo.py' here"),
  ],
)
def test_an_unknown_name_lists_the_known_and_the_nearest(shipped, spec, message):
  with pytest.raises(ValueError, match=message):
    configs.resolve(spec)


def test_a_checkout_finds_its_own_folder():
  assert configs.folder() == ROOT / 'configs'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """A folder with jaxpref, and only it, installed from the built wheel."""
  folder = tmp_path_factory.mktemp('wheel')
  pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
  build = ['wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', str(folder), str(ROOT)]
  subprocess.run([*pip, *build], check=True)
  (file,) = folder.glob('jaxpref-*.whl')
  subprocess.run(
    [*pip, 'install', '--no-deps', '--target', str(folder / 'lib'), str(file)], check=True
  )
  return folder / 'lib'


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_resolves_by_name(wheel, tmp_path):
  program = 'import jaxpref.cli.configs as c; print(c.resolve("dpo:tiny"), *c.list_configs())'
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(wheel)},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  path, *known = done.stdout.split()
  assert path == f'{wheel / "jaxpref" / "configs" / "dpo.py"}:tiny'
  assert known == configs.list_configs()


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_trains(wheel, tmp_path):
  (tmp_path / 'empty').mkdir()
  arguments = ['--config=dpo:tiny', '--config.steps=2', '--config.batch.size=8', '--workdir=w']
  done = subprocess.run(
    [sys.executable, '-m', 'jaxpref.cli.main', 'train', *arguments],
    cwd=tmp_path / 'empty',
    env={**os.environ, 'PYTHONPATH': str(wheel), 'XLA_FLAGS': ''},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert done.returncode == 0, done.stdout
  assert f'jsonl:{wheel / "jaxpref" / "configs" / "tiny_pairs.jsonl"}' in done.stdout
  lines = (tmp_path / 'empty' / 'w' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 2]
  assert (tmp_path / 'empty' / 'w' / 'checkpoints' / '2').is_dir()
