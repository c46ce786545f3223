"""A plan: what one training step of a config would take on a slice of chips, per chip."""

import dataclasses
import datetime
import importlib.metadata
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpref import models, offline, program, sharding
from jaxpref.log_probs import ActorCritic
from jaxpref.models import Model
from jaxpref.objectives import parse
from jaxpref.plan import batch as batches
from jaxpref.plan import chips, costs, estimate, rollouts
from jaxpref.plan.chips import Topology
from jaxpref.plan.hlo import Instruction
from jaxpref.train import anchor, critics, policy
from jaxpref.train.throughput import work
from jaxpref.typing import Batch

STEPS = 1000  # of the run; only its schedule depends on it


@dataclasses.dataclass(frozen=True)
class Plan:
  """Per chip unless said; `memory` in bytes by part, `messages` kind -> (count, bytes)."""

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

  @property
  def chips(self) -> int:
    return int(np.prod(list(self.mesh.values())))

  @property
  def total(self) -> float:
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    return self.total <= self.capacity

  @property
  def bounds(self) -> dict[str, float]:
    """Seconds of a step, at least, by what they are spent on."""
    peaks = chips.parse(self.topology).peaks
    found = {'compute': self.flops / peaks.flops, 'links': self.wire / peaks.links}
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
  if not topology.tpu and not analytic:
    analytic = True  # nobody but the GPU itself compiles for it
  objective = parse(config.objective, imports=tuple(config.imports))
  devices: Any = range(topology.chips) if analytic else chips.devices(topology)
  make_mesh: Any = sharding.abstract_mesh if analytic else sharding.make_mesh
  mesh = make_mesh(config.mesh.to_dict(), devices)
  shape, groups = dict(mesh.shape), sharding.groups(mesh)
  actor, live = describe(config, topology), anchor.in_state(config, objective)
  online = bool(config.rewards)
  if online:
    model: Model | ActorCritic = critics.with_critic(config, actor, lambda spec: find(config, spec))
    source = rollouts.source(config, objective, model, tokens[0], mesh)
    host_batch, standing = rollouts.batch(source), source.needs_reference
  else:
    model = actor = offline.with_scores(config, objective, actor)
    attached = config.reference == 'live' and anchor.is_read(objective)
    host_batch = batches.make(config, objective, tokens, groups, live=attached)
    standing = False
  made = program.assemble(config, objective, model, STEPS, mesh, live=live)
  given = estimate.sizes(host_batch, made.chunk)
  memory, host = estimate.state_bytes(made, live=live or standing)
  if online:
    memory['the sampler'] = rollouts.copy_bytes(actor, mesh)
    memory['its cache'] = source.sampler.cache_bytes(config.rollout.prompts) // topology.chips
  reference = ('live' if online else config.reference) + (' on the host' if host else '')
  if not anchor.is_read(objective) and not standing:
    reference = 'none'
  flops, useful = estimate.flops(model, host_batch, topology.chips, live=live)
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
      'lengths': [tokens[0], config.rollout.max_new_tokens] if online else list(tokens),
      'microbatches': given.microbatches,
      'rows': [list(rows.tokens.shape[2:]) for rows in host_batch.rows],
      'scored slots': given.scored,
      'remat': actor.remat or 'none',
      'attention': actor.attention_name,
      'dtype': np.dtype(actor.dtype).name,
      'moments': config.optimizer.dtype,
      'reference': reference,
    },
    memory=memory | estimate.temporaries(actor, given, shape),
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
  )
  if analytic:
    sent = estimate.messages(actor, given, shape, live=live)
    return dataclasses.replace(
      plan,
      messages={kind: (0, size) for kind, size in sent.items()},
      wire=sum(size * (2 if kind == 'all-reduce' else 1) for kind, size in sent.items()),
    )
  state = made.state._replace(reference=made.reference) if live else made.state
  arguments = batches.abstract(host_batch, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    began = time.monotonic()
    compiled = made.step.lower(state, arguments, made.hparams).compile()
    seconds = time.monotonic() - began
  sampler = rollouts.compiled(source, mesh) if online else None
  text = compiled.as_text()
  keep(text)
  found = costs.count(text, price=attention_price(actor, host_batch))
  return dataclasses.replace(
    plan,
    source='compiled',
    memory=memory | compiled_memory(compiled.memory_analysis(), sum(memory.values())),
    flops=found.flops,
    traffic=found.hbm,
    messages=found.by_kind(),
    wire=sum(one.wire for one in found.collectives),
    kernels=found.kernels,
    compile_seconds=seconds,
    versions=plan.versions | chips.versions(),
    sampler=sampler,
  )


def assembled(config: ConfigDict, topology: Topology, mesh: Any) -> program.Program:
  """The program of `config` on `mesh`, with a live reference."""
  model = describe(config, topology)
  return program.assemble(config, parse(config.objective), model, STEPS, mesh, live=True)


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
    'activations and temporaries': found.temp_size_in_bytes,
    'code': found.generated_code_size_in_bytes,
  }


def attention_price(model: Model, batch: Batch) -> Callable[[Instruction], float | None]:
  """FLOPs of a call of `models.kernel`: the pairs of tokens that see each other, nothing else.

  The kernel works in tiles, so it does somewhat more. Its three calls are known by what they give:
  the output with its sums of scores (two products), the queries' gradient (three), and the keys'
  with the values' (four).
  """
  context, share = work(batch).context, model.config.num_heads / model.config.num_kv_heads

  def price(one: Instruction) -> float | None:
    size = float(np.prod(one.arrays[0].shape))
    if len(one.arrays) == 1:
      return 3 * 2 * context * size
    if len(one.arrays) != 2:
      return None
    if one.arrays[0].shape == one.arrays[1].shape:
      return 4 * 2 * context * size * share
    return 2 * 2 * context * size

  return price


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
  """A copy of `config` with some keys ('mesh.tensor') changed."""
  copy = config.copy_and_resolve_references()
  copy.unlock()
  copy.update_from_flattened_dict(dict(values))
  return copy.lock()
