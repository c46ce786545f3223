"""The bench: its arithmetic, its page, and our side of each task at a size of seconds."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpref import models
from tools.bench import __main__ as bench
from tools.bench import figures, ours, pairs, series, table, workers
from tools.bench.figures import Side
from tools.bench.peers import protocol
from tools.bench.shapes import SHAPES, TASKS, Shape

TINY = models.Model(
  models.Config(
    vocab_size=10, width=4, num_layers=2, num_heads=2, mlp_width=3, num_kv_heads=1, tied=True
  )
)
PAIR = {'prompt': [5, 6, 7], 'chosen': [8, 9], 'rejected': [4]}


def by_hand(prompt: int, completions: list[int], head: bool = True) -> float:
  """Forward FLOPs, one token and one product at a time."""
  projections = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3)  # layers * (q, k and v, out, the mlp)
  total = 0.0
  branches = [range(prompt), *(range(prompt, prompt + size) for size in completions)]
  for branch in branches:
    for position in branch:
      # Scores and their sum over (position + 1) keys, 2 heads of 2 channels, 2 layers.
      total += 2 * projections + 2 * 2 * (position + 1) * 4 * 2
  return total + (2 * 4 * 10 * sum(completions) if head else 0)


@pytest.mark.parametrize(
  ('task', 'expected'),
  [
    ('dpo', 3 * by_hand(3, [2, 1])),
    ('sft', 3 * by_hand(3, [2])),
    ('reward', 3 * by_hand(3, [2, 1], head=False)),
    ('logprobs', by_hand(3, [2, 1])),
    ('decode', by_hand(2, [4, 4, 4])),
    ('grpo', 5 * by_hand(2, [4, 4, 4])),
  ],
)
def test_useful_flops_are_those_of_every_token_once(task, expected):
  shape = Shape('tiny', {}, samples=3, new_tokens=4, max_prompt=2)
  work = figures.useful(task, shape, [PAIR])
  assert figures.flops(task, TINY, work) == pytest.approx(expected)
  assert figures.flops(task, TINY, figures.useful(task, shape, [PAIR] * 5)) == pytest.approx(
    5 * expected
  )


def test_kto_reads_both_kinds_in_turn_and_mismatches_within_the_batch():
  """Batches of 2 and 1: completions are chosen, rejected, chosen; each gets the one before it."""
  given = [{'prompt': [i] * 3, 'chosen': [10 + i] * 2, 'rejected': [20 + i] * 4} for i in range(3)]
  made = pairs.labelled(given, 2, max_length=6)
  assert [one['label'] for one in made] == [True, False, True]
  assert [one['completion'] for one in made] == [[10] * 2, [21] * 4, [12] * 2]
  assert [one['other'] for one in made] == [[21] * 3, [10] * 2, [12] * 2]  # at most 6 with a prompt
  work = figures.useful('kto', SHAPES['micro'], made)
  assert (work.examples, work.scored, work.tokens) == (3, 8, 17)
  assert figures.flops('kto', TINY, work) == pytest.approx(
    3 * (2 * by_hand(3, [2]) + by_hand(3, [4]))
  )


def test_a_series_says_what_doubling_costs_beside_its_arithmetic(tmp_path, monkeypatch):
  asked = []

  def once(args, names, change, rework):
    shape = change(SHAPES['micro'])
    asked.append((args.task, shape, len(rework([PAIR])[0]['prompt'])))
    # A step of 2 s and 10 GFLOP; all others of 3 s, 5 CPU seconds and 20 GFLOP.
    seconds, cpu, gflop = (2.0, 4.0, 10.0) if len(asked) == 1 else (3.0, 5.0, 20.0)
    row = {'step_seconds': seconds, 'cpu_seconds': cpu, 'gflops_per_second': gflop / seconds}
    return {'ours': row | {'scored_per_second': 7.0}, 'setting': 'Here.'}

  monkeypatch.setattr(bench, 'measure', once)
  out = tmp_path / 'out.json'
  bench.main(['scaling', '--preset=micro', f'--json={out}'])
  first, *others = json.loads(out.read_text())['runs']
  assert (first['arithmetic'], first['cpu_cost_over_arithmetic']) == (1.0, 1.0)
  for run in others:
    assert run['cost'] == pytest.approx(1.5) and run['arithmetic'] == pytest.approx(2.0)
    assert run['cpu_cost_over_arithmetic'] == pytest.approx(1.25 / 2)
  base = SHAPES['micro']
  deep = {'num_layers': 2 * models.preset('tiny').num_layers}
  assert asked == [
    ('dpo', base, 3),
    ('dpo', base._replace(batch=8), 3),
    ('dpo', base._replace(max_length=128), 6),
    ('dpo', base._replace(overrides=deep), 3),
  ]
  asked.clear()
  bench.main(['batches', '--preset=micro'])
  assert [(task, shape.prompts) for task, shape, _ in asked] == [
    ('decode', n) for n in series.PROMPTS
  ]


def test_a_ratio_is_of_medians_and_its_spread_of_rounds_side_by_side():
  # Medians 2 and 6; round by round 3, 4 and 1.5.
  assert figures.ratio([1.0, 2.0, 4.0], [3.0, 8.0, 6.0]) == (3.0, (1.5, 4.0))
  with pytest.raises(ValueError, match='as many rounds'):
    figures.ratio([1.0], [])


def test_disagreement_is_relative_and_of_what_both_have():
  assert figures.disagreement([2.0, 1.0], [1.0, 1.0, 7.0]) == 1.0
  assert figures.disagreement([None], [None]) is None


def test_rates_are_of_the_median_round():
  side = Side([1.0, 2.0, 9.0], [3.0, 4.0, 5.0], 0.5, [0.7], {'compile_seconds': 6.0})
  work = figures.useful('dpo', SHAPES['micro'], [PAIR] * 8)  # of 4 steps: 2 pairs each
  row = side.row(work, steps=4, flops=80e9, peak=100e9, core_peak=50e9)
  assert row['examples_per_second'] == 1.0  # 8 pairs in 4 steps of 2 s
  assert row['scored_per_second'] == 3.0
  assert row['gflops_per_second'] == pytest.approx(10.0)
  assert row['mfu'] == pytest.approx(0.1)
  # 20e9 a step in 4 s of CPU time, of 50e9 a second.
  assert side.row(work, 4, 80e9, peak=None, core_peak=50e9)['mfu'] == pytest.approx(0.1)
  assert (row['cpu_seconds'], row['compile_seconds']) == (4.0, 6.0)


def test_made_up_pairs_fit_and_follow_from_the_seed():
  made = pairs.made_up(200, 259, 64, seed=3)
  assert made == pairs.made_up(200, 259, 64, seed=3) != pairs.made_up(200, 259, 64, seed=4)
  for pair in made:
    assert len(pair['prompt']) + max(len(pair['chosen']), len(pair['rejected'])) <= 64
    assert min(map(min, pair.values())) >= pairs.SPECIAL
    assert max(map(max, pair.values())) < 259


def result(ratio: float, key: str = 'dpo cpu-6m') -> dict:
  row = {'step_seconds': 1.0, 'cpu_seconds': 2.0, 'mfu': None, 'table_seconds': 3.0}
  peer = {'peer': row, 'ratio': ratio, 'spread': (1.0, 3.0), 'cpu_ratio': 2.5}
  peer |= {'memory_ratio': 0.5, 'loss_disagreement': 1e-6, 'norm_disagreement': None}
  return {
    'key': key, 'title': key, 'unit': 'pairs', 'values': 'losses', 'warm': 5, 'rounds': 3,
    'setting': 'Here.', 'ours': row, 'remat': None, 'peers': {'trl': peer},
  }  # fmt: skip


def write(result: dict, page: Path) -> None:
  table.write(result['key'], table.section(result), page)


def test_the_page_keeps_all_but_the_section_that_is_written_again(tmp_path):
  page = tmp_path / 'docs' / 'performance.md'
  write(result(2.0), page)
  write(result(7.0, 'grpo cpu-6m'), page)
  page.write_text(page.read_text() + '\nWords of people.\n')
  others = page.read_text().split(table.BEGIN.format('grpo cpu-6m'))[1]
  write(result(4.0), page)
  text = page.read_text()
  assert '**4.00 times** as fast as TRL (1.00 to 3.00 over 3 rounds' in text
  assert '**2.00 times**' not in text
  assert text.split(table.BEGIN.format('grpo cpu-6m'))[1] == others
  again = page.read_text()
  write(result(4.0), page)
  assert page.read_text() == again


def test_a_page_with_half_a_section_is_left_alone(tmp_path):
  page = tmp_path / 'performance.md'
  page.write_text(table.BEGIN.format('dpo cpu-6m'))
  with pytest.raises(ValueError, match='mend the page'):
    write(result(2.0), page)
  assert page.read_text() == table.BEGIN.format('dpo cpu-6m')


def test_a_peer_that_is_absent_is_skipped_with_the_way_to_get_it(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('JAXPREF_CACHE', str(tmp_path))
  assert 'python -m tools.bench install --against trl' in workers.lacking('trl', 'dpo', 'live')
  monkeypatch.setattr(bench, 'measure', lambda args, names: result(1.0) | {'names': names})
  assert bench.main(['dpo', '--against', 'trl'])['names'] == ['ours']
  assert 'skipped trl' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('asked', 'why'), [(['reward'], 'measured on dpo'), (['dpo', '--reference=table'], 'no table')]
)
def test_a_peer_is_skipped_where_it_has_no_such_work(asked, why, monkeypatch, capsys):
  monkeypatch.setattr(bench, 'measure', lambda args, names: result(1.0) | {'names': names})
  assert bench.main([*asked, '--against', 'tunix'])['names'] == ['ours']
  assert why in capsys.readouterr().out


def test_remat_is_measured_beside_what_it_saves_on():
  """Twice the seconds at a quarter of our memory, which is a tenth of the peer's."""
  sides = {
    name: {'step_seconds': seconds, 'seconds': [seconds], 'cpu_seconds': seconds, 'peak_gib': gib,
           'losses': [1.0]}
    for name, seconds, gib in (('ours', 1.0, 4.0), ('remat', 2.0, 1.0), ('trl', 3.0, 10.0))
  }  # fmt: skip
  again = {'is': 'full', 'side': sides['remat']} | bench.compare(
    'dpo', sides['ours'], sides['remat']
  )
  peer = {'peer': sides['trl']} | bench.compare('dpo', sides['ours'], sides['trl'])
  found = result(1.0) | {'ours': sides['ours'], 'remat': again, 'peers': {'trl': peer}}
  text = table.section(found)
  assert '| jaxpref, remat full | 2.00 |' in text
  assert 'with 0.40 of its peak memory' in text
  assert 'has 0.50 of its speed' in text
  assert '0.25 of the memory without, 0.10 of that of TRL' in text


