"""The quickstart gains what it says, in small; DPO and the report get exactly what was sampled."""

import numpy as np
import pytest

from experiments import judge, options, quickstart, reviews, vocabulary
from experiments.quickstart import Settings
from jaxpref import models
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.evals import statistics
from jaxpref.generation import Completion, generate


def completion(text, tokenizer, k, finished=True):
  tokens = (*tokenizer.encode(text), *([tokenizer.eos_id] if finished else []))
  return Completion(0, k, text, tokens, (-1.0,) * len(tokens), 'stop' if finished else 'length')


def test_pairs_are_sampled_tokens_with_the_better_one_first():
  tokenizer = load_tokenizer('byte')
  texts = ' is awful.', ' is superb.', ' is fine.', ' is fine.', ' is good.', ' is go'
  row = [completion(text, tokenizer, k, finished=k < 5) for k, text in enumerate(texts)]
  data, agreement = judge.pairs(tokenizer, 0.01, 0, ['The plot'], [row])
  assert len(data) == 2 and agreement == 1.0  # equal completions make no pair
  found = [[tokenizer.decode(c) for c in example.candidates] for example in data]
  eos = tokenizer.decode([tokenizer.eos_id])
  assert found == [[f' is superb.{eos}', f' is awful.{eos}'], [f' is good.{eos}', ' is go']]
  assert all(scored.all() for example in data for scored in example.scored)
  assert data[0].prompt.tolist() == [tokenizer.bos_id, *tokenizer.encode('The plot')]


def test_judges_of_a_high_temperature_are_often_wrong():
  tokenizer = load_tokenizer('byte')
  row = [completion(t, tokenizer, k) for k, t in enumerate((' is fine.', ' is decent, and') * 200)]
  _, agreement = judge.pairs(tokenizer, 1.2, 0, ['The plot'], [row])
  assert agreement == pytest.approx(1 / (1 + np.exp(-1)), abs=0.1)  # scores 0.2 and -1


def test_evaluations_sum_log_ratios_over_each_completion():
  tokenizer = load_tokenizer('byte')
  prompts = ['The plot', 'The cast']
  good, cut = completion(' is good.', tokenizer, 0), completion(' is', tokenizer, 1, False)
  built = []

  def ref_logps(data):
    built.append(data)
    return [tuple(np.full(n, -1.5) for n in counts) for counts in data.lengths[:, 1:]]

  samples = [[[good, good], [good, good]], [[good, cut], [cut, cut]]]
  first, last = judge.evaluations(tokenizer, prompts, [0, 7], samples, ref_logps)
  assert len(built[0]) == 4  # what was sampled twice is scored once
  assert (first.step, last.step) == (0, 7)
  assert first.kl.k1.value == pytest.approx(0.5 * len(good.tokens))
  assert last.kl.k1.value == pytest.approx(0.5 * (len(good.tokens) / 4 + len(cut.tokens) * 3 / 4))
  assert last.scores.tolist() == [[0.4, -1.0], [-1.0, -1.0]]
  assert last.valid.tolist() == [[True, False], [False, False]]
  assert last.completions == [[' is good.', ' is'], [' is', ' is']]


def test_the_command_of_a_report_names_what_was_changed():
  assert options.changed(Settings(seed=3)) == ['--seed=3']
  assert options.changed(Settings(objective='ipo()')) == ["--objective='ipo()'"]
  assert options.changed(Settings()) == []


def test_vocabulary_has_every_word_and_keeps_the_border_of_prompts(tmp_path):
  prompts, held_out = reviews.prompts()
  corpus = reviews.corpus(prompts, 4000)
  texts = [review.prompt + review.completion for review in corpus]
  tokenizer = vocabulary.learn(texts, quickstart.VOCABULARY, tmp_path)
  for text, review in zip(texts, corpus, strict=True):
    tokens = tokenizer.encode(text)
    assert tokens == tokenizer.encode(review.prompt) + tokenizer.encode(review.completion)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == len(text.split()) + text.count('.') + text.count(',')
  assert max(len(tokenizer.encode(prompt)) for prompt in held_out) <= 8
  assert tokenizer.decode(tokenizer.encode('Żółw?\n')) == 'Żółw?\n'
  assert tokenizer.adds_bos and tokenizer.stop_ids == (tokenizer.eos_id,)
  again = vocabulary.learn(texts, quickstart.VOCABULARY, tmp_path / 'again')
  assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.slow
def test_quickstart_end_to_end(tmp_path):
  small = Settings(
    sft_steps=250, sft_batch=64, samples_per_prompt=8, dpo_steps=60, dpo_batch=32,
    evaluations=2, held_out_samples=2,
  )  # fmt: skip
  study = quickstart.run(small, tmp_path)
  before, after = study.before, study.after
  assert [evaluation.step for evaluation in study.evaluations] == [0, 30, 60]
  assert set(study.prompts) == set(reviews.prompts()[1])
  assert abs(before.kl.k1.value) < 1e-3  # sampler and training path agree
  assert study.metrics[0]['eval/loss/dpo'] == pytest.approx(np.log(2), abs=1e-4)
  assert [line['step'] for line in study.metrics if 'learning_rate' in line] == [*range(1, 61)]

  assert before.valid.mean() > 0.85 and after.valid.mean() > 0.85
  assert statistics.difference(after.scores, before.scores).low > 0.05
  assert statistics.win_rate(after.scores, before.scores).low > 0.5
  assert 0.05 < after.kl.k1.value < 5

  text = (tmp_path / 'report.md').read_text(encoding='utf-8')
  assert f'{after.scores.mean():+.3f} [' in text and f'{after.kl.k1.value:.2f} [' in text
  assert all((tmp_path / name).stat().st_size > 10_000 for name in ('training.png', 'outcome.png'))
  model, params = models.load_hf(tmp_path / 'model')
  tokenizer = load_tokenizer(tmp_path / 'model')
  (again,) = generate(
    model, params, tokenizer, study.prompts[:1], max_new_tokens=small.max_new_tokens,
    rollout=quickstart.EVALUATION,
  )  # fmt: skip
  assert again.text == after.completions[0][0]  # the saved model is the one that was measured
