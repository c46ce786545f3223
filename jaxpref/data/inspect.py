"""Looking at a data set: examples as the model sees them, and a table of their lengths.

The prompt is dim, the first candidate green, the others red; scored tokens are underlined, special
tokens magenta. Without colours the unscored parts of a candidate stand in ‹ ›.
"""

from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxpref.data.dataset import Dataset
from jaxpref.data.tokenizer import Tokenizer

# Control characters could drive the terminal that shows them: print their pictures instead.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def show(
  dataset: Dataset,
  tokenizer: Tokenizer,
  indices: Iterable[int],
  console: Console,
  *,
  boundaries: bool = False,
) -> None:
  """Prints the length table and the examples at `indices`; `boundaries` puts · between tokens."""
  console.print(length_table(dataset))
  for index in indices:
    example = dataset[index]
    nothing = np.zeros(len(example.prompt), bool)
    parts = [
      Text(f'prompt · {len(example.prompt)} tokens\n', 'bold'),
      _render(example.prompt, nothing, 'dim', tokenizer, boundaries, quote=False),
    ]
    names = _candidate_names(len(example.candidates))
    for k, (tokens, scored) in enumerate(zip(example.candidates, example.scored, strict=True)):
      head = f'\n\n{names[k]} · {len(tokens)} tokens, {int(scored.sum())} scored\n'
      quote = console.color_system is None
      style = 'red' if k else 'green'
      parts += [Text(head, 'bold'), _render(tokens, scored, style, tokenizer, boundaries, quote)]
    extras = ''.join(f' · {name} {_number(value)}' for name, value in example.extras.items())
    title = Text(f'example {index} · {dataset.origin(index)}{extras}')
    console.print(Panel(Text.assemble(*parts), title=title, title_align='left'))


def length_table(dataset: Dataset) -> Table:
  """Tokens of prompts, candidates and whole examples: mean, quantiles, maximum, sum."""
  count = dataset.lengths.shape[1] - 1
  table = Table(title=f'{len(dataset)} examples ({dataset.kind}), lengths in tokens')
  table.add_column('')
  for name in ('mean', 'min', '50 %', '90 %', '99 %', 'max', 'sum'):
    table.add_column(name, justify='right')
  rows = {'prompt': dataset.lengths[:, 0]}
  rows |= {name: dataset.lengths[:, 1 + k] for k, name in enumerate(_candidate_names(count))}
  rows['prompt once + all candidates'] = dataset.lengths.sum(1)
  for name, lengths in rows.items():
    if not len(lengths):
      continue
    low, middle, high, higher, top = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1.0])
    values = (f'{n:,.0f}' for n in (low, middle, high, higher, top, lengths.sum(dtype=np.int64)))
    table.add_row(name, f'{lengths.mean():,.1f}', *values)
  return table


def _number(value) -> str:
  """An extra as text: a number, one for each candidate, or how many tokens have one."""
  if isinstance(value, tuple):
    return f'on {sum(int(np.count_nonzero(numbers)) for numbers in value)} tokens'
  return ', '.join(f'{number:g}' for number in np.ravel(value))


def _candidate_names(count: int) -> list[str]:
  if count == 2:
    return ['chosen', 'rejected']
  return ['completion'] if count == 1 else [f'candidate {k}' for k in range(count)]


def _render(
  tokens, scored, style: str, tokenizer: Tokenizer, boundaries: bool, quote: bool
) -> Text:
  """Tokens as styled text, one run of equal style at a time so that split characters decode."""
  text = Text()
  special = np.isin(tokens, list(tokenizer.special_ids))
  kinds = np.stack([scored, special])
  starts = [i for i in range(len(tokens)) if i == 0 or (kinds[:, i] != kinds[:, i - 1]).any()]
  for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
    words = 'magenta' if special[start] else style
    words += ' underline' if scored[start] else ' dim'
    if boundaries:
      piece = '·'.join(tokenizer.decode([token]) for token in tokens[start:end])
    else:
      piece = tokenizer.decode(tokens[start:end])
    piece = piece.translate(_PICTURES)
    text.append(f'‹{piece}›' if quote and not scored[start] else piece, words)
  return text