def test_tokens_beyond_the_vocabulary_are_an_error_before_anything_runs(monkeypatch):
  over = [{'prompt': [1, 2], 'chosen': [3, 259], 'rejected': []}]  # tiny has 0 to 258
  monkeypatch.setattr(bench.pairs, 'from_file', lambda *_: over)
  args = bench.parse(['dpo', '--preset=micro', '--data=pairs.jsonl'])
  with pytest.raises(workers.Failed, match=r'token 259 .*preset micro \(259\)'):
    bench.measure(args, ['ours'])


def test_remat_is_refused_where_there_is_no_gradient(capsys):
  with pytest.raises(SystemExit):
    bench.parse(['decode', '--remat=full'])
  assert 'dpo, kto, sft, reward, grpo' in capsys.readouterr().err


def test_an_unknown_peer_is_an_error_that_names_the_known(capsys):
  with pytest.raises(SystemExit):
    bench.main(['dpo', '--against', 'tlr'])
  assert 'known: trl' in capsys.readouterr().err


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.slow
def test_every_task_runs_alone(task, tmp_path):
  out = tmp_path / 'out.json'
  bench.main([task, '--preset=micro', '--warm=1', '--rounds=2', '--steps=1', f'--json={out}'])
  found = json.loads(out.read_text())
  assert (found['peer'], found['ratio'], found['spread']) == (None, None, None)
  assert len(found['ours']['seconds']) == 2
  assert found['ours']['examples_per_second'] > 0
  assert found['ours']['versions']['jax'] == jax.__version__


