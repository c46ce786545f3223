"""A plan: what one training step of a config would take on a slice of chips, per chip."""

import dataclasses
import datetime
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpref import models, offline, program, roles, sharding
from jaxpref.log_probs import ActorCritic
from jaxpref.models import Model
from jaxpref.models.kernel import PRODUCTS, TO_KEYS
from jaxpref.objectives import parse
from jaxpref.plan import batch as batches
from jaxpref.plan import chips, costs, estimate, messages, rollouts
from jaxpref.plan.chips import Topology
from jaxpref.plan.hlo import Instruction
from jaxpref.rollout.source import Online
from jaxpref.train import anchor, critics, lora, policy
from jaxpref.train.throughput import work

STEPS = 1000  # of the run; only its schedule depends on it
AT_WORK = 'activations and temporaries'
# Parts of memory that stay between steps.
HELD = (*estimate.STATE, *estimate.ADAPTED, *rollouts.STANDING)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Per chip that trains unless said; memory in bytes by part, `messages` kind -> (count, bytes).

  `memory` is that of a step. `sampling` is what a chip that trains holds on top of the parts in
  `HELD` while it samples, between steps or, with `ahead`, during them. `roles` are chips that do
  one thing alone: role -> how many, and the memory of each.
  """

  model: str
  objective: str
  topology: str
  mesh: dict[str, int]
  source: str  # 'compiled' or 'estimated'
  examples: int  # a step, over all chips
  tokens: int  # of them, each prompt once
  parameters: int
  setting: dict[str, Any]
  memory: dict[str, float]
  host: float
  capacity: float
  flops: float
  useful: float
  traffic: float | None
  messages: dict[str, tuple[float, float]]
  wire: float
  kernels: dict[str, tuple[float, float | None]]
  compile_seconds: float | None
  versions: dict[str, str]
  date: str
  price: float | None = None  # of a chip for an hour
  sampler: dict[str, Any] | None = None  # of an online run, as `rollouts.compiled` has it
  slices: int = 1
  far: float = 0.0  # bytes that a chip sends to other slices
  sampling: dict[str, float] = dataclasses.field(default_factory=dict)
  ahead: bool = False
  roles: dict[str, tuple[int, dict[str, float]]] = dataclasses.field(default_factory=dict)
  donated: float = 0.0  # bytes of what a step is given, which its results take the place of
  refusal: str = ''  # of the compiler, for what it finds too large

  @property
  def chips(self) -> int:
    """All there are."""
    return math.prod(self.mesh.values()) + sum(count for count, _ in self.roles.values())

  @property
  def total(self) -> float:
    held = sum(size for name, size in self.memory.items() if name in HELD)
    step, sampling = sum(self.memory.values()) - held, sum(self.sampling.values())
    return held + (step + sampling if self.ahead else max(step, sampling))

  @property
  def fits(self) -> bool:
    each = [self.total, *(sum(parts.values()) for _, parts in self.roles.values())]
    return not self.refusal and max(each) <= self.capacity

  @property
  def bounds(self) -> dict[str, float]:
    """Seconds of a step, at least, by what they are spent on."""
    peaks = chips.parse(self.topology).peaks
    found = {'compute': self.flops / peaks.flops, 'links': self.wire / peaks.links}
    if self.far:
      found['slices'] = self.far / peaks.network
    if self.traffic is not None:
      found['memory'] = self.traffic / peaks.bandwidth
    return found

  @property
  def seconds(self) -> float:
    """Of a step, at least: all bounds at once, none of them waiting for another."""
    return max(self.bounds.values())

  @property
  def mfu(self) -> float:
    """Share of peak that useful FLOPs take, at most."""
    return self.useful / (self.seconds * chips.parse(self.topology).peaks.flops)

  @property
  def cost_per_million(self) -> float | None:
    """Of a million examples, at least, in the price's money."""
    if self.price is None:
      return None
    return self.price * self.chips * self.seconds / 3600 / self.examples * 1e6

  def as_record(self) -> dict[str, Any]:
    """What `Plan(**record)` is made of."""
    return dataclasses.asdict(self)

  def as_json(self) -> dict[str, Any]:
    derived = ('chips', 'total', 'fits', 'bounds', 'seconds', 'mfu', 'cost_per_million')
    rates = {
      'tokens_per_second': self.tokens / self.seconds,
      'examples_per_second': self.examples / self.seconds,
    }
    return self.as_record() | {name: getattr(self, name) for name in derived} | rates


