"""The tables in docs/performance.md: a section for each piece of work, replaced when run again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / 'docs' / 'performance.md'
BEGIN, END = '<!-- bench: {} -->', '<!-- end of bench: {} -->'
NAMES = {'ours': 'jaxpref', 'trl': 'TRL', 'tunix': 'Tunix'}
COLUMNS = (
  ('seconds a step', 'step_seconds', '{:#.3g}'),
  ('CPU seconds', 'cpu_seconds', '{:#.3g}'),
  ('{unit}/s', 'examples_per_second', '{:.2f}'),
  ('scored tokens/s', 'scored_per_second', '{:,.0f}'),
  ('useful GFLOP/s', 'gflops_per_second', '{:.1f}'),
  ('of peak', 'mfu', '{:.1%}'),
  ('peak GiB', 'peak_gib', '{:.2f}'),
  ('compiling, s', 'compile_seconds', '{:.1f}'),
)


def section(result: Mapping[str, Any]) -> str:
  """The markdown of one result, as `__main__` makes it."""
  named = {'ours': NAMES['ours']} | {name: NAMES.get(name, name) for name in result['peers']}
  sides = {'ours': result['ours']} | {name: one['peer'] for name, one in result['peers'].items()}
  again = result['remat']
  if again:
    named['remat'], sides['remat'] = f'jaxpref, remat {again["is"]}', again['side']
  columns = [(head.format(unit=result['unit']), key, form) for head, key, form in COLUMNS]
  rows = {named[name]: side for name, side in sides.items()}
  lines = [f'### {result["title"]}', '', *grid('', columns, rows), '']
  for name, one in result['peers'].items():
    lines.append(beside(named[name], one, result))
  if again:
    lines.append(traded(again, result['peers']))
  for name, side in sides.items():
    if side.get('table_seconds') is not None:
      took = f'{side["table_seconds"]:.1f} s'
      lines.append(f"{named[name]}'s table of reference log-probs took {took} to build.")
  lines += ['', result['setting'], '']
  return '\n'.join(lines)


def beside(peer: str, one: Mapping[str, Any], result: Mapping[str, Any]) -> str:
  """How ours does beside a peer, in a sentence or three."""
  (least, most), rounds = one['spread'], result['rounds']
  spread = f'{least:.2f} to {most:.2f} over {rounds} rounds' if rounds > 1 else 'in one round'
  words = (
    f'jaxpref is **{one["ratio"]:.2f} times** as fast as {peer} ({spread}; '
    f'{one["cpu_ratio"]:.2f} in CPU seconds, which other work on the machine moves less), '
    f'with {one["memory_ratio"]:.2f} of its peak memory.'
  )
  if one['loss_disagreement'] is not None:
    words += (
      f' From equal weights the {result["values"]} of the first {result["warm"]} steps differ by '
      f'at most {one["loss_disagreement"]:.0e} relative'
    )
    if one['norm_disagreement'] is not None:
      words += f', the first gradient norms by {one["norm_disagreement"]:.0e}'
    words += '.'
  return words


def traded(again: Mapping[str, Any], peers: Mapping[str, Mapping[str, Any]]) -> str:
  """What ours with remat gives up and gains: `ratio` and `memory_ratio` are of ours without it."""
  shares = [f'{1 / again["memory_ratio"]:.2f} of the memory without']
  for name, one in peers.items():
    share = again['side']['peak_gib'] / one['peer']['peak_gib']
    shares.append(f'{share:.2f} of that of {NAMES.get(name, name)}')
  return (
    f'With remat {again["is"]} jaxpref has {1 / again["ratio"]:.2f} of its speed without '
    f'({1 / again["cpu_ratio"]:.2f} in CPU seconds), and {", ".join(shares)}.'
  )


def write(key: str, text: str, page: Path = PAGE) -> None:
  """Puts a section into the page, in the place of an older one of the same work."""
  begin, end = BEGIN.format(key), END.format(key)
  known = page.read_text(encoding='utf-8') if page.exists() else '# Performance\n'
  block = f'{begin}\n{text}{end}\n'
  if begin in known:
    before, rest = known.split(begin, 1)
    if end not in rest:
      raise ValueError(f'{page}: {begin} has no {end}; mend the page by hand')
    known = before + block + rest.split(end, 1)[1].removeprefix('\n')
  else:
    known = known.rstrip('\n') + '\n\n' + block
  page.parent.mkdir(exist_ok=True)
  page.write_text(known, encoding='utf-8')


def grid(
  corner: str, columns: Sequence[tuple[str, str, str]], rows: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  """Lines of a table; a column is (its head, the key of its values, their format)."""
  lines = [[corner, *(head for head, *_ in columns)], ['---'] * (len(columns) + 1)]
  for name, values in rows.items():
    found = [(values.get(key), form) for _, key, form in columns]
    lines.append([name, *('–' if value is None else form.format(value) for value, form in found)])
  return ['| ' + ' | '.join(cells) + ' |' for cells in lines]
