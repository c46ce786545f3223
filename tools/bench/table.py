"""The tables in docs/performance.md: a section for each piece of work, replaced when run again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / 'docs' / 'performance.md'
BEGIN, END = '<!-- bench: {} -->', '<!-- end of bench: {} -->'
NAMES = {'ours': 'jaxpref', 'trl': 'TRL'}
COLUMNS = (
  ('seconds a step', 'step_seconds', '{:.2f}'),
  ('CPU seconds', 'cpu_seconds', '{:.2f}'),
  ('{unit}/s', 'examples_per_second', '{:.2f}'),
  ('scored tokens/s', 'scored_per_second', '{:,.0f}'),
  ('useful GFLOP/s', 'gflops_per_second', '{:.1f}'),
  ('of peak', 'mfu', '{:.1%}'),
  ('peak GiB', 'peak_gib', '{:.2f}'),
  ('compiling, s', 'compile_seconds', '{:.1f}'),
)


def section(result: Mapping[str, Any]) -> str:
  """The markdown of one result, as `__main__` makes it."""
  heads = [head.format(unit=result['unit']) for head, *_ in COLUMNS]
  lines = [f'### {result["title"]}', '', row(['', *heads]), row(['---'] * (len(heads) + 1))]
  sides = {'ours': result['ours'], **{name: one['peer'] for name, one in result['peers'].items()}}
  for name, side in sides.items():
    values = [(side.get(key), form) for _, key, form in COLUMNS]
    cells = ['–' if value is None else form.format(value) for value, form in values]
    lines.append(row([NAMES.get(name, name), *cells]))
  lines.append('')
  for name, one in result['peers'].items():
    least, most = one['spread']
    words = (
      f'jaxpref is **{one["ratio"]:.2f} times** as fast as {NAMES.get(name, name)} '
      f'({least:.2f} to {most:.2f} over {result["rounds"]} rounds; {one["cpu_ratio"]:.2f} in CPU '
      'seconds, which other work on the machine moves less).'
    )
    if one['loss_disagreement'] is not None:
      words += (
        f' From equal weights the losses of the first {result["warm"]} steps differ by at most '
        f'{one["loss_disagreement"]:.0e} relative'
      )
      if one['norm_disagreement'] is not None:
        words += f', the first gradient norms by {one["norm_disagreement"]:.0e}'
      words += '.'
    lines.append(words)
  for name, side in sides.items():
    if side.get('table_seconds') is not None:
      took = f'{side["table_seconds"]:.1f} s'
      lines.append(f"{NAMES.get(name, name)}'s table of reference log-probs took {took} to build.")
  lines += ['', result['setting'], '']
  return '\n'.join(lines)


def write(
  result: Mapping[str, Any], page: Path = PAGE, section: Callable[[Mapping], str] = section
) -> None:
  """Puts the section into the page, in the place of an older one of the same work."""
  begin, end = BEGIN.format(result['key']), END.format(result['key'])
  text = page.read_text(encoding='utf-8') if page.exists() else '# Performance\n'
  block = f'{begin}\n{section(result)}{end}\n'
  if begin in text:
    before, rest = text.split(begin, 1)
    if end not in rest:
      raise ValueError(f'{page}: {begin} has no {end}; mend the page by hand')
    text = before + block + rest.split(end, 1)[1].removeprefix('\n')
  else:
    text = text.rstrip('\n') + '\n\n' + block
  page.parent.mkdir(exist_ok=True)
  page.write_text(text, encoding='utf-8')


def row(cells: list[str]) -> str:
  return '| ' + ' | '.join(cells) + ' |'
