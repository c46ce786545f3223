"""The report says what was measured: numbers recomputed here, tables well formed, plots written."""

import dataclasses
import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from experiments import plots, report
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
  names = 'loss', 'rewards/accuracies', 'rewards/margins'
  train = [{'step': i, **{name: 0.7 / i for name in names}} for i in range(1, 21)]
  held_out = [{'step': i, **{f'eval/{name}': 0.5 for name in names}} for i in (0, 10, 20)]
  return report.Study(
    prompts=[f'The plot {i}' for i in range(n)],
    evaluations=(before, after),
    metrics=[*train, *held_out],
    settings={'seed': 0, 'objective': 'dpo(beta=0.1)'},
    seconds={'SFT': 12.3, 'DPO': 4.5},
    command='python -m experiments.quickstart --seed=0',
  )


def test_rows_hold_the_measured_numbers(study):
  rows = {name: (before, after) for name, before, after in report.rows(study)}
  # Prompts average (0 - 0.4) / 2 = -0.2, the last -1: (5 * -0.2 - 1) / 6; after: (0.6 + 0.2) / 2.
  assert rows['true score'][0].startswith('-0.333 [')
  assert rows['true score'][1].startswith('+0.400 [')
  assert rows['gain, prompt by prompt'][1].startswith('+0.733 [')
  assert rows['score of valid reviews'][0].startswith('-0.200 [')
  assert rows['valid reviews'][0].startswith('83.3% [')
  assert rows['win rate over reference'][1].startswith('100.0% [')
  assert rows['KL, k1 estimate (nats)'] == ('0', '2.00 [2.00, 2.00]')
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


def test_headline_says_what_the_table_says(study):
  text = report._headline(study)
  assert 'from -0.33 to +0.40; its samples win 100% [61%, 100%]' in text and '2.0 nats' in text


def test_training_figure_has_a_curve_in_every_panel(study, tmp_path, monkeypatch):
  drawn, plot = [], Axes.plot

  def record(self, x, y, **style):
    drawn.append((x, y))
    return plot(self, x, y, **style)

  monkeypatch.setattr(Axes, 'plot', record)
  sums = [
    {**{k: v for k, v in line.items() if not k.endswith('loss')}, **parts(line)}
    for line in study.metrics
  ]
  for metrics in (study.metrics, sums):  # of dpo alone, and of dpo in a sum
    drawn.clear()
    plots.training(tmp_path / 'x.png', metrics)
    assert [len(x) for x, _ in drawn] == [20, 3, 19, 2, 20, 3]  # accuracy begins with the 2nd step
    assert drawn[0][1][0] == 0.7


def parts(line):
  """A line's loss, as the metrics of a sum name it."""
  out = {}
  for name, value in line.items():
    if name.endswith('loss'):
      out |= {name: value + 1, f'{name}/dpo': value}
  return out


def test_labels_along_the_frontier_do_not_overlap():
  assert plots._apart([0, 1, 2, 2.05, 2.02], [0, 0.3, 0.4, 0.41, 0.4]) == [0, 4, 1]
  assert plots._apart([0, 0], [1, 1]) == [0]


def test_valid_reviews_may_be_missing_altogether(study, tmp_path):
  broken = dataclasses.replace(
    study.before, scores=np.full((6, 2), -1.0), valid=np.zeros((6, 2), bool)
  )
  study = dataclasses.replace(study, evaluations=(broken, study.after))
  rows = {name: (before, after) for name, before, after in report.rows(study)}
  assert rows['score of valid reviews'] == ('none', 'none')


def test_summary_prints_table_and_samples(study):
  console = Console(file=io.StringIO(), width=80)
  report.summary(console, study)
  text = console.file.getvalue()
  assert all(row[2] in text for row in report.rows(study))  # numbers are not wrapped
  assert 'win rate over reference' in text and 'The plot 0' in text and '+0.60' in text
