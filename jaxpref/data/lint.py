"""Lint: what is likely wrong with a data set, found by counting.

`lint(dataset, tokenizer)` gives findings, most severe first; `render` prints them.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpref.data.dataset import Dataset
from jaxpref.data.tokenizer import Tokenizer

SEVERITIES = ('error', 'warning', 'note')
_SHOWN = 3  # origins printed per finding


@dataclasses.dataclass(frozen=True)
class Finding:
  """One kind of trouble; `examples` are indices into the data set (none where only counted)."""

  name: str
  severity: str  # one of SEVERITIES
  count: int
  message: str
  examples: tuple[int, ...] = ()


def lint(dataset: Dataset, tokenizer: Tokenizer) -> list[Finding]:
  """All findings of a data set with examples; [] where there is nothing to say."""
  found = [*_reading(dataset), *_tokens(dataset, tokenizer), *_repetition(dataset)]
  if dataset.kind == 'preference':
    found += _length_bias(dataset)
  return sorted((f for f in found if f.count), key=lambda f: SEVERITIES.index(f.severity))


def render(findings: Iterable[Finding], dataset: Dataset, console: Console) -> None:
  """Prints findings as a table, each with where its first examples came from."""
  findings = list(findings)
  if not findings:
    console.print(f'{len(dataset)} examples: nothing found')
    return
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
  console.print(table)


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
  identical, doubled, empty, endless = [], [], [], []
  ends = np.zeros(tokenizer.vocab_size, bool)
  ends[list(tokenizer.stop_ids)] = True
  for i, example in enumerate(dataset):
    first = example.candidates[0]
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
  return [
    _finding('bos doubled', 'error', doubled, 'two beginning-of-sequence tokens in a row'),
    _finding('identical pairs', 'warning', identical, 'all candidates equal: nothing to prefer'),
    _finding('empty completions', 'warning', empty, 'a completion that says nothing'),
    _finding('no end', 'note', endless, 'a candidate without eos or end-of-turn at its end'),
  ]


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
