"""The report says what was measured: numbers recomputed here, tables well formed, plots written."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from experiments import report
from jaxpref.evals import statistics


def evaluation(step, scores, texts, kl=0.0):
  scores = np.array(scores, np.float64)
  drift = np.full((*scores.shape, 4), kl / 4)
  return report.Evaluation(
    step=step,
    completions=texts,
    scores=scores,
    valid=scores > -1,
    kl=statistics.kl(drift, 0 * drift, np.ones(drift.shape, bool)),
  )


@pytest.fixture
def study():
  n = 6
  before = evaluation(0, [[0.0, -0.4]] * (n - 1) + [[-1.0, -1.0]], [[' is fine.', ' is bad.']] * n)
  after = evaluation(20, [[0.6, 0.2]] * n, [[' is | great.', f' is {i}.'] for i in range(n)], kl=2)
  lines = [
    {'step': i, 'loss': 0.7 / i, 'rewards/accuracies': 0.5, 'rewards/margins': 0.1 * i}
    for i in range(1, 21)
  ]
  return report.Study(
    prompts=[f'The plot {i}' for i in range(n)],
    evaluations=(before, after),
    train_metrics=lines,
    held_out_metrics=lines[::5],
    settings={'seed': 0, 'objective': 'dpo(beta=0.1)'},
    seconds={'SFT': 12.3, 'DPO': 4.5},
    command='python -m experiments.quickstart --seed=0',
  )


def test_rows_hold_the_measured_numbers(study):
  rows = {name: (before, after) for name, before, after in report.rows(study)}
  # Prompts average (0 - 0.4) / 2 = -0.2, the last -1: (5 * -0.2 - 1) / 6; after: (0.6 + 0.2) / 2.
  assert rows['true score'][0].startswith('-0.333 [')
  assert rows['true score'][1].startswith('+0.400 [')
  assert rows['gain, paired by prompt'][1].startswith('+0.733 [')
  assert rows['true score of valid reviews'][0].startswith('-0.200 [')
  assert rows['valid reviews'][0].startswith('83.3% [')
  assert rows['win rate over the reference'][1].startswith('100.0% [')
  assert rows['KL to the reference (k1), nats'] == ('0', '2.00 [2.00, 2.00]')
  assert rows['distinct completions'] == ('16.7%', '58.3%')


def test_report_is_whole(study, tmp_path):
  text = report.write(tmp_path / 'new' / 'folder', study).read_text(encoding='utf-8')
  for name in (report.TRAINING_PLOT, report.OUTCOME_PLOT):
    assert f']({name})' in text
    assert (tmp_path / 'new' / 'folder' / name).read_bytes().startswith(b'\x89PNG')
  for part in (study.command, '100.0%', 'dpo(beta=0.1)', '12.3', '6 held-out prompts'):
    assert part in text
  tables = [block.splitlines() for block in text.split('\n\n') if block.startswith('|')]
  assert len(tables) == 4
  for table in tables:
    assert len({line.replace('\\|', '').count('|') for line in table}) == 1


def test_valid_reviews_may_be_missing_altogether(study, tmp_path):
  broken = dataclasses.replace(
    study.before, scores=np.full((6, 2), -1.0), valid=np.zeros((6, 2), bool)
  )
  study = dataclasses.replace(study, evaluations=(broken, study.after))
  rows = {name: (before, after) for name, before, after in report.rows(study)}
  assert rows['true score of valid reviews'] == ('none', 'none')


def test_summary_prints_table_and_samples(study):
  console = Console(file=io.StringIO(), width=120)
  report.summary(console, study)
  text = console.file.getvalue()
  assert 'win rate over the reference' in text and 'The plot 0' in text and '+0.60' in text
