"""Plans the settings of configs/pods.py and writes the tables of docs/scaling.md.

python -m tools.plan_table                        # write the tables from docs/plans.json
python -m tools.plan_table llama3.1-8b-dpo ...    # first plan these anew (needs jaxpref[tpu])
python -m tools.plan_table all --analytic         # without a compiler
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from jaxpref.cli import configs
from jaxpref.plan import chips, estimate, planned, report
from jaxpref.plan.chips import GIB
from jaxpref.plan.planned import Plan

ROOT = Path(__file__).parent.parent
PLANS, PAGE = ROOT / 'docs' / 'plans.json', ROOT / 'docs' / 'scaling.md'
LENGTHS = (512, 512, 512)
BEGIN, END = '<!-- {}: written by tools/plan_table.py -->', '<!-- end of {} -->'

# Models that a method holds while it trains: (method, policy's trainable copies, frozen copies).
METHODS = (
  ('PPO: policy, critic, reference, reward model', 2, 2),
  ('PPO with a critic on the policy: and a rule for a reward', 1, 1),
  ('GRPO, RLOO with a KL penalty; DPO with a live reference', 1, 1),
  ('DPO, KTO, IPO, ... with the reference in a table', 1, 0),
  ('SimPO, ORPO, CPO, SFT: no reference', 1, 0),
)


def pods() -> dict[str, Any]:
  """`PODS` of configs/pods.py."""
  scope: dict[str, Any] = {}
  exec(compile((ROOT / 'configs' / 'pods.py').read_text(), 'configs/pods.py', 'exec'), scope)
  return scope['PODS']


def plan(name: str, *, analytic: bool) -> Plan:
  topology = chips.parse(pods()[name].topology)
  return planned.make(configs.load(f'pods:{name}'), topology, LENGTHS, analytic=analytic)


def recorded() -> dict[str, Plan]:
  if not PLANS.exists():
    return {}
  return {name: Plan(**one) for name, one in json.loads(PLANS.read_text()).items()}


def held(model: str = 'llama3.1-8b', shards: int = 64) -> str:
  """GiB of a chip that models and moments take, by method: no activations."""
  config = configs.load('pods:llama3.1-8b-dpo')
  mesh = jax.sharding.AbstractMesh(
    (1, shards, 1, 1), ('data', 'fsdp', 'context', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 4,
  )  # fmt: skip
  topology = chips.parse('v5e:8x8')
  made = planned.assembled(config, topology, mesh, live=True)
  state, _ = estimate.state_bytes(made, live=True)
  trained, frozen = state['parameters'] + state['optimizer'], state['reference']
  rows = ['| method | models held | GiB a chip |', '| --- | --- | --- |']
  for method, learning, standing in METHODS:
    size = learning * trained + standing * frozen
    rows.append(f'| {method} | {learning + standing} | {size / GIB:.2f} |')
  config = configs.load('pods:llama3.1-8b-dpo-lora')
  adapted = planned.assembled(config, topology, mesh, live=False)
  state, _ = estimate.state_bytes(adapted, live=False, frozen=True)
  method = 'DPO, KTO, GRPO, ... with adapters (LoRA): what they adapt is the reference'
  rows.append(f'| {method} | 1 and adapters | {sum(state.values()) / GIB:.2f} |')
  count = sum(x.size for x in jax.tree.leaves(made.state.params))
  small = sum(x.size for x in jax.tree.leaves(adapted.state.params))
  rows += [
    '',
    f'{model}, {count / 1e9:.2f} B parameters in {shards} shards: float32 masters and reference, '
    'two float32 moments of what trains; half as much for moments in bfloat16. Adapters of rank '
    f'{config.lora.rank}: {small / 1e6:.0f} M parameters, each in shards along one side alone; the '
    'others stand still in bfloat16.',
  ]
  return '\n'.join(rows)


def write(sections: dict[str, str]) -> None:
  """Puts sections between their marks.

  Raises:
    ValueError: the page has no such marks.
  """
  text = PAGE.read_text(encoding='utf-8')
  for name, section in sections.items():
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
      raise ValueError(f'{PAGE} has no {begin} ... {end}')
    before, rest = text.split(begin, 1)
    text = f'{before}{begin}\n{section}\n{end}{rest.split(end, 1)[1]}'
  PAGE.write_text(text, encoding='utf-8')


def pages() -> dict[str, str]:
  """The sections of docs/scaling.md, by name."""
  found = recorded()
  versions = sorted({f'{k} {v}' for one in found.values() for k, v in one.versions.items()})
  dates = sorted({one.date for one in found.values()})
  said = f'{", ".join(dates)}; {", ".join(versions)}.'
  known = [(name, found[name]) for name in pods() if name in found]
  advice = [f'`{name}`: {report.advice(one)}.' for name, one in known if not one.fits]
  return {'plans': '\n'.join([report.table(known), '', said, *advice]), 'models held': held()}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='*', help='of configs/pods.py, or all')
  parser.add_argument('--analytic', action='store_true', help='compile nothing')
  args = parser.parse_args()
  names = list(pods()) if args.names == ['all'] else args.names
  for name in names:
    made = plan(name, analytic=args.analytic)
    print('\n'.join(report.lines(made)), flush=True)
    plans = {k: v.as_record() for k, v in recorded().items()} | {name: made.as_record()}
    PLANS.write_text(json.dumps(plans, indent=1, sort_keys=True) + '\n')
  write(pages())
  return 0


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  sys.exit(main())
