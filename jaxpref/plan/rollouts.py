"""What online runs add to a plan: batches of samples, a critic, and the sampler itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxpref import sharding
from jaxpref.decoding import sample_groups
from jaxpref.log_probs import DIVERGENCES, ActorCritic
from jaxpref.models import Model
from jaxpref.objectives import Objective
from jaxpref.online import SHARED
from jaxpref.plan import costs
from jaxpref.rollout import estimators
from jaxpref.rollout.layout import Group, pack
from jaxpref.rollout.samples import WIDTHS
from jaxpref.sampling import Sampling
from jaxpref.train import policy
from jaxpref.typing import Batch


def with_critic(config: ConfigDict, actor: Model, critic: Model | None) -> Model | ActorCritic:
  """What `config` trains; `critic` is what rollout.critic names, None for the policy's own."""
  if not estimators.parse(config.rollout.advantages).critic:
    return actor
  shared = config.rollout.critic == SHARED
  own = actor if critic is None or shared else critic
  return ActorCritic(actor, policy.scored(own), shared=shared)


def needs_reference(config: ConfigDict, objective: Objective) -> bool:
  return bool(config.rollout.kl) or bool(objective.fields & {'ref_logps', *DIVERGENCES})


def batch(
  config: ConfigDict, objective: Objective, prompt: int, groups: int, critic: bool
) -> Batch:
  """The host batch of one optimizer step, of samples that are all as long as they may be."""
  c = config.rollout
  count, length = c.prompts // c.minibatches, c.max_new_tokens
  ones = np.ones(prompt, np.int32)
  sampled = tuple(np.ones(length, np.int32) for _ in range(c.samples))
  group = Group(ones, sampled, tuple(x.astype(bool) for x in sampled))
  names = ['advantages', 'sampler_logps']
  if c.epochs * c.minibatches > 1 or c.ahead or c.kl or c.target_kl or c.importance_cap:
    names.append('old_logps')
  names += ['ref_logps'] * needs_reference(config, objective) + ['returns', 'old_values'] * critic
  whole = prompt + c.samples * length
  row = max(config.batch.row_lengths, default=0) or max(prompt + length, min(whole, 2048))
  zeros = np.zeros((count, c.samples, length), np.float32)
  return pack(
    [group] * count,
    list(range(count)),
    dict.fromkeys(names, zeros),
    row_length=-(-row // 32) * 32,
    completion=length,
    microbatches=config.batch.microbatches,
    shards=groups,
  )


def copy_bytes(actor: Model, mesh: Any) -> int:
  """Of the parameters that a chip samples with, in the compute dtype."""
  shapes = actor.param_shapes(actor.dtype)
  where = sharding.params_sharding(mesh, shapes)
  shares = jax.tree.map(
    lambda x, s: np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, where
  )
  return int(sum(jax.tree.leaves(shares)))


def cache_bytes(config: ConfigDict, actor: Model, prompt: int, chips: int) -> float:
  """Of keys and values of a rollout, on a chip: prompts once where every sample has its slot."""
  c, width = actor.config, np.dtype(actor.dtype).itemsize
  r = config.rollout
  slots = r.slots or r.prompts * r.samples
  read = (r.prompts if slots == r.prompts * r.samples else slots) * -(-prompt // WIDTHS) * WIDTHS
  token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * width
  return token * (read + slots * r.max_new_tokens) / chips


def compiled(
  config: ConfigDict, actor: Model, mesh: jax.sharding.Mesh, prompt: int
) -> dict[str, Any]:
  """The sampler compiled as a rollout runs it: its memory, its prompts' pass, one token of all."""
  r = config.rollout
  width = -(-prompt // WIDTHS) * WIDTHS
  divided = jax.sharding.NamedSharding(mesh, jax.P(sharding.GROUPS))
  shapes = actor.param_shapes(actor.dtype)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.params_sharding(mesh, shapes),
  )

  def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((r.prompts, *shape), dtype, sharding=divided)

  with jax.set_mesh(mesh):
    program = sample_groups.lower(
      actor,
      params,
      array(width, dtype=jnp.int32),
      array(width, dtype=jnp.bool_),
      num_samples=r.samples,
      slots=r.slots or None,
      seed=0,
      ids=array(dtype=jnp.int32),
      max_new_tokens=r.max_new_tokens,
      sampling=Sampling(r.temperature, r.top_k, r.top_p, r.min_p),
      stop_ids=(0,),
    ).compile()
  text, memory = str(program.as_text()), program.memory_analysis()
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
