"""A plan for people: a page on a terminal, a row of a table."""

from collections.abc import Iterator, Mapping, Sequence

from jaxpref.plan.chips import GIB
from jaxpref.plan.planned import Plan

HEADS = (
  'what', 'topology', 'mesh', 'remat', 'GiB a chip (of)', 'TFLOP a chip (over useful)',
  'gathered + reduced GB', 'bound: s, by', 'MFU at most', 'examples/s at most',
)  # fmt: skip


def lines(plan: Plan) -> Iterator[str]:
  axes = ' '.join(f'{axis}={size}' for axis, size in plan.mesh.items() if size > 1) or '1 chip'
  yield f'{plan.objective} on {plan.model}, {plan.parameters / 1e9:.2f} B parameters'
  slices = f'{plan.slices} slices of ' * (plan.slices > 1)
  apart = ''.join(f', {count} for {role}' for role, (count, _) in plan.roles.items())
  shape = f'{plan.chips} chips as {axes}{apart}'
  yield f'{slices}{plan.topology}: {shape}; {plan.examples} examples a step'
  yield ', '.join(f'{name} {value}' for name, value in plan.setting.items())
  how = 'compiled ahead of time' if plan.source == 'compiled' else 'estimated from shapes alone'
  took = f' in {plan.compile_seconds:.0f} s' if plan.compile_seconds else ''
  versions = ', '.join(f'{name} {version}' for name, version in plan.versions.items())
  yield f'{how}{took}, {plan.date}; {versions}'
  if plan.refusal:
    yield f'the compiler refuses it: {plan.refusal}'
  yield ''
  yield 'memory of a chip, GiB'
  yield from _parts(plan.memory)
  if plan.sampling:
    yield '  while it samples, ' + ('too' if plan.ahead else 'in place of what only a step needs')
    yield from _parts(plan.sampling)
  yield _total(plan.total, plan.capacity)
  if plan.donated:
    yield f'  {"of it donated, so held once":<34} {plan.donated / GIB:8.2f}'
  for role, (count, parts) in plan.roles.items():
    yield f'memory of each of {count} chips for {role} alone, GiB'
    yield from _parts(parts)
    yield _total(sum(parts.values()), plan.capacity)
  if plan.host:
    yield f'  {"in the memory of the host":<34} {plan.host / GIB:8.2f}'
  yield ''
  yield 'work of a chip in a step'
  useful = f'{plan.flops / plan.useful:.2f} times the useful {plan.useful / 1e12:.2f}'
  yield f'  {"arithmetic":<34} {plan.flops / 1e12:8.2f} TFLOP, {useful}'
  if plan.traffic is not None:
    yield f'  {"memory read and written":<34} {plan.traffic / 1e9:8.2f} GB'
  for kind, (number, size) in sorted(plan.messages.items()):
    often = f' in {number:.0f} messages' if number else ''
    yield f'  {kind:<34} {size / 1e9:8.2f} GB{often}'
  if plan.far:
    yield f'  {"sent by a chip to other slices":<34} {plan.far / 1e9:8.2f} GB'
  for name, (times, known) in plan.kernels.items():
    cost = '     not counted' if known is None else f'{known / 1e12:8.2f} TFLOP, from shapes'
    yield f'  {f"kernel {name}":<34} {cost} in {times:.0f} calls'
  for part, name in (('prefill', 'sampler, all prompts'), ('token', 'sampler, a token of each')):
    if plan.sampler:
      one = plan.sampler[part]
      sent = sum(one['messages'].values()) / 1e9
      moved = one['traffic'] / 1e9
      work = f'{one["flops"] / 1e12:8.2f} TFLOP, {moved:.2f} GB moved, {sent:.2f} GB sent'
      yield f'  {name:<34} {work}'
  yield ''
  bounds = ', '.join(f'{name} {seconds:.3f} s' for name, seconds in plan.bounds.items())
  yield f'bounds     {bounds}: no step is shorter than the longest'
  if plan.sampling or 'sampler' in plan.roles:
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


def _parts(parts: Mapping[str, float]) -> Iterator[str]:
  for name, size in parts.items():
    yield f'  {name:<34} {size / GIB:8.2f}'


def _total(size: float, capacity: float) -> str:
  verdict = 'fits' if size <= capacity else 'DOES NOT FIT'
  return f'  {"total":<34} {size / GIB:8.2f} of {capacity / GIB:.2f}: {verdict}'


def advice(plan: Plan) -> str:
  """What to try where a plan does not fit, the largest gain first."""
  found = []
  for role, (count, parts) in plan.roles.items():
    if sum(parts.values()) > plan.capacity:
      found.append(f'more than {count} chips for {role}')
  times = max(plan.total, *(sum(p.values()) for _, p in plan.roles.values()), 0.0) / plan.capacity
  if plan.total <= plan.capacity:
    return f'{times:.2f} times the memory; try {", ".join(found)}'
  memory = plan.memory | plan.sampling
  largest = max(memory, key=lambda name: memory[name])
  if plan.sampling and largest in plan.sampling:
    found.append('rollout.slots, or fewer rollout.prompts: keys and values of fewer completions')
  if plan.setting['remat'] not in ('full', 'offload'):
    found.append('remat=full')
  if plan.setting['logits'] == 'kept':
    found.append('keep_logits=False')
  if 'activations' in largest or 'work' in largest or 'head' in largest:
    found.append(f'batch.microbatches={2 * plan.setting["microbatches"]}')
  if plan.setting['moments'] == 'float32' and 'optimizer' in plan.memory:
    found.append('optimizer.dtype=bfloat16')
  if plan.memory.get('reference'):
    table = 'reference=table, or ' * (not plan.sampling)  # samples have no table
    found.append(f'{table}reference_memory=host')
  if plan.mesh['data'] > 1:
    found.append('mesh.data=1 and a larger mesh.fsdp')
  if 'optimizer' == largest:
    found.append('adapters, as lora.rank=16')
  found.append(f'more than {plan.chips} chips')
  return f'{times:.2f} times the memory; try {", ".join(found)}'


def table(plans: Sequence[tuple[str, Plan]]) -> str:
  """A markdown table; the names are ours."""
  rows = [HEADS, ('---',) * len(HEADS), *(row(name, plan) for name, plan in plans)]
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in rows)


def row(name: str, plan: Plan) -> tuple[str, ...]:
  axes = ' x '.join(f'{axis} {size}' for axis, size in plan.mesh.items() if size > 1) or '1'
  sent = ' + '.join(
    f'{sum(size for kind, (_, size) in plan.messages.items() if kind.startswith(kinds)) / 1e9:.1f}'
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
