"""Ensembles of rewards by hand, and who decides whether a sample has a score."""

import sys
import threading
import types

import numpy as np
import pytest

from jaxpref.rewards import Sample, evaluate, mean, minimum, parse, penalised
from jaxpref.rewards.base import Term, Traits


class Constant:
  """A reward that gives the same scores every time."""

  def __init__(self, *scores):
    self.scores = scores

  def __call__(self, prompts, completions, records):
    return list(self.scores[: len(prompts)])


def scores(ensemble, count):
  return ensemble([''] * count, [''] * count, [{}] * count)


def test_aggregates_by_hand():
  members = Constant(1.0, -2.0), Constant(3.0, -2.0), Constant(8.0, 4.0)
  # means 4 and 0; variances (9 + 1 + 16) / 3 and (4 + 4 + 16) / 3 = 8
  np.testing.assert_allclose(scores(mean(*members), 2), [4.0, 0.0], atol=1e-12)
  np.testing.assert_allclose(scores(minimum(*members), 2), [1.0, -2.0])
  expected = [4 - 0.5 * np.sqrt(26 / 3), -0.5 * np.sqrt(8)]
  np.testing.assert_allclose(scores(penalised(*members, k=0.5), 2), expected, rtol=1e-12)
  np.testing.assert_allclose(scores(penalised(*members, k=0), 2), [4.0, 0.0], atol=1e-12)


def test_members_that_agree_are_one_member():
  same = Constant(0.25, -7.0)
  for ensemble in (mean(same, same), minimum(same, same), penalised(same, same, k=9.0)):
    assert scores(ensemble, 2) == [0.25, -7.0]


def test_a_sample_has_a_score_only_if_every_member_has():
  error = ValueError('no')
  found = scores(minimum(Constant(1.0, None, None), Constant(1.0, 2.0, error)), 3)
  assert found == [1.0, None, error]


def test_text_names_members_and_comes_back():
  text = "minimum(exact_match(key='answer'), penalised(numeric_answer(), boxed(), k=0.5))"
  (term,) = parse(f'2*{text} + length_penalty()')[:1]
  assert (term.weight, term.name) == (2.0, 'minimum')
  assert parse(str(term)) == (term,)


def test_what_a_member_needs_a_wrapper_needs(monkeypatch):
  slow, grouped, both = Constant(1.0), Constant(1.0), Constant((1.0, 2.0))
  slow.untimed, slow.nbytes, grouped.by_prompt, both.heads = True, 5, True, 2
  module = types.ModuleType('my_wrapped_rewards')
  module.slow, module.grouped, module.both, module.plain = slow, grouped, both, Constant(1.0)
  monkeypatch.setitem(sys.modules, module.__name__, module)
  for text, expected in (
    ('user({slow})', Traits(untimed=True, nbytes=5)),
    ('user({grouped})', Traits(by_prompt=True)),
    ('user({plain})', Traits()),
    ('cosine_length(user({slow}), limit=9)', Traits(untimed=True, nbytes=5)),
    ('minimum(user({slow}), user({slow}))', Traits(untimed=True, nbytes=10)),
    ('minimum(user({slow}), user({grouped}))', Traits(by_prompt=True, untimed=True, nbytes=5)),
    ('mean(cosine_length(user({slow}), 9), user({plain}))', Traits(untimed=True, nbytes=5)),
    ('-2*cosine_length(mean(user({both})), limit=9)', Traits()),
  ):
    names = {name: repr(f'my_wrapped_rewards:{name}') for name in vars(module)}
    (term,) = parse(text.format(**names))
    assert term.traits == expected, text
  for text in ('user({both})', 'cosine_length(user({both}), limit=9)'):
    with pytest.raises(ValueError, match=r'gives 2 scores: make them one by mean'):
      parse(text.format(**names))


def test_untimed_rewards_have_no_limit():
  seen = []

  class Watch(Constant):
    untimed = True

    def __call__(self, *columns):
      seen.append(threading.current_thread())
      return super().__call__(*columns)

  found = evaluate([Term(Watch(1.0), name='watch')], [Sample('', '')], timeout=1e-9)
  assert found.valid.all() and seen == [threading.current_thread()]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('mean()', 'takes two or more rewards'),
    ('mean(exact_match())', 'takes two or more rewards'),
    ('minimum(exact_match(), word)', 'takes two or more rewards'),
    ('penalised(exact_match(), boxed(), k=-1)', 'at least 0, got -1'),
    ('penalised(exact_match(), boxed(), 1.0)', 'takes two or more rewards'),
    ('reward_model(runs/rm)', 'text in quotes'),
  ],
)
def test_mistakes_are_named(text, message):
  more = {'reward_model': lambda path: Constant()}
  with pytest.raises(ValueError, match=message):
    parse(text, more)
