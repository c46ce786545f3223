"""Three stages on the world of reviews: what PPO sees, what is measured, and that it gains."""

import json

import jax
import numpy as np
import pytest

from experiments import options, proxies, report, reviews, sentiment
from experiments.sentiment import Settings
from jaxpref import models, rewards
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.evals import statistics
from jaxpref.generation import Completion
from jaxpref.rollout.reward_models import RewardModel
from jaxpref.sharding import make_mesh


def evaluation(step, scores):
  flat = np.zeros((*np.shape(scores), 1))
  texts = [[' is good.' for _ in row] for row in scores]
  kl = statistics.kl(flat + step, flat, flat == 0)
  return report.Evaluation(step, texts, np.array(scores), np.array(scores) > -1, kl)


@pytest.fixture
def study():
  metrics = [
    {'step': n, 'kl': n / 2, 'kl_coef': 0.1, 'value/explained_variance': n - 3.0,
     'rewards/true_score/mean': 0.1 * n, 'rewards/reward_model/mean': 0.5 * n}
    for n in range(1, 4)
  ]  # fmt: skip
  evaluations = [evaluation(0, [[0.0, 0.4], [0.2, -0.2]]), evaluation(3, [[0.4, 0.4], [0.6, 0.2]])]
  prompts = ['The plot', 'The cast']
  return report.Study(prompts, evaluations, metrics, {'seed': 0}, {'PPO': 1.0}, 'here', 'PPO')


PROXIES = [np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[2.0, 2.0], [2.0, 2.0]])]


def test_the_truth_is_logged_and_never_learnt_from():
  assert sentiment.true_score(['The plot'], [' is good.'], [{}]) == [0.4]
  (term,) = rewards.parse(sentiment.TRUTH + ' + length_penalty()')[:1]
  assert term.weight == 0 and term.name == 'true_score'


def test_gains_are_in_deviations_of_the_reference(study):
  proxy, truth, away = proxies.gap(study, PROXIES)
  # Proxy: 0, 1, 2, 1 have a deviation of √½; gains 1.5 and 0.5 by prompt. Truth: 0, 0.4, 0.2, -0.2
  # have a variance of 0.06 - 0.01 = 0.05; gains 0.2 and 0.4.
  expected = 1.0 / np.sqrt(0.5), 0.3 / np.sqrt(0.05)
  assert (proxy.value, truth.value) == pytest.approx(expected)
  assert away.value == pytest.approx(expected[0] - expected[1])
  # Gaps by prompt: 1.5/√½ - 0.2/√0.05 and 0.5/√½ - 0.4/√0.05; normal interval over two prompts.
  gaps = np.array([1.5, 0.5]) / np.sqrt(0.5) - np.array([0.2, 0.4]) / np.sqrt(0.05)
  assert away.high - away.low == pytest.approx(2 * 1.959964 * gaps.std(ddof=1) / np.sqrt(2))


def test_a_report_holds_what_was_measured(study, tmp_path):
  proxies.write(tmp_path, study, PROXIES, 2.0)
  text = (tmp_path / 'report.md').read_text(encoding='utf-8')
  assert 'from +0.10 to +0.40, 3.0 nats' in text and 'target was 2' in text
  for row in report.rows(study):
    assert '| ' + ' | '.join(row).rstrip() in text
  proxy, _, away = proxies.gap(study, PROXIES)
  assert f'{proxy:+.2f}' in text and f'{away:+.2f}' in text
  assert all((tmp_path / name).stat().st_size > 10_000 for name in ('outcome.png', 'training.png'))


def test_labels_come_from_the_judge_and_only_from_whole_reviews(tmp_path):
  row = [
    Completion(0, k, text, (1,), (0.0,), reason)
    for k, (text, reason) in enumerate(
      [
        (' is awful.', 'stop'),
        (' is superb.', 'stop'),
        (' is fi', 'length'),
        (' is fine.', 'stop'),
        (' is good.', 'stop'),
        (' is bad.', 'stop'),
        (' is plain.', 'stop'),
        (' is plain.', 'stop'),
      ]
    )
  ]
  settings = Settings(temperature=1e-3)
  sample = lambda params, prompts, n, rollout: [row for _ in prompts]  # noqa: E731
  right = sentiment.label(settings, ['The plot'], ['The cast'], {}, sample, tmp_path)
  assert right == 1.0
  for name, prompt in (('pairs', 'The plot'), ('held_out_pairs', 'The cast')):
    lines = [json.loads(line) for line in (tmp_path / f'{name}.jsonl').read_text().splitlines()]
    assert [tuple(line.values()) for line in lines] == [
      (prompt, ' is superb.', ' is awful.'),
      (prompt, ' is good.', ' is fine.'),
      (prompt, ' is plain.', ' is bad.'),
    ]


def test_the_proxy_reads_samples_as_ppo_did():
  tokenizer = load_tokenizer('byte')
  shape = models.preset('tiny', width=16, num_layers=1, num_heads=2, mlp_width=24, num_labels=1)
  model, params = models.init(shape, jax.random.key(0))
  proxy = RewardModel(model, params, tokenizer, make_mesh())
  row = [
    Completion(0, k, ' ab', (1,), (0.0,), reason) for k, reason in enumerate(('stop', 'length'))
  ]
  found = sentiment._proxy(proxy, ['x', 'y'], [row, row])
  expected = proxy(['x'] * 2 + ['y'] * 2, [' ab'] * 4, [{'finished': f} for f in (True, False)] * 2)
  np.testing.assert_allclose(found, np.reshape(expected, (2, 2)))
  assert found[0, 0] != found[0, 1]  # with its end, and cut off before it


def test_the_command_of_a_report_names_what_was_changed():
  assert options.changed(Settings()) == []
  assert options.changed(Settings(seed=2, kl_target=3.0)) == ['--seed=2', '--kl_target=3.0']


@pytest.mark.slow
def test_ppo_raises_the_true_score_within_its_target(tmp_path):
  small = Settings(
    sft_steps=250, samples_per_prompt=8, rollouts=24, evaluations=2, held_out_samples=2,
  )  # fmt: skip
  found, scored = sentiment.study(small, tmp_path)
  assert [e.step for e in found.evaluations] == [0, 48, 96]
  assert set(found.prompts) == set(reviews.prompts()[1])
  assert abs(found.before.kl.k1.value) < 1e-3  # sampler and training path agree
  assert statistics.difference(found.after.scores, found.before.scores).low > 0.05
  assert 0.05 < found.after.kl.k1.value < small.kl_target
  assert statistics.difference(scored[-1], scored[0]).low > 0.1
  assert {line['step'] for line in found.metrics} == {*range(1, 97)}
  assert all(np.isfinite(line['rewards/true_score/mean']) for line in found.metrics[::4])
