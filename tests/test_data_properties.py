"""Properties of the border, of truncation and of packing, for whatever hypothesis thinks of."""

from collections import Counter

import numpy as np
import pytest
import vocabularies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpref.data import packing
from jaxpref.data.batches import Batches, Packing
from jaxpref.data.examples import Example, make_example, prompt_tokens, truncate
from jaxpref.data.records import Record
from jaxpref.data.tokenizer import load_tokenizer

BYTE = load_tokenizer('byte')
QUICK = settings(
  max_examples=60,
  deadline=None,
  derandomize=True,  # the same in every run: a failure should not come and go
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = st.text('ab é\n<', max_size=8)
PHRASE = st.text('ab é\n<', min_size=1, max_size=8)


@pytest.fixture(scope='module')
def merging(tmp_path_factory):
  merges = [('a', 'b'), ('ab', 'a'), ('b', 'a')]
  return vocabularies.merging(tmp_path_factory.mktemp('merging'), merges=merges)


def tokenizers(merging):
  return (BYTE, merging)


@QUICK
@given(prompt=TEXT, completions=st.lists(PHRASE, min_size=1, max_size=3))
def test_border_of_texts(merging, prompt, completions):
  for tokenizer in tokenizers(merging):
    report = Counter()
    example = make_example(Record(prompt, tuple(completions), {}), tokenizer, report)
    alone = prompt_tokens(prompt, tokenizer)
    kept = example.prompt.tolist()
    # The prompt is a prefix of what a sampler would be given; all of it unless a merge crosses.
    assert kept == alone[: len(kept)]
    assert (len(kept) < len(alone)) == bool(report['boundary_merges'])
    for completion, tokens, scored in zip(
      completions, example.candidates, example.scored, strict=True
    ):
      whole = [*kept, *tokens.tolist()]
      assert tokenizer.decode(whole[:-1]).removeprefix('<s>').removeprefix('<|bos|>') == (
        prompt + completion
      )
      assert whole[-1] == tokenizer.eos_id
      # Everything after the border is scored, but for a first token that nothing predicts.
      assert scored[int(not kept) :].all()


@QUICK
@given(turns=st.lists(st.tuples(PHRASE, PHRASE), min_size=1, max_size=3))
def test_border_of_conversations(merging, turns):
  talk = []
  for asked, answered in turns:
    talk += [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': answered}]
  example = make_example(Record(talk[:1], (talk[1:],), {}), BYTE, Counter())
  (tokens,), (scored,) = example.candidates, example.scored
  said = BYTE.decode(tokens[scored])
  assert said == ''.join(f'{answered}<|eos|>' for _, answered in turns)


@QUICK
@given(prompt=TEXT, steps=st.lists(st.tuples(PHRASE, st.booleans()), min_size=1, max_size=4))
def test_steps_end_where_their_text_ends(prompt, steps):
  text, ends = '', []
  for step, label in steps:
    text += step if step[-1].isspace() else step + '\n'
    ends.append((len(text), float(label)))
  example = make_example(Record(prompt, (text,), {}, tuple(ends)), BYTE, Counter())
  (found,), (labels,) = example.extras['step_ends'], example.extras['step_labels']
  places = np.flatnonzero(found)
  pieces = np.split(example.candidates[0], places + 1)
  assert [BYTE.decode(piece) for piece in pieces[:-1]] == [
    text[a:b] for a, b in zip([0, *(e for e, _ in ends)], [e for e, _ in ends], strict=False)
  ]
  assert labels[places].tolist() == [label for _, label in ends]
  assert not labels[found == 0].any()


TOKENS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@st.composite
def examples(draw, bos=0):
  prompt = [bos, *draw(st.lists(st.integers(1, 9), max_size=12))]
  candidates = tuple(np.array(c, np.int32) for c in draw(st.lists(TOKENS, min_size=1, max_size=3)))
  scored = tuple(np.array(draw(_mask(len(c))), bool) for c in candidates)
  numbers = tuple(np.arange(len(c), dtype=np.float32) for c in candidates)
  return Example(np.array(prompt, np.int32), candidates, scored, {'numbers': numbers})


def _mask(length):
  return st.lists(st.booleans(), min_size=length, max_size=length).map(lambda m: [True, *m[1:]])


@QUICK
@given(
  example=examples(), limit=st.integers(2, 24), how=st.sampled_from(['prompt_left', 'end', 'drop'])
)
def test_truncation(example, limit, how):
  report = Counter()
  short = truncate(example, limit, how, 0, report)
  before = len(example.prompt) + max(map(len, example.candidates))
  if before <= limit:
    assert short is example and not report
    return
  if short is None:
    assert sum(report[name] for name in report if name.startswith('dropped')) == 1
    return
  assert how != 'drop'
  assert len(short.prompt) + max(map(len, short.candidates)) == limit  # no more than is needed
  # Prompts lose their left but keep bos; completions lose their right.
  assert short.prompt[0] == 0
  tail = short.prompt[1:]
  np.testing.assert_array_equal(tail, example.prompt[len(example.prompt) - len(tail) :])
  if how == 'end':
    assert len(short.prompt) == len(example.prompt)
  for old, new, mask, seen, numbers in zip(
    example.candidates,
    short.candidates,
    example.scored,
    short.scored,
    short.extras['numbers'],
    strict=True,
  ):
    np.testing.assert_array_equal(new, old[: len(new)])
    np.testing.assert_array_equal(seen, mask[: len(new)])
    np.testing.assert_array_equal(numbers, np.arange(len(new)))
    assert seen.any()
  # Nothing is cut from a completion while the prompt could give way.
  if how == 'prompt_left' and len(short.prompt) > 1:
    assert [len(c) for c in short.candidates] == [len(c) for c in example.candidates]
  assert (
    len(example.candidates) == 1
    or not all(np.array_equal(short.candidates[0], c) for c in short.candidates[1:])
    or all(np.array_equal(example.candidates[0], c) for c in example.candidates[1:])
  )


@QUICK
@given(
  lengths=st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12
  ),
  share=st.booleans(),
)
def test_pieces_hold_every_candidate_once(lengths, share):
  array = np.array(lengths)
  found = packing.pieces(array, share_prompts=share)
  held = sorted((p.example, k) for p in found for k in p.branches)
  assert held == [(b, k) for b, row in enumerate(lengths) for k in (1, 2) if row[k]]
  for piece in found:
    counts = [lengths[piece.example][k] for k in piece.branches]
    assert piece.completion == sum(counts)
    assert piece.length == lengths[piece.example][0] + sum(counts)
    assert share or len(piece.branches) == 1


@QUICK
@given(sizes=st.lists(st.integers(1, 64), min_size=1, max_size=40), alone=st.booleans())
def test_places_lie_in_rows_and_apart(sizes, alone):
  rows = packing.open_rows(sizes, (16, 32, 64), alone=alone)
  places = packing.place(sizes, rows, alone=alone)
  assert places is not None and len(places) == len(sizes)
  used = Counter()
  for size, (kind, row, start) in zip(sizes, places, strict=True):
    count, length = rows[kind]
    assert 0 <= row < count and 0 <= start and start + size <= length
    used.update((kind, row, place) for place in range(start, start + size))
  assert max(used.values()) == 1
  if alone:
    assert len({(kind, row) for kind, row, _ in places}) == len(sizes)


class Drawn:
  """Examples as `Batches` wants them."""

  def __init__(self, items):
    self.items = items
    self.lengths = np.zeros((len(items), 1 + max(len(e.candidates) for e in items)), np.int32)
    for row, example in zip(self.lengths, items, strict=True):
      row[: 1 + len(example.candidates)] = [len(example.prompt), *map(len, example.candidates)]

  def __len__(self):
    return len(self.items)

  def __getitem__(self, i):
    return self.items[i]


@QUICK
@given(
  items=st.lists(examples(bos=11), min_size=1, max_size=6),
  options=st.sampled_from([Packing(), Packing(share_prompts=False), Packing(alone=True)]),
)
def test_a_batch_gives_every_token_back(items, options):
  data = Drawn(items)
  batch = Batches(data, len(items), seed=None, packing=options)[0]
  flat = np.concatenate([rows.tokens[0, 0].ravel() for rows in batch.rows])
  sizes = [rows.tokens.shape[2:] for rows in batch.rows]
  where = [
    np.concatenate([getattr(rows.layout, name)[0, 0].ravel() for rows in batch.rows])
    for name in ('positions', 'examples', 'branches')
  ]
  rows = np.concatenate([np.repeat(100 * i + np.arange(r), n) for i, (r, n) in enumerate(sizes)])
  mask, numbers = batch.fields['mask'][0, 0], batch.fields['numbers'][0, 0]
  before, at, cell = (getattr(batch.scored, name)[0, 0] for name in ('before', 'at', 'cell'))
  real = cell < mask.size
  assert np.sort(cell[real]).tolist() == np.flatnonzero(mask).tolist()
  assert int((flat > 0).sum()) >= sum(len(e.prompt) + sum(map(len, e.candidates)) for e in items)
  for b, i in enumerate(batch.fields['ids'][0, 0]):
    example = items[i]
    for k, (tokens, scored) in enumerate(zip(example.candidates, example.scored, strict=True)):
      assert mask[b, k, : len(tokens)].tolist() == scored.tolist()
      assert not mask[b, k, len(tokens) :].any()
      assert numbers[b, k, : len(tokens)].tolist() == list(range(len(tokens)))
  owners = {}  # (row, example id) -> whose tokens have it
  for n in np.flatnonzero(real):
    b, k, t = np.unravel_index(cell[n], mask.shape)
    example = items[batch.fields['ids'][0, 0][b]]
    assert flat[at[n]] == example.candidates[k][t]
    previous = example.candidates[k][t - 1] if t else example.prompt[-1]
    assert flat[before[n]] == previous
    positions, segments, branches = (layer[[before[n], at[n]]] for layer in where)
    assert positions[1] == positions[0] + 1 == len(example.prompt) + t
    assert segments[0] == segments[1] > 0
    assert rows[at[n]] == rows[before[n]]
    assert owners.setdefault((rows[at[n]], segments[1]), b) == b
    assert branches.tolist() == [k + 1 if t else 0, k + 1]
