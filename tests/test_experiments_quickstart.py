"""The quickstart runs end to end; DPO and the report get exactly what was sampled."""

import numpy as np
import pytest

from experiments import quickstart, reviews
from experiments.quickstart import Settings
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.generation import Completion


def completion(text, tokenizer, k, finished=True):
  tokens = (*tokenizer.encode(text), *([tokenizer.eos_id] if finished else []))
  return Completion(0, k, text, tokens, (-1.0,) * len(tokens), 'stop' if finished else 'length')


def test_pairs_are_sampled_tokens_with_the_better_one_first():
  tokenizer = load_tokenizer('byte')
  texts = ' is awful.', ' is superb.', ' is fine.', ' is fine.', ' is good.', ' is go'
  row = [completion(text, tokenizer, k, finished=k < 5) for k, text in enumerate(texts)]
  data = quickstart._pairs(['The plot'], [row], tokenizer, Settings(temperature=0.01))
  assert len(data) == 2  # equal completions make no pair
  found = [[tokenizer.decode(c) for c in example.candidates] for example in data]
  eos = tokenizer.decode([tokenizer.eos_id])
  assert found == [[f' is superb.{eos}', f' is awful.{eos}'], [f' is good.{eos}', ' is go']]
  assert all(scored.all() for example in data for scored in example.scored)
  assert data[0].prompt.tolist() == [tokenizer.bos_id, *tokenizer.encode('The plot')]


def test_the_command_of_a_report_names_what_was_changed():
  assert quickstart._changed(Settings(seed=3)) == {'seed': 3}
  assert quickstart._changed(Settings()) == {}


@pytest.mark.slow
def test_quickstart_end_to_end(tmp_path):
  tiny = Settings(
    width=32, layers=1, sft_steps=3, sft_batch=4, samples_per_prompt=2, dpo_steps=2, dpo_batch=4,
    evaluations=1, held_out_samples=1, max_new_tokens=24,
  )  # fmt: skip
  study = quickstart.run(tiny, tmp_path)
  assert [evaluation.step for evaluation in study.evaluations] == [0, 2]
  assert abs(study.before.kl.k1.value) < 1e-3  # sampler and training path agree
  assert study.held_out_metrics[0]['loss'] == pytest.approx(np.log(2), abs=1e-4)
  assert [line['step'] for line in study.train_metrics] == [1, 2]
  assert set(study.prompts) == set(reviews.prompts()[1])
  assert {path.name for path in tmp_path.iterdir()} == {'report.md', 'training.png', 'outcome.png'}
