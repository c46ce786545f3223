"""Lint: what is likely wrong with a data set, found by counting.

`lint(dataset, tokenizer)` gives findings, most severe first; `render` prints them with a histogram
of lengths, `to_json` says the same as plain values.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpref.data import lengths
from jaxpref.data.dataset import Dataset
from jaxpref.data.examples import Example
from jaxpref.data.tokenizer import Tokenizer

SEVERITIES = ('error', 'warning', 'note')
_SHOWN, _LISTED = 3, 1000  # origins of a finding in the table, in JSON
_OPENING = 48  # tokens of a text that are searched for turn marks
_MARKERS = (
  '<|im_start|>',
  '<|start_header_id|>',
  '<|start_of_role|>',
  '<start_of_turn>',
  '<|user|>',
  '<|assistant|>',
  '[INST]',
  '### Instruction:',
)
_PLAIN = 'no turn begins as the chat template has it: models trained on chats expect messages'


@dataclasses.dataclass(frozen=True)
class Finding:
  """One kind of trouble; `examples` are indices into the data set (none where only counted)."""

  name: str
  severity: str  # one of SEVERITIES
  count: int
  message: str
  examples: tuple[int, ...] = ()


def lint(dataset: Dataset, tokenizer: Tokenizer, held_out: Dataset | None = None) -> list[Finding]:
  """All findings of a data set with examples; [] where there is nothing to say.

  With `held_out`, the other split, also what stands in both.
  """
  found = [*_reading(dataset), *_tokens(dataset, tokenizer), *_repetition(dataset)]
  if dataset.kind == 'preference':
    found += _length_bias(dataset)
  if held_out is not None:
    found += _leaks(dataset, held_out)
  found += _labels(dataset)
  return sorted((f for f in found if f.count), key=lambda f: SEVERITIES.index(f.severity))


def render(findings: Iterable[Finding], dataset: Dataset, console: Console) -> None:
  """Prints findings as a table, each with where its first examples came from."""
  findings = list(findings)
  if findings:
    console.print(_table(findings, dataset))
  else:
    console.print(f'{len(dataset)} examples: nothing found')
  if len(dataset):
    console.print(lengths.histogram(lengths.measure(dataset)))


def to_json(findings: Iterable[Finding], dataset: Dataset) -> dict[str, Any]:
  """Findings (with at most `_LISTED` origins each), counts and lengths, for json.dump."""
  listed = []
  for finding in findings:
    origins = [dataset.origin(i) for i in finding.examples[:_LISTED]]
    listed.append({**dataclasses.asdict(finding), 'examples': origins})
  return {
    'examples': len(dataset),
    'kind': dataset.kind,
    'report': dict(dataset.report),
    'lengths': dataclasses.asdict(lengths.measure(dataset)) if len(dataset) else None,
    'findings': listed,
  }


def _table(findings: Sequence[Finding], dataset: Dataset) -> Table:
  table = Table(title=f'{len(dataset)} examples')
  for name in ('', 'finding', 'count', 'what it means', 'for example'):
    table.add_column(name, justify='right' if name == 'count' else 'left', overflow='fold')
  colours = dict(zip(SEVERITIES, ('red', 'yellow', 'cyan'), strict=True))
  for finding in findings:
    # Without folders: in a narrow column the line's number is what has to stay in one piece.
    origins = [dataset.origin(i).rpartition('/')[2] for i in finding.examples[:_SHOWN]]
    severity = Text(finding.severity, colours[finding.severity])
    where = Text('\n'.join(origins))
    table.add_row(severity, finding.name, str(finding.count), finding.message, where)
  return table


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
  """Wilson's score interval of a share (E. B. Wilson, 1927); z = 1.96 for 95 %."""
  share = successes / trials
  centre = share + z * z / (2 * trials)
  spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
  scale = 1 + z * z / trials
  return (centre - spread) / scale, (centre + spread) / scale


