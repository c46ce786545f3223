"""A plan for people: a page on a terminal, a row of a table."""

from collections.abc import Iterator, Sequence

from jaxpref.plan.chips import GIB
from jaxpref.plan.planned import Plan

HEADS = (
  'what', 'topology', 'mesh', 'remat', 'GiB a chip (of)', 'TFLOP a chip (over useful)',
  'gathered + reduced GB', 'bound: s, by', 'MFU at most', 'examples/s at most',
)  # fmt: skip


def lines(plan: Plan) -> Iterator[str]:
  axes = ' '.join(f'{axis}={size}' for axis, size in plan.mesh.items() if size > 1) or '1 chip'
  yield f'{plan.objective} on {plan.model}, {plan.parameters / 1e9:.2f} B parameters'
  yield f'{plan.topology}: {plan.chips} chips as {axes}; {plan.examples} examples a step'
  yield ', '.join(f'{name} {value}' for name, value in plan.setting.items())
  how = 'compiled ahead of time' if plan.source == 'compiled' else 'estimated from shapes alone'
  took = f' in {plan.compile_seconds:.0f} s' if plan.compile_seconds else ''
  versions = ', '.join(f'{name} {version}' for name, version in plan.versions.items())
  yield f'{how}{took}, {plan.date}; {versions}'
  yield ''
  yield 'memory of a chip, GiB'
  for name, size in plan.memory.items():
    yield f'  {name:<30} {size / GIB:8.2f}'
  verdict = 'fits' if plan.fits else 'DOES NOT FIT'
  yield f'  {"total":<30} {plan.total / GIB:8.2f} of {plan.capacity / GIB:.2f}: {verdict}'
  if plan.host:
    yield f'  {"in the memory of the host":<30} {plan.host / GIB:8.2f}'
  yield ''
  yield 'work of a chip in a step'
  over = plan.flops / plan.useful
  useful = plan.useful / 1e12
  yield f'  TFLOP      {plan.flops / 1e12:.2f}, {over:.2f} times the useful {useful:.2f}'
  if plan.traffic is not None:
    yield f'  memory     {plan.traffic / 1e9:.1f} GB read and written'
  for kind, (count, size) in sorted(plan.messages.items()):
    often = f' in {count:.0f} messages' if count else ''
    yield f'  {kind:<20} {size / 1e9:.2f} GB{often}'
  for name, (times, flops) in plan.kernels.items():
    cost = 'not counted' if flops is None else f'{flops / 1e12:.2f} TFLOP, from shapes'
    yield f'  kernel {name}: {times:.0f} calls, {cost}'
  for part, name in (('prefill', 'sampler, prompts'), ('token', 'sampler, a token of all')):
    if plan.sampler:
      one = plan.sampler[part]
      sent = sum(one['messages'].values()) / 1e9
      moved = one['traffic'] / 1e9
      yield f'  {name}: {one["flops"] / 1e9:.1f} GFLOP, {moved:.2f} GB moved, {sent:.2f} GB sent'
  yield ''
  bounds = ', '.join(f'{name} {seconds:.3f} s' for name, seconds in plan.bounds.items())
  yield f'bounds     {bounds}: no step is shorter than the longest'
  if 'the sampler' in plan.memory:
    yield '           of an optimizer step alone; sampling comes on top'
  yield f'MFU        at most {plan.mfu:.1%} on useful tokens'
  yield (
    f'rate       at most {plan.tokens / plan.seconds:,.0f} tokens/s, '
    f'{plan.examples / plan.seconds:,.1f} examples/s'
  )
  if plan.cost_per_million is not None:
    yield f'cost       at least {plan.cost_per_million:,.2f} for a million examples'
  if not plan.fits:
    yield f'too large  {advice(plan)}'


def advice(plan: Plan) -> str:
  """What to try where a plan does not fit, the largest gain first."""
  largest = max(plan.memory, key=lambda name: plan.memory[name])
  found = []
  if plan.setting['remat'] not in ('full', 'offload'):
    found.append('remat=full')
  if 'activations' in largest or 'work' in largest or 'head' in largest:
    found.append(f'batch.microbatches={2 * plan.setting["microbatches"]}')
  if plan.setting['moments'] == 'float32' and 'optimizer' in plan.memory:
    found.append('optimizer.dtype=bfloat16')
  if plan.memory.get('reference'):
    found.append('reference=table, or reference_memory=host')
  if plan.mesh['data'] > 1:
    found.append('mesh.data=1 and a larger mesh.fsdp')
  found.append(f'more than {plan.chips} chips')
  return f'{plan.total / plan.capacity:.2f} times the memory; try {", ".join(found)}'


def table(plans: Sequence[tuple[str, Plan]]) -> str:
  """A markdown table; the names are ours."""
  rows = [HEADS, ('---',) * len(HEADS), *(row(name, plan) for name, plan in plans)]
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in rows)


def row(name: str, plan: Plan) -> tuple[str, ...]:
  axes = ' x '.join(f'{axis} {size}' for axis, size in plan.mesh.items() if size > 1) or '1'
  sent = ' + '.join(
    f'{sum(plan.messages.get(kind, (0, 0))[1] for kind in kinds) / 1e9:.1f}'
    for kinds in (('all-gather',), ('all-reduce', 'reduce-scatter'))
  )
  by = max(plan.bounds, key=lambda name: plan.bounds[name])
  fits = '' if plan.fits else ' **does not fit**'
  how = '' if plan.source == 'compiled' else ' (estimated)'
  return (
    name + how,
    plan.topology,
    axes,
    str(plan.setting['remat']),
    f'{plan.total / GIB:.1f} ({plan.capacity / GIB:.1f}){fits}',
    f'{plan.flops / 1e12:.1f} ({plan.flops / plan.useful:.2f})',
    sent,
    f'{plan.seconds:.2f}, {by}',
    f'{plan.mfu:.0%}',
    f'{plan.examples / plan.seconds:,.0f}',
  )
