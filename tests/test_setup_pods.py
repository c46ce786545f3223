"""The ready settings for pods: each is planned, and the page says what the plans say."""

import pytest

from jaxpref.cli import configs
from jaxpref.plan import chips, planned
from tools import plan_table
from tools.bench import pod

PODS = plan_table.pods()


@pytest.mark.parametrize('name', PODS)
def test_every_setting_is_planned(name):
  config, topology = configs.load(f'pods:{name}'), chips.parse(PODS[name].topology)
  plan = planned.make(config, topology, plan_table.LENGTHS, analytic=True)
  assert plan.fits and plan.chips == topology.chips
  assert plan.examples % (plan.mesh['data'] * plan.mesh['fsdp']) == 0
  assert plan.tokens == plan.examples * sum(plan_table.LENGTHS)  # rows without padding


def test_a_setting_that_is_not_there():
  with pytest.raises(ValueError, match=r'configs/pods.py knows llama3.1-8b-dpo.*, not .llama9.'):
    configs.load('pods:llama9')


def test_the_page_holds_the_recorded_plans():
  page = plan_table.PAGE.read_text(encoding='utf-8')
  for name, section in plan_table.pages().items():
    assert section in page, f'{name} is old: python -m tools.plan_table'


def test_more_models_held_take_more():
  """PPO's four models, two of them trained, against the one of SimPO: a trained one has
  12 bytes a parameter, a frozen one 4. What adapters leave alone has 2, and most of it they do."""
  rows = [line for line in plan_table.held().splitlines() if line.startswith('| ')][2:]
  sizes = [float(row.split('|')[3]) for row in rows]
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[0] / sizes[-2] == pytest.approx((2 * 12 + 2 * 4) / 12, rel=0.02)
  assert 2 / 12 < sizes[-1] / sizes[-2] < 0.5


def test_the_bench_reads_the_recorded_plan_where_there_is_no_compiler(monkeypatch):
  monkeypatch.setattr(pod.importlib.util, 'find_spec', lambda name: None)
  found, plan = pod.measure(), plan_table.recorded()[pod.NAME]
  assert plan.source == 'compiled' and plan.date in found['how']
  assert found['ratio'] == pytest.approx(147.2e12 / plan.flops)
  assert 'recorded, google-tunix' in pod.section(found)