def _reading(dataset: Dataset) -> list[Finding]:
  """What the report counted while the whole source was read."""
  said = {
    'skipped': ('error', 'records skipped because of an error'),
    'dropped_same': ('warning', 'dropped: truncation deleted the whole difference of the pair'),
    'dropped_unscored': ('warning', 'dropped: truncation left no scored token'),
    'dropped_long': ('note', 'dropped: longer than max_length'),
    'truncated_completions': ('warning', 'completions cut at max_length: they end without eos'),
    'truncated_prompts': ('note', 'prompts cut at the left to fit max_length'),
    'boundary_merges': (
      'warning',
      'the tokenizer merges text across the end of the prompt, so the last prompt token is scored '
      'with the completion; does the prompt end in a space that the completion should begin with?',
    ),
  }
  return [
    Finding(name.replace('_', ' '), severity, dataset.report.get(name, 0), message)
    for name, (severity, message) in said.items()
  ]


def _tokens(dataset: Dataset, tokenizer: Tokenizer) -> list[Finding]:
  identical, doubled, empty, endless, foreign = [], [], [], [], []
  markers, templated = _foreign_markers(tokenizer), 0
  ends = np.zeros(tokenizer.vocab_size, bool)
  ends[list(tokenizer.stop_ids)] = True
  for i, example in enumerate(dataset):
    first = example.candidates[0] if example.candidates else example.prompt[:0]
    opening = tokenizer.decode(example.prompt[:_OPENING]) + tokenizer.decode(first[:_OPENING])
    if any(marker in opening for marker in markers):
      foreign.append(i)
    templated += _opens_turn(example.prompt, tokenizer)
    if len(example.candidates) > 1 and all(np.array_equal(first, c) for c in example.candidates):
      identical.append(i)
    whole = np.concatenate([example.prompt, first])
    bos = tokenizer.bos_id
    # Some tokenizers have a bos that also opens every turn: only two in a row are a mistake.
    if bos is not None and ((whole[1:] == bos) & (whole[:-1] == bos)).any():
      doubled.append(i)
    if any(_silent(c[~ends[c]], tokenizer) for c in example.candidates):
      empty.append(i)
    if tokenizer.stop_ids and not all(ends[c[-1]] for c in example.candidates):
      endless.append(i)
  chats = dataset.lengths[:, 0].max(initial=0) > 1 and _marks_turns(tokenizer)
  plain = range(len(dataset) if chats and not templated else 0)
  return [
    _finding('bos doubled', 'error', doubled, 'two beginning-of-sequence tokens in a row'),
    _finding('identical pairs', 'warning', identical, 'all candidates equal: nothing to prefer'),
    _finding('foreign template', 'warning', foreign, 'turn marks of another template, as text'),
    _finding('no chat template', 'note', plain, _PLAIN),
    _finding('empty completions', 'warning', empty, 'a completion that says nothing'),
    _finding('no end', 'note', endless, 'a candidate without eos or end-of-turn at its end'),
  ]


def _foreign_markers(tokenizer: Tokenizer) -> list[str]:
  """Turn marks that mean nothing to this tokenizer and its template."""
  own = tokenizer.chat_template or ''
  return [mark for mark in _MARKERS if mark not in own and len(tokenizer.encode(mark)) > 1]


