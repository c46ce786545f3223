"""Our DPO step beside Tunix's on a TPU slice, both compiled ahead of time, per chip.

  python -m tools.bench pod [--json out.json]

64 pairs of a prompt of 512 and two completions of 512 tokens, Llama-3.1-8B, v5e:8x8, fsdp 64. Ours
is planned anew where the TPU's compiler is installed, else read from docs/plans.json. Tunix's
numbers are recorded, not measured here: google-tunix 0.1.7's own DPO step, compiled once for the
same slice (reference pass and train step, two rows of 1024 a pair, bf16 parameters and moments,
remat per decoder layer), loops counted as they turn.
"""

import importlib.util
from typing import Any

from tools import plan_table
from tools.bench.table import grid

NAME = 'llama3.1-8b-dpo'
# Recorded on 20 November 2026 (google-tunix 0.1.7), not measured by this script.
TUNIX = {
  'tflop': 147.2,
  'memory_gib': 5.65,
  'gathered_gb': 42.4,
  'reduced_gb': 16.6,
  'compile_seconds': 326.0,
}
COLUMNS = (
  ('TFLOP', 'tflop', '{:.1f}'),
  ('memory, GiB', 'memory_gib', '{:.1f}'),
  ('gathered, GB', 'gathered_gb', '{:.1f}'),
  ('reduced, GB', 'reduced_gb', '{:.1f}'),
  ('compiling, s', 'compile_seconds', '{:.1f}'),
)


def measure() -> dict[str, Any]:
  """Both sides and the ratio of FLOPs, theirs to ours."""
  known = plan_table.recorded()
  if importlib.util.find_spec('libtpu'):
    plan, how = plan_table.plan(NAME, analytic=False), 'planned now'
  elif NAME in known:
    plan, how = known[NAME], f'read from {plan_table.PLANS.name}, {known[NAME].date}'
  else:
    plan, how = plan_table.plan(NAME, analytic=True), 'estimated'
  size = lambda *kinds: sum(plan.messages.get(k, (0, 0))[1] for k in kinds) / 1e9  # noqa: E731
  ours = {
    'tflop': plan.flops / 1e12,
    'memory_gib': plan.total / 2**30,
    'gathered_gb': size('all-gather'),
    'reduced_gb': size('all-reduce', 'reduce-scatter'),
    'compile_seconds': plan.compile_seconds,
  }
  sent = lambda side: side['gathered_gb'] + side['reduced_gb']  # noqa: E731
  return {
    'key': f'pod {NAME}',
    'how': how,
    'ours': ours,
    'peer': TUNIX,
    'peer_is': 'recorded, google-tunix 0.1.7',
    'ratio': TUNIX['tflop'] / ours['tflop'],
    'sent': sent(ours) / sent(TUNIX),
    'over_useful': plan.flops / plan.useful,
  }


def section(found: dict[str, Any]) -> str:
  sides = {
    f'jaxpref ({found["how"]})': found['ours'],
    f'Tunix ({found["peer_is"]})': found['peer'],
  }
  lines = [
    f'### pod, {NAME}: the DPO step on v5e:8x8, a chip',
    '',
    *grid('', COLUMNS, sides),
    '',
    f'Tunix computes **{found["ratio"]:.2f} times** our FLOPs for the same pairs; ours are '
    f'{found["over_useful"]:.2f} times the useful ones. We send {found["sent"]:.2f} times its '
    'bytes.',
    '',
  ]
  return '\n'.join(lines)
