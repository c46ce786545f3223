"""Reward models with several heads: trained as each head alone, used as an ensemble."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxpref import data, models, rewards, run, sharding
from jaxpref.cli.main import main
from jaxpref.data.batches import Batches
from jaxpref.evals.heldout import collect
from jaxpref.objectives import bradley_terry, process_reward, reduce_metrics
from jaxpref.objectives.candidates import last_scored
from jaxpref.train import critics, normalisation, policy
from jaxpref.train.reward_models import makers, reward_model
from jaxpref.train.step import make_fields
from tests.test_reward_models import BYTES, QUIET, ask, pairs, settings

HEADS = 3


@pytest.mark.parametrize('loss', [bradley_terry(centring=0.1), process_reward()], ids=str)
def test_the_loss_of_heads_is_the_mean_of_theirs_and_so_is_its_gradient(loss):
  rng = np.random.default_rng(0)
  B, K, T = 4, 2, 6
  scores = rng.normal(size=(B, K, T, HEADS)).astype(np.float32)
  mask = np.arange(T) < rng.integers(1, T, (B, K, 1))
  ends = (mask & (rng.random(mask.shape) < 0.5)).astype(np.float32)
  fields = {'mask': mask, 'step_ends': ends, 'step_labels': (rng.random(mask.shape) < 0.5) * ends}

  @jax.jit
  def of(rewards):
    return loss({**fields, 'rewards': rewards})

  graded = jax.jit(jax.value_and_grad(of, has_aux=True))
  (value, _), slope = graded(scores)
  apart = [graded(scores[..., h]) for h in range(HEADS)]
  np.testing.assert_allclose(value, np.mean([one for (one, _), _ in apart]), rtol=1e-5)
  want = np.stack([each for _, each in apart], -1) / HEADS
  np.testing.assert_allclose(slope, want, atol=1e-6)

  # Shares of microbatches add up, and metrics are those of the mean score.
  partial = jax.jit(lambda part: loss.partial(part, loss.norms(fields)))
  halves = [
    partial({k: v[i : i + 2] for k, v in {**fields, 'rewards': scores}.items()}) for i in (0, 2)
  ]
  np.testing.assert_allclose(sum(half for half, _ in halves), value, rtol=1e-5)
  said = reduce_metrics(halves[0][1])
  mean = {k: v[:2] for k, v in {**fields, 'rewards': scores.mean(-1)}.items()}
  alone = reduce_metrics(partial(mean)[1])
  assert said.keys() - alone.keys() == {'rewards/head_std'}
  for name in alone.keys() - {'loss'}:
    np.testing.assert_allclose(said[name], alone[name], rtol=1e-5, err_msg=name)
  finals = np.stack([last_scored(scores[:2, ..., h], mask[:2]) for h in range(HEADS)], -1)
  np.testing.assert_allclose(said['rewards/head_std'], finals.std(-1).mean(), rtol=1e-5)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp('heads')
  config = models.preset('tiny', width=32, mlp_width=48, num_layers=1)
  models.save_hf(path / 'hf', *models.init(config, jax.random.key(0)), BYTES)
  (path / 'pairs.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in pairs(96)))
  c = settings(str(path / 'hf'), f'jsonl:{path / "pairs.jsonl"}', heads=HEADS, steps=6)
  found = run.train(c, path / 'rm', console=QUIET)
  assert main(['export', f'--model={path / "rm"}', f'--output={path / "out"}']) == 0
  return path, found


def raw_scores(path, found):
  dataset = data.load(f'jsonl:{path / "pairs.jsonl"}', tokenizer=BYTES, kind='preference')
  compute = jax.jit(make_fields(found.model, bradley_terry()))
  fields = collect(lambda batch: compute(found.params, None, batch), Batches(dataset, 32, None))
  ends = [last_scored(fields['rewards'][..., h], fields['mask']) for h in range(HEADS)]
  return np.stack(ends, -1).astype(np.float64)


@pytest.mark.parametrize('kind', ['rm', 'out'])
def test_heads_are_an_ensemble_of_centred_scores(trained, kind):
  path, found = trained
  raw = raw_scores(path, found)
  known = normalisation.read(path / kind)
  assert len(known.mean) == len(known.std) == HEADS and '\n' not in str(known)
  spread = raw.std(-1)
  assert spread.min() > 0 and found.metrics['eval/rewards/head_std'] > 0.01
  scores = raw - np.array(known.mean)
  make = makers(sharding.make_mesh(), BYTES)
  text = f"reward_model('{path / kind}')"
  for aggregate, want in (
    (f'mean({text})', scores.mean(-1)),
    (f'minimum({text})', scores.min(-1)),
    (f'penalised({text}, k=2.0)', scores.mean(-1) - 2 * scores.std(-1)),
  ):
    (term,) = rewards.parse(aggregate, more=make)
    np.testing.assert_allclose(ask(term.reward, pairs(96)), want, atol=3e-5, err_msg=aggregate)
  scaled = reward_model(str(path / kind), spread=2.0)
  one = np.array(scaled([pairs(1)[0]['prompt']], [pairs(1)[0]['chosen']], [{}]))
  np.testing.assert_allclose(one, scores[:1, 0] * 2 / np.array(known.std), atol=1e-4)
  with pytest.raises(ValueError, match=r'gives 3 scores: make them one by mean'):
    rewards.parse(text, more=make)


def test_training_completions_have_mean_0_at_every_head(trained):
  path, found = trained
  dataset = data.load(f'jsonl:{path / "pairs.jsonl"}', tokenizer=BYTES, kind='preference')
  kept = dataset.split(0.25, 0)[0].indices
  known = normalisation.read(path / 'rm')
  scores = raw_scores(path, found)[kept].reshape(-1, HEADS)
  np.testing.assert_allclose(scores.mean(0), known.mean, atol=1e-5)
  np.testing.assert_allclose(scores.std(0), known.std, atol=1e-5)


def test_export_has_a_label_for_each_head(trained):
  path, found = trained
  written = json.loads((path / 'out' / 'config.json').read_text())
  assert written['architectures'] == ['LlamaForSequenceClassification']
  assert len(written['id2label']) == HEADS
  model, params = policy.load_scored(str(path / 'out'), BYTES, heads=HEADS)
  assert model.config.num_labels == HEADS
  jax.tree.map(np.testing.assert_array_equal, params, found.params)


def test_one_score_begins_at_0_and_several_at_random_with_the_papers_std():
  config = models.preset('tiny', width=4096, num_heads=1, num_kv_heads=1)
  one = models.Model(dataclasses.replace(config, num_labels=1))
  many = models.Model(dataclasses.replace(config, num_labels=8))
  assert not policy.new_scores(one)['score']['w'].any()
  drawn = policy.new_scores(many, 1)['score']['w']
  assert float(drawn.std()) == pytest.approx(4097**-0.5, rel=0.02)  # 32768 draws
  assert np.abs(np.corrcoef(drawn.T) - np.eye(8)).max() < 0.1
  assert (drawn != policy.new_scores(many, 2)['score']['w']).all()


def test_what_cannot_be_is_said(trained, tmp_path):
  path, _ = trained
  source = f'jsonl:{path / "pairs.jsonl"}'
  for changes, message in (
    ({'heads': 0}, 'config.heads=0'),
    ({'heads': 2, 'objective': 'sft()'}, 'reads no rewards'),
  ):
    with pytest.raises(ValueError, match=message):
      run.train(settings(str(path / 'hf'), source, **changes), tmp_path / 'w', console=QUIET)
  with pytest.raises(ValueError, match='has 3 scores, and a critic one'):
    critics.check(str(path / 'rm'), BYTES)
