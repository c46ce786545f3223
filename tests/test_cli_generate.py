"""`jaxpref generate`: flags, files and pipes."""

import json

import jax
import numpy as np
import pytest
from absl import flags

from jaxpref import models
from jaxpref.cli import generate
from jaxpref.data.tokenizer import load_tokenizer

BYTES = load_tokenizer('byte')
FEW = ('--max_new_tokens=4', '--batch_size=2')


def run(*arguments):
  assert generate.main(['generate', *arguments]) == 0


def records(text):
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A Hugging Face folder with a model of one layer and the byte tokenizer."""
  path = tmp_path_factory.mktemp('hf')
  model = models.Model(models.preset('tiny', width=16, mlp_width=32, num_layers=1))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4'), model.param_shapes())
  models.save_hf(path, model, jax.tree.map(jax.numpy.asarray, params), BYTES)
  return str(path)


def test_json_lines_to_a_file_and_to_a_pipe(folder, tmp_path, capsys):
  out = tmp_path / 'out.jsonl'
  arguments = (f'--model={folder}', '--prompt=ab', '--prompt=c', '--num_samples=2', *FEW)
  run(*arguments, f'--output={out}')
  lines = records(out.read_text())
  assert [(x['prompt'], x['sample']) for x in lines] == [('ab', 0), ('ab', 1), ('c', 0), ('c', 1)]
  assert all(x['tokens'] <= 4 and x['logp'] < 0 for x in lines)
  assert {x['finish_reason'] for x in lines} <= {'stop', 'length'}
  assert capsys.readouterr().out == ''
  run(*arguments)
  assert records(capsys.readouterr().out) == lines
  run(*arguments, '--seed=1')
  assert records(capsys.readouterr().out) != lines


def test_sampling_flags_reach_the_sampler(folder, capsys):
  def texts(*arguments):
    run(f'--model={folder}', '--prompt=ab', '--num_samples=2', *FEW, *arguments)
    return [x['completion'] for x in records(capsys.readouterr().out)]

  greedy = texts('--temperature=0')
  assert greedy[0] == greedy[1]
  for same in ('--top_k=1', '--top_p=0.00001', '--min_p=1'):
    assert texts(same) == greedy
  cut = texts('--temperature=0', f'--stop={greedy[0][-1]}', '--stop=absent')
  assert cut[0] == greedy[0][: greedy[0].index(greedy[0][-1])]


def test_prompts_come_from_files(tmp_path):
  text = tmp_path / 'prompts.txt'
  text.write_text('one\n\ntwo words\n')
  assert generate.read_prompts(text) == ['one', 'two words']
  talk = [{'role': 'user', 'content': 'hi'}]
  lines = tmp_path / 'prompts.jsonl'
  lines.write_text(f'"a"\n{json.dumps({"prompt": "b"})}\n\n{json.dumps({"messages": talk})}\n')
  assert generate.read_prompts(lines) == ['a', 'b', talk]
  for wrong, message in (('{"prompt": 3}', 'expected a string'), ('{"prompt"', 'not JSON')):
    lines.write_text(f'"a"\n\n{wrong}\n')
    with pytest.raises(ValueError, match=rf'prompts\.jsonl:3: {message}'):
      generate.read_prompts(lines)


def test_chat_uses_the_template(folder, capsys):
  run(f'--model={folder}', '--prompt=hi', '--chat', *FEW)
  (record,) = records(capsys.readouterr().out)
  assert record['prompt'] == [{'role': 'user', 'content': 'hi'}]


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    (['--prompt=a'], flags.Error, '--model is missing'),
    (['--model=preset:tiny'], flags.Error, 'no prompts'),
    (['--model=preset:tiny', 'hello'], flags.Error, "unexpected 'hello'"),
    (['--model=preset:tiny', '--prompt=a', '--top_q=1'], flags.Error, 'top_p'),
    (['--model=preset:tiny', '--prompt=a', '--top_p=7'], ValueError, 'top_p must be'),
    (['--model=preset:tinny', '--prompt=a'], ValueError, "did you mean 'tiny'"),
    (['--model=nowhere', '--prompt=a'], FileNotFoundError, "no model at 'nowhere'"),
  ],
)
def test_mistakes_are_named(arguments, error, message):
  with pytest.raises(error, match=message):
    generate.main(['generate', *arguments])


def test_help_lists_every_flag(capsys):
  run('--help')
  shown = capsys.readouterr().out
  assert all(f'--{name}' in shown or f'--[no]{name}' in shown for name in generate.define_flags())
