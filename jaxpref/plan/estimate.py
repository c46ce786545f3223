"""What a step would take by arithmetic on shapes alone: memory by part, FLOPs, messages.

Good to up to two fifths where a compiled program was there to compare; state is exact. `compiled`
counts instead.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpref.log_probs import ActorCritic, policy_of
from jaxpref.models import Model
from jaxpref.plan.messages import Collective
from jaxpref.program import Program
from jaxpref.train.throughput import train_flops, work
from jaxpref.typing import Batch

STATE = ('parameters', 'optimizer', 'average', 'reference')
ADAPTED = ('adapters', 'optimizer', 'average', 'frozen parameters')  # likewise, with `config.lora`


class Sizes(NamedTuple):
  """Of a step. `tokens` and `scored` are slots of one data group and one microbatch."""

  tokens: int
  scored: int
  microbatches: int
  chunk: int


def sizes(batch: Batch, chunk: int) -> Sizes:
  rows = [r.tokens.shape for r in batch.rows]  # [M, G, R, L]
  return Sizes(
    sum(shape[2] * shape[3] for shape in rows),
    batch.scored.at.shape[-1],
    batch.fields['mask'].shape[0],
    chunk,
  )


def state_bytes(
  program: Program, *, live: bool, frozen: bool = False
) -> tuple[dict[str, float], float]:
  """(bytes of a chip's memory by part, bytes of the host's memory), of what a step is given.

  Args:
    live: it is given a reference that stands still.
    frozen: it is given parameters that stand still, and adapters train.
  """
  state = program.state
  reference = program.reference if live or frozen or state.reference is not None else None
  names = ADAPTED if frozen else STATE
  parts = dict(zip(names, (state.params, state.opt_state, state.ema, reference), strict=True))
  near: dict[str, float] = {name: bytes_of(tree) for name, tree in parts.items()}
  far = sum(bytes_of(tree, host=True) for tree in parts.values())
  return {name: size for name, size in near.items() if size}, far


def bytes_of(tree: Any, *, host: bool = False) -> int:
  """Of a chip's shards of placed shapes, in its own memory or in the host's."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if (x.sharding.memory_kind == 'pinned_host') == host
  )


def temporaries(
  model: Model, given: Sizes, mesh: Mapping[str, int], trained: int
) -> dict[str, float]:
  """Bytes of a chip's memory that a step needs on top of its state, by part.

  `trained`: how many parameters have a gradient.
  """
  c, width = model.config, np.dtype(model.dtype).itemsize
  tensor, shards = mesh['tensor'], mesh['fsdp'] * mesh['tensor']
  tokens = given.tokens / mesh['context']
  layer = sum(x.size for x in jax.tree.leaves(model.param_shapes()['layers'])) / c.num_layers
  inner, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  said = c.num_labels or c.vocab_size
  mlp = c.mlp_width * max(1, c.experts_per_token)
  outputs = (inner + 2 * keys + (1 + c.gated) * mlp) / tensor + 2 * c.width
  everything = 2 * outputs + 4 * c.width
  dots = outputs + c.width
  kept = {None: dots + inner / tensor, 'dots': dots, 'full': c.width, 'offload': 0}[model.remat]
  return {
    'gradients': 4 * trained / shards * (2 if given.microbatches > 1 else 1),
    'activations': tokens * width * kept * c.num_layers,
    'a layer at work': 2 * tokens * width * everything + 2 * layer * width / tensor,
    'the head': (
      (3 * min(given.chunk, given.scored) + model.keep_logits * given.scored) * 4 * said / tensor
      + 2 * width * c.width * said / tensor
    ),
  }


def flops(
  model: Model | ActorCritic, batch: Batch, chips: int, *, live: bool, frozen: bool = False
) -> tuple[float, float]:
  """(FLOPs of a chip, those of them that are useful): recomputation and a reference are not.

  Weights that are `frozen`, with adapters beside them, need no product for their gradient.
  """
  actor = policy_of(model)
  todo = work(batch)
  useful = train_flops(actor, todo, frozen=frozen) / chips
  padded = todo._replace(tokens=todo.computed)
  body = padded.tokens * actor.flops_per_token(todo.context)
  projections = padded.tokens * actor.flops_per_token(0)
  again = {None: 0.0, 'dots': body - projections, 'full': body, 'offload': body}[actor.remat]
  head = todo.scored * actor.head_flops_per_token
  total = 3 * body + again + (4 - actor.keep_logits) * head + (body + head if live else 0)
  total -= projections + head if frozen else 0
  if isinstance(model, ActorCritic) and not model.shared:
    total += 3 * padded.tokens * model.critic.flops_per_token(todo.context) + again
  return total / chips, useful


def messages(
  model: Model,
  given: Sizes,
  mesh: Mapping[str, int],
  trained: int,
  *,
  live: bool,
  slices: int = 1,
) -> list[Collective]:
  """Weights are gathered for each pass over them and gradients summed once; with `tensor`, the
  output of every sub-layer is summed forward, and the gradient of its input backward; with
  `context`, keys and values are gathered in each pass, and their gradients scattered."""
  c, width = model.config, np.dtype(model.dtype).itemsize
  count = sum(x.size for x in jax.tree.leaves(model.param_shapes())) / mesh['tensor']
  states = given.tokens / mesh['context'] * c.width * width
  keys = 2 * given.tokens * c.num_kv_heads * c.head_dim * width / mesh['tensor']
  passes, groups = given.microbatches, mesh['fsdp'] * mesh['data'] * mesh['context']
  found = [
    Collective('all-gather', (), width * count, mesh['fsdp'], passes * (2 + live)),
    Collective('all-reduce', (), width * trained / mesh['tensor'], groups, passes, slices=slices),
    Collective('all-reduce', (), states, mesh['tensor'], passes * (4 + 2 * live) * c.num_layers),
    Collective('all-gather', (), keys, mesh['context'], passes * (2 + live) * c.num_layers),
    Collective('reduce-scatter', (), keys, mesh['context'], passes * c.num_layers),
  ]
  return [one for one in found if one.group > 1]
