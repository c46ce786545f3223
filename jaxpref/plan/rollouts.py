"""What online runs add to a plan: batches of samples, a critic, and the sampler itself."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxpref import online, program, rewards, roles, sharding
from jaxpref.limits import check_numbers
from jaxpref.log_probs import ActorCritic, policy_of
from jaxpref.models import Model
from jaxpref.objectives import Objective
from jaxpref.plan import costs, estimate
from jaxpref.rollout import estimators
from jaxpref.rollout.prompts import Prompts
from jaxpref.rollout.reward_models import RewardModel
from jaxpref.rollout.samples import Scorer
from jaxpref.rollout.source import Online
from jaxpref.train import policy, reward_models
from jaxpref.typing import Batch

COPY = 'reference of the samples'  # beside that in the state
STANDING = ('reward models', COPY)
CACHE, AT_WORK = 'its cache', 'its temporaries'


def source(
  config: ConfigDict,
  objective: Objective,
  model: Model | ActorCritic,
  prompt: int,
  mesh: Any,
) -> Online:
  """The run's source of samples; its prompts, all alike, have `prompt` tokens."""
  check_numbers(config)
  count = config.rollout.prompts
  ones, texts = np.ones(prompt, np.int32), [''] * count
  prompts = Prompts([ones] * count, texts, [{} for _ in texts], texts)
  tokenizer = policy.find_tokenizer(config.model, config.tokenizer)
  return Online(
    model,
    objective,
    online.sampler_of(config, policy_of(model), prompts, tokenizer, mesh),
    Scorer((), tokenizer),
    estimators.parse(config.rollout.advantages),
    online.rounds_of(config, sharding.groups(mesh)),
    beta=config.rollout.kl,
  )


def batch(source: Online) -> Batch:
  """The host batch of one optimizer step, of samples that are all as long as they may be."""
  carry = source.begin()
  full = carry | {'mask': np.ones_like(carry['mask'])}
  return source.packed(full, source.rounds.rows(0, 0), source.rounds.shards)


class Held(NamedTuple):
  """What an online run holds besides its state, bytes by part.

  `standing`: of a chip that trains, all the time; `sampling`: while it samples. `host`: of its
  share of the host's memory. `roles`: of chips of a role of their own, as `Plan.roles`.
  """

  standing: dict[str, float]
  sampling: dict[str, float]
  host: float
  roles: dict[str, tuple[int, dict[str, float]]]


def memory(
  config: ConfigDict,
  objective: Objective,
  source: Online,
  made: program.Program,
  own: roles.Roles,
  *,
  live: bool,
  frozen: bool,
) -> Held:
  """Where reference, reward models and sampler live, and how much of it each chip holds.

  Args:
    live: the state holds a reference too, a copy of its own.
    frozen: what adapters adapt is the reference, and a part of the state.

  Raises:
    ValueError: as a run would, for devices that would have nothing to do.
  """
  standing: dict[str, float] = {}
  parts: dict[str, dict[str, float]] = {}
  host = 0.0
  if own.reference is not own.training:
    theirs = program.placed(own.reference.abstract_mesh, bare(made.reference))
    parts['reference'] = {'reference': estimate.bytes_of(theirs)}
  elif (source.needs_reference or live) and not frozen:
    name = COPY if live else 'reference'
    standing = {name: estimate.bytes_of(made.reference)}
    host = estimate.bytes_of(made.reference, host=True)
  scoring: list[float] = []
  terms = rewards.parse(config.rewards, more=scorers(own.rewards, scoring))
  online.check_roles(own, source.rounds, source.needs_reference, objective, terms)
  if scoring and own.rewards is own.training:
    standing['reward models'] = sum(scoring)
  elif scoring:
    parts['rewards'] = {'reward models': sum(scoring)}
  sampler = source.sampler
  shapes = sampler.model.param_shapes(sampler.model.dtype)
  sampling: dict[str, float] = {
    'the sampler': estimate.bytes_of(program.placed(own.sampler.abstract_mesh, shapes)),
    CACHE: sampler.cache_bytes(config.rollout.prompts) // own.sampler.size,
  }
  if own.sampler is not own.training:
    parts['sampler'], sampling = sampling, {}
  sizes = own._asdict()
  return Held(
    {name: size for name, size in standing.items() if size},
    sampling,
    host,
    {role: (sizes[role].size, held) for role, held in parts.items()},
  )


def bare(shapes: Any) -> Any:
  """Shapes without where they live."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def scorers(mesh: Any, found: list[float]) -> dict[str, Callable]:
  """Makers of reward models that are only described; `found` gets the bytes of a chip of each."""

  def make(path: str, **options: Any) -> RewardModel:
    model, tokenizer = reward_models.described(path, repr(path))
    shapes = program.placed(mesh.abstract_mesh, model.param_shapes(stored_dtype(path, model)))
    found.append(estimate.bytes_of(shapes))
    return RewardModel(model, shapes, tokenizer, mesh, text=f'reward_model({path!r})')

  return {name: make for name in ('reward_model', 'process_reward_model')}


def stored_dtype(path: str, model: Model) -> str:
  """Of the parameters in a folder: a run's are float32, another's as its config.json says."""
  if policy.is_workdir(path) or not model.config.source:
    return 'float32'
  said = json.loads(model.config.source)
  return said.get('dtype') or said.get('torch_dtype') or 'float32'


def compiled(source: Online, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The sampler compiled as a rollout runs it: its memory, its prompts' pass, one token of all."""
  sampler, count = source.sampler, source.rounds.prompts
  divided = jax.sharding.NamedSharding(mesh, jax.P(sharding.GROUPS))
  shapes = sampler.model.param_shapes(sampler.model.dtype)
  params = program.placed(mesh, shapes)

  def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=divided)

  with jax.set_mesh(mesh):
    made = (
      jax.jit(sampler.sample)
      .lower(
        params,
        array(sampler.width, dtype=jnp.int32),
        array(sampler.width, dtype=jnp.bool_),
        array(dtype=jnp.int32),
      )
      .compile()
    )
  text, memory = str(made.as_text()), made.memory_analysis()
  assert memory is not None
  # Only running the loop over tokens would tell how often it turns: none, once, and the difference.
  before, once = costs.count(text, unknown=0), costs.count(text, unknown=1)
  after = {kind: size for kind, (_, size) in before.by_kind().items()}
  return {
    'temporaries': memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
    'prefill': {'flops': before.flops, 'traffic': before.hbm, 'messages': after},
    'token': {
      'flops': once.flops - before.flops,
      'traffic': once.hbm - before.hbm,
      'messages': {k: size - after.get(k, 0.0) for k, (_, size) in once.by_kind().items()},
    },
  }
