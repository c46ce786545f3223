"""What online runs add to a plan: batches of samples, a critic, and the sampler itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxpref import online, program, sharding
from jaxpref.log_probs import ActorCritic, policy_of
from jaxpref.models import Model
from jaxpref.objectives import Objective
from jaxpref.plan import costs, estimate
from jaxpref.rollout import estimators
from jaxpref.rollout.prompts import Prompts
from jaxpref.rollout.samples import Scorer
from jaxpref.rollout.source import Online
from jaxpref.train import policy
from jaxpref.typing import Batch


def source(
  config: ConfigDict,
  objective: Objective,
  model: Model | ActorCritic,
  prompt: int,
  mesh: Any,
) -> Online:
  """The run's source of samples; its prompts, all alike, have `prompt` tokens."""
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


def copy_bytes(actor: Model, mesh: Any) -> int:
  """Of the parameters that a chip samples with, in the compute dtype."""
  return estimate.bytes_of(program.placed(mesh, actor.param_shapes(actor.dtype)))


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
