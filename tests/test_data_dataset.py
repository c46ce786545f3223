"""Data sets: loading with errors skipped or raised, splits by prompt, selections, memory."""

import json

import numpy as np
import pytest

from jaxpref.data import DataError, Example, from_examples, load, load_tokenizer

BYTE = load_tokenizer('byte')


def write(path, *records):
  path.write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in records))
  return f'jsonl:{path}'


def pair(prompt, chosen=' a', rejected=' b', **more):
  return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected, **more}


def example(prompt, *candidates, **extras):
  arrays = [np.array(c, np.int32) for c in candidates]
  return Example(
    np.array(prompt, np.int32), tuple(arrays), tuple(np.ones(len(a), bool) for a in arrays), extras
  )


def test_lengths_and_examples_agree(tmp_path):
  data = load(
    write(tmp_path / 'a.jsonl', pair('Hi', ' you', ' b', weight=2), pair('Q', weight=1)), BYTE
  )
  assert data.kind == 'preference'
  assert data.lengths.tolist() == [[3, 5, 3], [2, 3, 3]]
  for i, one in enumerate(data):
    assert data.lengths[i].tolist() == [len(one.prompt), *map(len, one.candidates)]
  assert BYTE.decode(data[0].candidates[0]) == ' you<|eos|>'
  assert data[0].extras == {'weight': 2.0}
  with pytest.raises(IndexError, match='example 2 of a data set of 2'):
    data[2]


@pytest.mark.parametrize(
  ('record', 'kind', 'found', 'candidates'),
  [
    (pair('p'), 'auto', 'preference', 2),
    (pair('p'), 'sft', 'sft', 1),
    ({'prompt': 'p', 'completion': 'c'}, 'auto', 'sft', 1),
    ({'prompt': 'p', 'completion': 'c', 'label': True}, 'auto', 'unpaired', 1),
    ({'prompt': 'p', 'completion': 'c', 'label': True}, 'sft', 'sft', 1),
    ({'text': 't'}, 'auto', 'sft', 1),
  ],
)
def test_kinds(record, kind, found, candidates, tmp_path):
  data = load(write(tmp_path / 'a.jsonl', record), BYTE, kind=kind)
  assert data.kind == found
  assert len(data[0].candidates) == candidates
  assert ('label' in data[0].extras) == (found == 'unpaired')


def test_bad_records_raise_or_are_listed(tmp_path):
  source = write(tmp_path / 'a.jsonl', pair('p'), '{', pair('q', None), {'text': 't'}, pair('r'))
  with pytest.raises(DataError, match=r'a.jsonl:2: not JSON'):
    load(source, BYTE)
  data = load(source, BYTE, on_error='skip')
  assert len(data) == 2
  assert data.report['skipped'] == 3
  assert [line.split(':')[1] for line in data.report['skipped_lines']] == ['2', '3', '4']


def test_an_unusable_source_says_so(tmp_path):
  source = write(tmp_path / 'a.jsonl', {'a': 1}, {'a': 2})
  with pytest.raises(DataError, match=r'a.jsonl:1: cannot use a record with the keys'):
    load(source, BYTE)
  with pytest.raises(DataError, match=r'no usable example.*(\n.*)*a.jsonl:1: cannot use'):
    load(source, BYTE, on_error='skip')
  with pytest.raises(DataError, match=r'What would do: preference: chosen, rejected'):
    load(write(tmp_path / 'b.jsonl', {'text': 't'}), BYTE, kind='preference')
  with pytest.raises(DataError, match=r"numbers \[\], others have \['weight'\]"):
    load(write(tmp_path / 'c.jsonl', pair('p', weight=1), pair('q')), BYTE)
  with pytest.raises(DataError, match='has no chat template'):
    talk = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    _template_free(tmp_path, write(tmp_path / 'd.jsonl', {'messages': talk}))