def test_a_loss_belongs_to_the_round_that_its_step_was_asked_in(monkeypatch, capsys):
  """A loop that is not ours asks for the next step, and only then has the last one's loss."""
  monkeypatch.setattr('sys.stdin', io.StringIO('2\n1\n'))
  for number, losses in enumerate(protocol.turns({'shapes': 4})):
    losses.append(float(number))
  lines = capsys.readouterr().out.splitlines()
  rounds = [json.loads(line.removeprefix(protocol.MARK)) for line in lines]
  assert [(r['steps'], r['losses']) for r in rounds] == [(2, [0.0, 1.0]), (1, [2.0])]
  assert all(r['shapes'] == 4 and r['peak_gib'] > 0 for r in rounds)


def test_our_side_of_dpo_begins_at_log_2_and_says_what_was_measured(monkeypatch, capsys):
  """A policy that is its own reference has margin 0, so the first loss is -log σ(0)."""
  shape = SHAPES['micro']
  job = bench.job_of(bench.parse(['dpo', '--preset=micro']), shape, pairs.made_up(8, 259, 64), 2)
  model, params = models.init(models.preset(shape.model), jax.random.key(0))
  notes = {}
  step = ours.STEPS['dpo'](job, model, params, notes)
  monkeypatch.setattr('sys.stdin', io.StringIO('2\n'))
  protocol.serve(step, notes)
  said = json.loads(capsys.readouterr().out.removeprefix(protocol.MARK))
  assert said['losses'][0] == pytest.approx(np.log(2), rel=1e-6)
  assert said['losses'][1] != said['losses'][0]
  assert (said['steps'], len(said['losses'])) == (2, 2)
  assert said['grad_norm'] > 0
  assert said['seconds'] > 0
