"""The command line: help, suggestions, and mistakes that fail before anything is computed."""

import json
import os
import subprocess
import sys

import pytest

from jaxpref.cli import main as cli
from jaxpref.cli import train

COMMANDS = tuple(cli.COMMANDS)


def fails(capsys, *arguments):
  """What a command line that must fail says on stderr."""
  assert cli.main(arguments) == 2
  shown = capsys.readouterr()
  assert 'Traceback' not in shown.err and shown.out == ''
  return shown.err


@pytest.mark.parametrize('arguments', [[], ['--help'], ['-h'], ['help']])
def test_usage_lists_the_commands(arguments, capsys):
  assert cli.main(arguments) == (0 if arguments else 2)
  shown = capsys.readouterr().out
  assert all(f'  {name}' in shown for name in COMMANDS)


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_help(command, capsys):
  assert cli.main([command, '--help']) == 0
  assert f'jaxpref {command}' in capsys.readouterr().out


def test_help_shows_a_config_with_its_changes(capsys):
  assert cli.main(['train', '--config=dpo:tiny', '--config.batch.size=4', '--help']) == 0
  shown = capsys.readouterr().out
  assert '--config.batch.size=4\n' in shown
  assert "--config.objective='dpo(beta=0.1)'\n" in shown


@pytest.mark.parametrize(
  ('word', 'near'), [('trian', 'train'), ('exprot', 'export'), ('evaluate', 'eval')]
)
def test_an_unknown_command_suggests(word, near, capsys):
  assert f'unknown command {word!r}; did you mean {near!r}?' in fails(capsys, word)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config.data.trian=x'], '--config.data.trian: the config has no such key; did you mean '
      '--config.data.train?'),
    (['--config.learning_rate=1'], 'did you mean --config.optimizer.learning_rate?'),
    (['--config.batchsize=1'], 'did you mean --config.batch.size?'),
    (['--config.data=1'], '--config.data is a group of keys: data.columns, data.eval,'),
    (['--config.steps=many'], '--config.steps=many: invalid literal'),
    (['--wrkdir=x'], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    (['stray'], "unexpected 'stray'"),
    (['--noconfig.log.tensorbord'], 'did you mean --config.log.tensorboard?'),
    (['--config.objective=dpoo()'], "unknown name 'dpoo'; did you mean 'dpo'?"),
    (['--config.objective=dpo(betta=1)'], "did you mean 'beta'"),
    (['--config.optimizer.name=adamm'], "unknown optimizer 'adamm'; did you mean 'adamw'?"),
    (['--config.optimizer.schedule=cos'], 'config.optimizer.schedule must be one of'),
    (['--config.model=preset:tinny'], "did you mean 'tiny'"),
    (['--config.model=nowhere'], "no model at 'nowhere'"),
    (['--config.data.train=jsonl:nowhere.jsonl'], "no such file: 'nowhere.jsonl'"),
    (['--config.data.columns=prompt'], 'columns must look like'),
    (['--config.data.eval_fraction=1'], 'leaves 0 examples to train on'),
    (['--config.checkpoint.keep_best=loss'], "must look like 'eval/loss min'"),
    (['--config.mesh.data=3'], 'mesh'),
  ],
)  # fmt: skip
def test_mistakes_fail_at_once_and_claim_no_folder(arguments, message, tmp_path, capsys):
  folder = tmp_path / 'run'
  said = fails(capsys, 'train', '--config=dpo:tiny', f'--workdir={folder}', *arguments)
  assert message in said
  assert not folder.exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--config is missing'),
    (['--config=dpo:tiny'], '--workdir is missing'),
    (['--config=dop:tiny'], "unknown config 'dop'; did you mean 'dpo'?"),
    (['--config=dpo:tny'], "knows the arguments '', 'tiny' and '8b'"),
    (['--config.steps=1'], '--config.steps changes a config; say which'),
    (['--config'], "unknown config ''"),
  ],
)
def test_a_config_that_cannot_be_found(arguments, message, capsys):
  assert cli.main(['train', *arguments]) == 2
  assert message in capsys.readouterr().err


def test_two_words_and_paths_name_a_config_too(tmp_path, capsys):
  file = tmp_path / 'mine.py'
  file.write_text('from jaxpref import config\ndef get_config(): return config.default()\n')
  for arguments in (['--config', 'dpo:tiny'], [f'--config={file}'], ['-config', str(file)]):
    assert (
      cli.main(['train', '--config.seed=5', *arguments, '--noconfig.log.tensorboard', '-h']) == 0
    )
    shown = capsys.readouterr().out
    assert '--config.seed=5\n' in shown and '--config.log.tensorboard=False\n' in shown


def test_a_file_without_a_config_is_refused(tmp_path, capsys):
  file = tmp_path / 'mine.py'
  for text, message in (('', 'has no function get_config'), ('get_config = dict', 'got dict')):
    file.write_text(text)
    assert message in fails(capsys, 'train', f'--config={file}')


def test_a_workdir_of_another_config_is_refused_by_key(tmp_path, capsys):
  arguments = ['--config=dpo:tiny', f'--workdir={tmp_path}']
  earlier = json.loads(config_json(arguments))
  earlier['batch']['size'] = 99
  earlier['log']['every'] = 7  # may differ
  (tmp_path / 'config.json').write_text(json.dumps(earlier))
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  said = fails(capsys, 'train', *arguments)
  assert 'batch.size: 99 there, 16 now' in said
  assert 'log.every' not in said


def config_json(arguments):
  own = train.define_flags()
  train.configs.parse(own, ['train', *arguments])
  return own.config.to_json()


def test_debugging_keeps_the_traceback(monkeypatch):
  monkeypatch.setenv('JAXPREF_DEBUG', '1')
  with pytest.raises(ValueError, match='unknown config'):
    cli.main(['train', '--config=dop'])


def test_the_program_starts_again_with_huge_pages_and_its_arguments():
  """As a user runs it: the arguments survive, whether or not this kernel asks for the switch."""
  environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  command = [sys.executable, '-m', 'jaxpref.cli.main', 'trian', '--flag=a b']
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert "unknown command 'trian'; did you mean 'train'?" in done.stderr


@pytest.mark.parametrize(
  ('setting', 'given', 'restarts'),
  [
    ('always [madvise] never', {}, True),
    ('[always] madvise never', {}, False),
    ('always [madvise] never', {'GLIBC_TUNABLES': 'glibc.malloc.check=1'}, False),
  ],
)
def test_huge_pages_are_asked_for_once_and_only_where_linux_leaves_it_to_us(
  monkeypatch, setting, given, restarts
):
  environment, started = dict(given), []
  monkeypatch.setattr(cli.os, 'environ', environment)
  monkeypatch.setattr(cli.os, 'execv', lambda *call: started.append(call))
  monkeypatch.setattr(cli.Path, 'is_file', lambda _: True)
  monkeypatch.setattr(cli.Path, 'read_text', lambda _: setting)
  monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'jaxpref.cli.main', 'train'])
  cli.use_huge_pages()
  cli.use_huge_pages()  # what was started does not start again
  call = (sys.executable, [sys.executable, '-m', 'jaxpref.cli.main', 'train'])
  assert started == ([call] if restarts else [])
  wanted = given or ({'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'} if restarts else {})
  assert environment == wanted
