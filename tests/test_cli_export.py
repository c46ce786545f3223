"""`jaxpref export`: which checkpoint, which dtype, and what survives of the base model's folder."""

import json

import jax
import numpy as np
import pytest

from jaxpref import models
from jaxpref.cli.main import main
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.workdir import open_workdir

BYTES = load_tokenizer('byte')
BEST = ('eval/loss', 'min')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A Hugging Face folder in bfloat16, with a field in config.json of its own."""
  folder = tmp_path_factory.mktemp('hf')
  model = models.Model(models.preset('tiny', width=16, mlp_width=32, num_layers=1))
  models.save_hf(folder, model, numbers(model, 0.5, 'bfloat16'), BYTES)
  file = folder / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'license': 'mit'}))
  return folder


def numbers(model, value, dtype='float32'):
  return jax.tree.map(lambda x: jax.numpy.full(x.shape, value, dtype), model.param_shapes())


@pytest.fixture(scope='module', params=['folder', 'preset'])
def run(request, base, tmp_path_factory):
  """A workdir whose checkpoint of step n holds the number n everywhere, -n in the average."""
  spec = str(base) if request.param == 'folder' else 'preset:tiny'
  config = {'model': spec, 'tokenizer': '', 'dtype': 'auto'}
  config['checkpoint'] = {'keep_best': ' '.join(BEST)}
  folder = open_workdir(tmp_path_factory.mktemp('run'), config).path
  checkpoints = Checkpoints(folder, keep_last=2, keep_best=BEST)
  preset = models.preset('tiny', vocab_size=BYTES.vocab_size)
  model = models.load_hf(base)[0] if request.param == 'folder' else models.Model(preset)
  for step, loss in ((1, 0.1), (2, 0.3), (3, 0.2)):
    state = {'params': numbers(model, step), 'ema': numbers(model, -step)}
    checkpoints.save(step, state, {}, {'eval/loss': loss})
  checkpoints.close()
  return folder


def export(run, output, *arguments):
  assert main(['export', f'--model={run}', f'--output={output}', *arguments]) == 0
  return models.load_hf(output)


@pytest.mark.parametrize(
  ('arguments', 'value'),
  [
    ([], 3),
    (['--step=2'], 2),
    (['--step=best'], 1),
    (['--ema'], -3),
    (['--step=best', '--ema', '--dtype=float16'], -1),
  ],
)
def test_the_checkpoint_asked_for_is_written(run, arguments, value, tmp_path):
  _, params = export(run, tmp_path / 'out', *arguments)
  assert all((np.asarray(x) == value).all() for x in jax.tree.leaves(params))


def test_the_base_decides_dtype_and_config(run, base, tmp_path, capsys):
  from_folder = json.loads((run / 'config.json').read_text())['model'] == str(base)
  _, params = export(run, tmp_path / 'out')
  dtype = 'bfloat16' if from_folder else 'float32'
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
  assert capsys.readouterr().out.startswith(f'{tmp_path / "out"}: 0.')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  if from_folder:
    assert config == json.loads((base / 'config.json').read_text())
  assert config['torch_dtype'] == dtype
  assert load_tokenizer(tmp_path / 'out').fingerprint == BYTES.fingerprint


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_dtype_can_be_asked_for(run, dtype, tmp_path):
  _, params = export(run, tmp_path, f'--dtype={dtype}')
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['torch_dtype'] == dtype


def test_nothing_is_overwritten_unasked(run, base, tmp_path, capsys):
  export(run, tmp_path)
  before = (tmp_path / 'model.safetensors').read_bytes()
  again = ['export', f'--model={run}', f'--output={tmp_path}', '--step=2']
  assert main(again) == 2
  assert 'holds a model already; --overwrite replaces it' in capsys.readouterr().err
  assert (tmp_path / 'model.safetensors').read_bytes() == before
  assert main([*again, '--overwrite']) == 0
  assert (tmp_path / 'model.safetensors').read_bytes() != before
  assert main(['export', f'--model={base}', f'--output={run}', '--overwrite']) == 2
  assert 'is the workdir of a run' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--output=x'], '--model is missing'),
    (['--model=preset:tiny'], '--output is missing'),
    (['--model=nowhere', '--output=x'], "no model at 'nowhere'"),
    (['--model=preset:tiny', '--output=x', '--step=1'], 'preset:tiny is not a workdir'),
    (['--model={run}', '--output=x', '--step=7'], 'no checkpoint of step 7'),
    (['--model={run}', '--output=x', '--step=last'], "expected a number or 'best', got 'last'"),
    (['--model={run}', '--output=x', '--dtype=int8'], 'should be one of <source|float32|'),
    (['--model={run}', '--output=x', 'stray'], "unexpected 'stray'"),
  ],
)
def test_mistakes_are_named(run, arguments, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(['export', *(argument.format(run=run) for argument in arguments)]) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_run_without_average_or_best_says_so(base, tmp_path, capsys):
  config = {'model': str(base), 'tokenizer': '', 'dtype': 'auto', 'checkpoint': {'keep_best': ''}}
  folder = open_workdir(tmp_path / 'run', config).path
  checkpoints = Checkpoints(folder)
  checkpoints.save(4, {'params': numbers(models.load_hf(base)[0], 1)})
  checkpoints.close()
  arguments = ['export', f'--model={folder}', f'--output={tmp_path / "out"}']
  for flag, message in (('--ema', "holds no 'ema'"), ('--step=best', 'It has [4]')):
    assert main([*arguments, flag]) == 2
    assert message in capsys.readouterr().err