def make(
  config: ConfigDict,
  topology: Topology,
  tokens: tuple[int, ...],
  *,
  analytic: bool = False,
  price: float | None = None,
  keep: Callable[[str], None] = lambda text: None,
) -> Plan:
  """The plan of `config` on `topology`.

  Args:
    tokens: of an example's prompt, then of its candidates.
    analytic: by arithmetic alone; else the step is compiled for the topology.
    price: of a chip for an hour.
    keep: called with the compiled program's text.

  Raises:
    ValueError: what a run would raise, or a topology that there is not.
    ImportError: the compiler for it is not installed.
  """
  analytic = analytic or not topology.tpu  # nobody but a GPU itself compiles for it
  objective = parse(config.objective, imports=tuple(config.imports))
  slices = config.mesh.slices
  every = (chips.stand_ins if analytic else chips.devices)(topology, slices)
  mesh: Any = sharding.make_mesh(config.mesh.to_dict(), roles.trainers(config, every))
  own = roles.divide(config, mesh, every)
  mesh = mesh.abstract_mesh if analytic else mesh
  shape, groups = dict(mesh.shape), sharding.groups(mesh)
  actor, live = describe(config, topology), anchor.in_state(config, objective)
  source: Online | None = None
  if config.rewards:
    policy.check_writes(config.model, actor)
    model: Model | ActorCritic = critics.with_critic(config, actor, lambda spec: find(config, spec))
    source = rollouts.source(config, objective, model, tokens[0], mesh)
    host_batch = rollouts.batch(source)
  else:
    model = actor = offline.with_scores(config, objective, actor)
    attached = config.reference == 'live' and anchor.is_read(objective)
    host_batch = batches.make(config, objective, tokens, groups, live=attached)
  made = program.assemble(config, objective, model, STEPS, mesh, live=live)
  given = estimate.sizes(host_batch, made.chunk)
  frozen = lora.chosen(config) is not None
  trained = sum(x.size for x in jax.tree.leaves(made.state.params))
  memory, host = estimate.state_bytes(made, live=live, frozen=frozen)
  given_bytes = sum(memory.values())
  sampling, apart = {}, {}
  reference = config.reference if anchor.is_read(objective) else 'none'
  if source is not None:
    reference = 'live' if source.needs_reference or live else 'none'
    held = rollouts.memory(config, objective, source, made, own, live=live, frozen=frozen)
    host += held.host
    memory |= held.standing
    sampling, apart = held.sampling, held.roles
  flops, useful = estimate.flops(model, host_batch, mesh.size, live=live, frozen=frozen)
  plan = Plan(
    model=config.model,
    objective=config.objective,
    topology=topology.name,
    mesh=shape,
    source='estimated',
    examples=work(host_batch).examples,
    tokens=work(host_batch).tokens,
    parameters=sum(x.size for x in jax.tree.leaves(model.param_shapes())),
    setting={
      'lengths': [tokens[0], config.rollout.max_new_tokens] if source else list(tokens),
      'microbatches': given.microbatches,
      'rows': [list(rows.tokens.shape[2:]) for rows in host_batch.rows],
      'scored slots': given.scored,
      'remat': actor.remat or 'none',
      'logits': 'kept' if actor.keep_logits else 'computed again',
      'attention': actor.attention_name if shape['context'] == 1 else 'divided',
      'dtype': np.dtype(actor.dtype).name,
      'moments': config.optimizer.dtype,
      'reference': reference + ' on the host' * bool(host),
    },
    memory=memory | estimate.temporaries(actor, given, shape, trained),
    host=host,
    capacity=topology.peaks.memory,
    flops=flops,
    useful=useful,
    traffic=None,
    messages={},
    wire=0.0,
    kernels={},
    compile_seconds=None,
    versions={name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')},
    date=str(datetime.date.today()),
    price=price,
    slices=slices,
    sampling=sampling,
    ahead=bool(source and source.rounds.ahead),
    roles=apart,
  )
  if analytic:
    sent = estimate.messages(actor, given, shape, trained, live=live, slices=slices)
    return dataclasses.replace(
      plan,
      messages={kind: (0, size) for kind, (_, size) in messages.by_kind(sent).items()},
      wire=sum(one.wire for one in sent),
      far=sum(one.far for one in sent),
    )
  given_state = made.state._replace(reference=made.reference) if live or frozen else made.state
  arguments = batches.abstract(host_batch, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    lowered, began = made.step.lower(given_state, arguments, made.hparams), time.monotonic()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      return refused(plan, error)
    seconds = time.monotonic() - began
  text, needed = compiled.as_text(), compiled.memory_analysis()
  keep(text)
  slice_size = mesh.size // slices if slices > 1 else 0
  price_of = attention_price(actor.config, work(host_batch).context)
  found = costs.count(text, price=price_of, slice_size=slice_size)
  plan = dataclasses.replace(
    plan,
    source='compiled',
    memory=memory | compiled_memory(needed, given_bytes),
    donated=needed.alias_size_in_bytes,
    flops=found.flops,
    traffic=found.hbm,
    messages=found.by_kind(),
    wire=sum(one.wire for one in found.collectives),
    far=sum(one.far for one in found.collectives),
    kernels=found.kernels,
    compile_seconds=seconds,
    versions=plan.versions | chips.versions(),
  )
  return plan if source is None else with_sampler(plan, rollouts.compiled(source, own.sampler))


def refused(plan: Plan, error: Exception) -> Plan:
  """The plan of a program that its compiler finds too large; other errors are raised again."""
  if 'RESOURCE_EXHAUSTED' not in str(error):
    raise error
  said = next(line for line in str(error).splitlines() if 'RESOURCE_EXHAUSTED' in line)
  plan = dataclasses.replace(plan, refusal=said.partition('RESOURCE_EXHAUSTED: ')[2])
  if not (size := re.search(r'temporaries \(([\d.]+)G\)', said)):
    return plan
  held = {name: size for name, size in plan.memory.items() if name in HELD}
  return dataclasses.replace(plan, memory=held | {AT_WORK: float(size[1]) * chips.GIB})


def with_sampler(plan: Plan, sampler: dict[str, Any]) -> Plan:
  """The plan with what was counted of the compiled sampler."""

  def told(parts: dict[str, float]) -> dict[str, float]:
    others = max(0.0, sampler['temporaries'] - parts[rollouts.CACHE])
    return parts | {rollouts.AT_WORK: others}

  if plan.sampling:
    return dataclasses.replace(plan, sampler=sampler, sampling=told(plan.sampling))
  count, parts = plan.roles['sampler']
  apart = plan.roles | {'sampler': (count, told(parts))}
  return dataclasses.replace(plan, sampler=sampler, roles=apart)


def assembled(config: ConfigDict, topology: Topology, mesh: Any, *, live: bool) -> program.Program:
  """The program of `config` on `mesh`, perhaps with a live reference."""
  model = describe(config, topology)
  return program.assemble(config, parse(config.objective), model, STEPS, mesh, live=live)


def find(config: ConfigDict, spec: str) -> Model:
  """The model called `spec`; a preset keeps its own vocabulary where no tokenizer is named."""
  if spec.startswith(policy.PRESET) and not config.tokenizer:
    return Model(models.preset(spec.removeprefix(policy.PRESET)))
  return policy.describe(spec, policy.find_tokenizer(spec, config.tokenizer))


def describe(config: ConfigDict, topology: Topology) -> Model:
  """The model of `config` as it would be on `topology`."""
  platform = 'tpu' if topology.tpu else 'gpu'
  return offline.configured(config, find(config, config.model), platform)


def compiled_memory(found: Any, state: float) -> dict[str, float]:
  """What the compiler adds to the state, by part."""
  kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return {
    'batch and outputs': max(0.0, kept - state),
    AT_WORK: found.temp_size_in_bytes,
    'code': found.generated_code_size_in_bytes,
  }


def attention_price(config: models.Config, context: float) -> Callable[[Instruction], float | None]:
  """FLOPs of a call of `models.kernel`, whose tokens see `context` each in the mean, nothing else.

  The kernel works in tiles, so it does somewhat more, and what it says itself is the most that any
  batch of these shapes would cost.
  """
  share = config.num_heads / config.num_kv_heads

  def price(one: Instruction) -> float | None:
    for name, products in PRODUCTS.items():
      if f'/{name}/' in one.op_name:
        size = float(np.prod(one.arrays[0].shape)) * (share if name == TO_KEYS else 1)
        return products * 2 * context * size
    return None

  return price


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
  """A copy of `config` with some keys ('mesh.tensor') changed."""
  copy = config.copy_and_resolve_references()
  copy.unlock()
  copy.update_from_flattened_dict(dict(values))
  return copy.lock()
