"""The review world: what it writes, its score reads; and nothing but good reviews scores well."""

import itertools

import numpy as np
import pytest

from experiments import reviews


@pytest.fixture(scope='module')
def texts():
  train, _ = reviews.prompts()
  return [review.prompt + review.completion for review in reviews.corpus(train, 1000)]


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('The plot is good.', 0.4),
    ('The plot is truly superb.', 0.8 * 1.25),
    ('The plot is fairly bad.', 0.6 * -0.6),
    ('The plot is not great.', -0.5 * 0.6),
    ('The plot is hardly really dull.', -0.6 * 1.1 * -0.6),
    ('The plot is neither good nor bad.', 0.0),
    ('The plot is good, but the camera work felt flat.', (0.4 - 0.4) / 2),
    ('I thought the plot felt fine. We all loved it.', (0.2 + 0.8) / 2),
  ],
)
def test_score_is_the_mean_of_graded_opinions(text, expected):
  assert reviews.score(text) == pytest.approx(expected)
  assert reviews.in_world(text)


@pytest.mark.parametrize(
  'text',
  [
    '',
    '.',
    'superb',
    'superb superb superb.',
    'The plot is superb',  # not finished
    'The plot superb is.',
    'The plot is superb superb.',
    'The plot is truly truly superb.',
    'The plot is superbly.',
    'The plot is superb, and the zebra is superb.',
    'the plot is superb.',
    ' The plot is superb.',
    'The plot is superb.\n',
    'xqzt wonderful vvv.',
  ],
)
def test_text_outside_the_world_gets_no_credit(text):
  assert not reviews.in_world(text)
  assert reviews.score(text) == -1.0


@pytest.mark.parametrize('tail', ['.', ' superb.', ' We all loved', ' We all loved it', '\n', ' '])
def test_garbage_after_a_good_review_ruins_it(tail):
  assert reviews.score('The plot is superb.' + tail) == reviews.GARBLED


def test_repetition_and_length_do_not_inflate(texts):
  for text in texts[:200]:
    assert reviews.score(f'{text} {text}') == pytest.approx(reviews.score(text))
  best = max(reviews.score(text) for text in texts)
  assert max(reviews.score(f'{a} {b}') for a, b in itertools.pairwise(texts)) <= best


def test_a_repeated_word_about_another_aspect_is_another_opinion():
  text = 'The plot is great, and the cast is great. I left early.'
  assert reviews.score(text) == pytest.approx((0.6 + 0.6 - 0.6) / 3)


def test_score_reads_everything_the_world_writes(texts):
  scores = np.array([reviews.score(text) for text in texts])
  assert all(map(reviews.in_world, texts))
  assert np.abs(scores).max() <= 1.0
  assert abs(scores.mean()) < 4 * scores.std() / np.sqrt(len(scores))  # neutral on average
  assert scores.std() > 0.3 and len(set(texts)) > 0.95 * len(texts)  # varied
  assert max(len(text.encode()) for text in texts) <= 120


def test_prompts_are_split_by_content():
  train, held_out = reviews.prompts(seed=1)
  heads = [
    {prompt.removesuffix(f' {prompt.split()[-1]}') if prompt.endswith(reviews.VERBS) else prompt
     for prompt in part}
    for part in (train, held_out)
  ]  # fmt: skip
  assert not heads[0] & heads[1]
  assert len(set(train)) == len(train) and len(set(held_out)) == len(held_out)
  assert len(train) == 3 * len(held_out)
  assert all(2 <= len(prompt.split()) <= 8 for prompt in train + held_out)
  assert {review.prompt for review in reviews.corpus(train, 500)} <= set(train)


def test_a_prompt_has_no_sentiment_of_its_own():
  for prompt in sum(reviews.prompts(), ()):
    verb = '' if prompt.endswith(reviews.VERBS) else ' is'
    assert reviews.score(f'{prompt}{verb} awful.') == -reviews.score(f'{prompt}{verb} superb.')


def test_draws_depend_on_seed_and_index_only():
  train, _ = reviews.prompts()
  assert reviews.corpus(train, 20)[:5] == reviews.corpus(train, 5)
  assert reviews.corpus(train, 20, seed=1) != reviews.corpus(train, 20)
  assert reviews.prompts(seed=3) == reviews.prompts(seed=3) != reviews.prompts(seed=4)


def test_labels_follow_bradley_terry():
  margin = np.repeat([-0.4, 0.0, 0.4, 500.0], 4000)
  chosen = reviews.prefer(margin, np.zeros_like(margin), temperature=0.2).reshape(4, -1).mean(1)
  np.testing.assert_allclose(chosen, [1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-2)), 1], atol=0.03)
  assert (reviews.prefer(margin, 0 * margin, 0.2) == reviews.prefer(margin, 0 * margin, 0.2)).all()