def _opens_turn(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> bool:
  """Whether a special token stands there, other than the bos that any text begins with."""
  rest = tokens[1:] if tokenizer.adds_bos else tokens
  return not tokenizer.special_ids.isdisjoint(map(int, rest))


def _marks_turns(tokenizer: Tokenizer) -> bool:
  """Whether the tokenizer's chat template opens turns with special tokens."""
  if tokenizer.chat_template is None:
    return False
  try:
    text = tokenizer.apply_chat([{'role': 'user', 'content': 'Hi'}])
  except ValueError:  # a template for some other shape of conversation
    return False
  return _opens_turn(tokenizer.encode(text.partition('Hi')[0]), tokenizer)


def _silent(tokens: np.ndarray, tokenizer: Tokenizer) -> bool:
  # The first few tokens nearly always tell, and decoding all of every completion would be slow.
  return not tokenizer.decode(tokens[:8]).strip() and not tokenizer.decode(tokens).strip()


def _repetition(dataset: Dataset) -> list[Finding]:
  seen: dict[tuple, int] = {}
  prompts: collections.Counter[bytes] = collections.Counter()
  duplicates, conflicts, again = [], [], []
  for i, example in enumerate(dataset):
    prompt, *candidates = (a.tobytes() for a in (example.prompt, *example.candidates))
    prompts[prompt] += 1
    if prompts[prompt] > 1 and len(example.prompt) > 1:
      again.append(i)
    label = example.extras.get('label')
    key = (prompt, *candidates, label)
    opposite = (prompt, *candidates[::-1], None if label is None else -label)
    if key in seen:
      duplicates.append(i)
    elif opposite in seen:  # never its own opposite: an identical pair is already in `seen`
      conflicts.append(i)
    seen.setdefault(key, i)
  return [
    _finding('conflicting labels', 'warning', conflicts, 'the same pair, preferred both ways'),
    _finding('duplicates', 'warning', duplicates, 'the same prompt and candidates once more'),
    _finding('repeated prompts', 'note', again, 'a prompt that an earlier example has too'),
  ]


def _leaks(dataset: Dataset, held_out: Dataset) -> list[Finding]:
  """What the other split holds too: whole examples, and prompts."""
  known = {_content(example) for example in held_out}
  same = [i for i, example in enumerate(dataset) if _content(example) in known]
  prompts = np.flatnonzero(np.isin(dataset.prompts, held_out.prompts)).tolist()
  return [
    _finding('in both splits', 'error', same, 'the held-out split has this very example'),
    _finding('prompts in both splits', 'warning', prompts, 'the held-out split has this prompt'),
  ]


def _content(example: Example) -> tuple[bytes, ...]:
  return tuple(a.tobytes() for a in (example.prompt, *example.candidates))


def _labels(dataset: Dataset) -> list[Finding]:
  found = []
  if 'label' in dataset.extras:
    labels = np.array([example.extras['label'] for example in dataset])
    good = int((labels > 0).sum())
    message = f'{good} desirable, {len(labels) - good} undesirable'
    lopsided = min(good, len(labels) - good) < 0.1 * len(labels)
    found.append(Finding('labels', 'warning' if lopsided else 'note', len(labels), message))
  if 'preference' in dataset.extras:
    shares = np.array([example.extras['preference'] for example in dataset])
    ties = np.flatnonzero(shares == 0.5).tolist()
    found.append(_finding('ties', 'note', ties, 'neither is better; a loss without ties takes one'))
    soft = int(((shares > 0.5) & (shares < 1)).sum())
    message = f'preferences that are not certain; the mean of all is {shares.mean():.2f}'
    found.append(Finding('soft labels', 'note', soft, message))
  if 'scores' in dataset.extras:
    even = [i for i, e in enumerate(dataset) if len(set(e.extras['scores'].tolist())) == 1]
    found.append(_finding('equal scores', 'note', even, 'a list in which nothing is better'))
  return found


def _length_bias(dataset: Dataset) -> list[Finding]:
  chosen, rejected = dataset.lengths[:, 1], dataset.lengths[:, 2]
  longer, unequal = int((chosen > rejected).sum()), int((chosen != rejected).sum())
  if not unequal:
    return []
  low, high = wilson(longer, unequal)
  bias = 'no clear length bias' if low <= 0.5 <= high else 'the preference follows length'
  message = (
    f'chosen is the longer one in {longer / unequal:.1%} [{low:.1%}, {high:.1%}] of pairs of '
    f'unequal length: {bias}'
  )
  severe = low > 0.6 or high < 0.4
  return [Finding('length bias', 'warning' if severe else 'note', unequal, message)]


def _finding(name: str, severity: str, examples: Sequence[int], message: str) -> Finding:
  return Finding(name, severity, len(examples), message, tuple(examples))