def _template_free(tmp_path, source):
  BYTE.save(tmp_path / 'bare')
  (tmp_path / 'bare' / 'tokenizer_config.json').write_text('{}')
  return load(source, load_tokenizer(tmp_path / 'bare'))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'kind': 'pairs'}, "kind should be one of auto, preference.*got 'pairs'"),
    ({'truncate': 'left'}, "truncate should be one of prompt_left, end, drop; got 'left'"),
    ({'on_error': 'ignore'}, "on_error should be one of raise, skip; got 'ignore'"),
    ({'max_length': 1}, 'max_length should be at least 2'),
  ],
)
def test_wrong_options(options, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    load(write(tmp_path / 'a.jsonl', pair('p')), BYTE, **options)


def test_truncation_is_counted(tmp_path):
  source = write(tmp_path / 'a.jsonl', pair('long prompt'), pair('p', ' xxxxxxa', ' xxxxxxb'))
  data = load(source, BYTE, max_length=8)
  assert len(data) == 1
  assert data.report['truncated_prompts'] == 2
  assert data.report['dropped_same'] == 1
  assert int(data.lengths.sum(1).max()) <= 8 + 3


def test_a_prompt_never_stands_on_both_sides(tmp_path):
  records = [pair(f'prompt number {i % 200}', f' {i}') for i in range(400)]
  # Long completions cut each copy of a prompt elsewhere: the split must not see that.
  records += [pair(f'prompt number {i}', ' long' * (1 + i % 5)) for i in range(200)]
  data = load(write(tmp_path / 'a.jsonl', *records), BYTE, max_length=25)
  train, held_out = data.split(0.2, seed=1)
  assert len(train) + len(held_out) == len(data) == 600
  assert 60 < len(held_out) < 180

  def prompts(part):
    return {records[int(part.origin(i).rsplit(':', 1)[1]) - 1]['prompt'] for i in range(len(part))}

  assert not prompts(train) & prompts(held_out)
  assert prompts(data.split(0.2, seed=2)[1]) != prompts(held_out)
  assert prompts(data.split(0.2, seed=1)[1]) == prompts(held_out)
  # A prompt keeps its side when others come and go, and when more is held out.
  part = data.select(range(0, 600, 2))
  assert prompts(part.split(0.2, seed=1)[1]) <= prompts(held_out)
  assert prompts(held_out) <= prompts(data.split(0.4, seed=1)[1])
  assert [len(side) for side in data.split(0.0)] == [600, 0]
  assert [len(side) for side in data.split(1.0)] == [0, 600]


def test_select_keeps_order_and_has_its_own_fingerprint():
  data = from_examples([example([1, i], [i, 2], [3]) for i in range(5)])
  part = data.select([3, 1, 1])
  assert [int(e.prompt[1]) for e in part] == [3, 1, 1]
  assert part.lengths.tolist() == [[2, 2, 1]] * 3
  assert [int(e.prompt[1]) for e in part.select([0, 2])] == [3, 1]
  assert len({data.fingerprint, part.fingerprint, data.select([3]).fingerprint}) == 3


def test_from_examples_holds_what_it_was_given():
  given = [
    example([1, 2], [3], [4, 5], [6], label=1.0),
    example([], [7, 8], label=-1.0)._replace(scored=(np.array([False, True]),)),
  ]
  data = from_examples(given, origins=['a', 'b'])
  assert data.kind == 'unpaired' and data.origin(1) == 'b'
  assert data.lengths.tolist() == [[2, 1, 2, 1], [0, 2, 0, 0]]
  for one, two in zip(given, data, strict=True):
    assert one.extras == two.extras
    for a, b in zip(one.candidates + one.scored, two.candidates + two.scored, strict=True):
      assert a.dtype == b.dtype and a.tolist() == b.tolist()
  assert from_examples(given).fingerprint == data.fingerprint
  assert from_examples(given[::-1]).fingerprint != data.fingerprint


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (example([1]), 'expected as many masks as candidates, at least one'),
    (example([1], []), 'at least one token'),
    (example([], [1, 2]), 'its first token is scored, but no token precedes it'),
  ],
)
def test_from_examples_checks(bad, message):
  with pytest.raises(ValueError, match=message):
    from_examples([bad])


def test_examples_agree_on_their_extras():
  with pytest.raises(ValueError, match=r"example 1 has the extras \['weight'\], example 0 \[\]"):
    from_examples([example([1], [2]), example([1], [2], weight=1.0)])
