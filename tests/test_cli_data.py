"""`jaxpref data inspect` and `lint`."""

import json

import pytest

from jaxpref.cli.main import main

PAIRS = [
  {'prompt': 'one', 'chosen': ' good', 'rejected': ' bad'},
  {'prompt': 'two', 'chosen': ' fine', 'rejected': ' poor'},
  {'prompt': 'three', 'chosen': ' yes', 'rejected': ' no'},
]


@pytest.fixture
def pairs(tmp_path):
  """A source of three pairs."""
  return lines(tmp_path, *map(json.dumps, PAIRS))


def lines(folder, *texts):
  file = folder / 'pairs.jsonl'
  file.write_text(''.join(f'{text}\n' for text in texts))
  return f'--data=jsonl:{file}'


def run(capsys, *arguments):
  status = main(['data', *arguments])
  shown = capsys.readouterr()
  assert shown.err == '' or status
  return shown.out


def test_inspect_shows_the_first_examples(pairs, capsys):
  shown = run(capsys, 'inspect', pairs, '--num=2')
  assert '3 examples (preference)' in shown
  for text in ('<|bos|>one', ' good<|eos|>', ' poor<|eos|>', 'pairs.jsonl:2'):
    assert text in shown
  assert 'three' not in shown


def test_inspect_shows_the_examples_asked_for(pairs, capsys):
  shown = run(capsys, 'inspect', pairs, '--indices=-1,1', '--boundaries')
  assert 'o·n·e' not in shown
  assert shown.index('t·h·r·e·e') < shown.index('t·w·o')


def test_flags_reach_the_loader(tmp_path, capsys):
  question = json.dumps({'q': 'one', 'a': ' good', 'b': ' bad', 'c': ' worse'})
  source = lines(tmp_path, question)
  columns = '--columns=prompt=q,chosen=a,rejected=b'
  assert ' good' in run(capsys, 'inspect', source, columns)
  shown = run(capsys, 'inspect', source, columns, '--kind=sft', '--max_length=6')
  assert '1 examples (sft)' in shown and ' bad' not in shown
  assert '<|bos|>e' not in shown


def test_a_config_names_data_and_flags_come_first(pairs, capsys):
  shown = run(capsys, 'inspect', '--config=dpo:tiny', '--config.data.eval_fraction=0', '--num=0')
  assert '400 examples (preference)' in shown
  shown = run(capsys, 'inspect', '--config=dpo:tiny', pairs, '--num=1')
  assert '3 examples' in shown and 'good' in shown


def test_lint_counts_unreadable_records_and_fails(tmp_path, capsys):
  source = lines(tmp_path, json.dumps(PAIRS[0]), '{"prompt"', json.dumps(PAIRS[1]))
  assert main(['data', 'lint', source]) == 1
  shown = capsys.readouterr().out
  assert 'error' in shown and 'skipped' in shown
  assert main(['data', 'lint', source, '--on_error=raise']) == 2
  assert 'pairs.jsonl:2: not JSON' in capsys.readouterr().err
  assert main(['data', 'inspect', source]) == 2


def test_lint_of_sound_data_succeeds(pairs, tmp_path, capsys):
  assert main(['data', 'lint', pairs]) == 0
  assert main(['data', 'lint', lines(tmp_path, *[json.dumps(PAIRS[0])] * 2)]) == 0
  assert 'duplicates' in capsys.readouterr().out  # a warning, no error


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['inspect'], 'no data: give --data='),
    (['lnit'], "inspect or lint or convert, got 'lnit'"),
    ([], "got 'nothing'"),
    (['inspect', 'more', '--data=x'], "got 'inspect more'"),
    (['inspect', '--data=jsonl:nowhere.jsonl'], "no such file: 'nowhere.jsonl'"),
    (['inspect', '--config=dpo:tiny', '--indices=one'], 'expected numbers such as 0,1,2'),
    (['inspect', '--config=dpo:tiny', '--indices=500'], 'there is no example 500'),
    (['lint', '--config=dpo:tiny', '--tokenizer=nowhere'], 'no tokenizer.json in nowhere'),
    (['lint', '--config=dpo:tiny', '--columns=promt=q'], "did you mean 'prompt'"),
    (['lint', '--config=dpo:tiny', '--kind=pairs'], 'kind should be one of'),
  ],
)
def test_mistakes_are_named(arguments, message, capsys):
  assert main(['data', *arguments]) == 2
  assert message in capsys.readouterr().err


def test_convert_writes_records_and_counts_what_it_skips(tmp_path, capsys):
  source = tmp_path / 'pairs.jsonl'
  good = json.dumps({'prompt': 'a', 'chosen': ' b', 'rejected': ' c'})
  source.write_text(f'{good}\n{{"prompt": 1}}\n')
  out = tmp_path / 'out.jsonl'
  command = ['data', 'convert', f'--data=jsonl:{source}', '--to=unpaired', f'--output={out}']
  assert main(command) == 2
  assert 'pairs.jsonl:2' in capsys.readouterr().err
  assert main([*command, '--on_error=skip']) == 0
  assert [json.loads(line)['label'] for line in out.read_text().splitlines()] == [True, False]
  assert '2 records; 1 skipped' in capsys.readouterr().err
  assert main([*command[:-2], '--to=unparied']) == 2
  assert 'unpaired' in capsys.readouterr().err


def test_lint_writes_its_findings_as_json(tmp_path):
  source, found = tmp_path / 'pairs.jsonl', tmp_path / 'lint.json'
  same = {'prompt': 'a', 'chosen': ' b', 'rejected': ' b'}
  pairs = [same, {'prompt': 'c', 'chosen': ' d', 'rejected': ' e'}, same | {'prompt': 'f'}]
  source.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
  main(['data', 'lint', f'--data=jsonl:{source}', f'--json={found}'])
  written = json.loads(found.read_text())
  assert written['examples'] == 3
  identical = next(f for f in written['findings'] if 'identical' in json.dumps(f))
  assert identical['count'] == 2
  assert [origin.rpartition(':')[2] for origin in identical['examples']] == ['1', '3']
