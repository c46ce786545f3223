"""What `config.lora` makes of a run: its state trains adapters, its reference is what they adapt.

`TrainState.params` are then the adapters, the scores of a reward model and a critic; everything
else stands still in `TrainState.reference`, which is both what they adapt and, the same model
without them, the reference of DPO or of a KL penalty. It is saved once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpref import hosts, sharding
from jaxpref.log_probs import policy_params
from jaxpref.models import Lora, merged
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.state import TrainState
from jaxpref.typing import Params

FOLD = 0x10AA  # of a run's seed: the key that adapters are drawn from
OWN = ('score',)  # trains beside adapters: it is new


def chosen(config: ConfigDict) -> Lora | None:
  """The adapters that `config` trains; None where it trains the parameters themselves.

  Raises:
    ValueError: settings that cannot be, or that ask for a reference other than what is adapted.
  """
  c = config.lora
  if not c.rank:
    return None
  alone = 'with config.lora the reference is the model without its adapters: '
  if config.reference_sync.every:
    raise ValueError(f'{alone}it cannot follow; set config.reference_sync.every=0')
  if config.reference_memory != 'device':
    raise ValueError(f"{alone}it is always at work; set config.reference_memory='device'")
  if config.rollout.reference_devices:
    raise ValueError(f'{alone}it lives where the policy does; set rollout.reference_devices=0')
  return Lora(c.rank, float(c.alpha), tuple(c.targets))


def split(lora: Lora | None, params: Params, seed: int, dtype: Any) -> tuple[Params, Params]:
  """(what stands still, what trains) of a run's first parameters, a policy's or with a critic.

  Weights that stand still are kept in `dtype` where that is narrower: it is what they are computed
  in. Without `lora` nothing stands still.
  """
  if lora is None:
    return {}, params
  policy = policy_params(params)
  adapters = lora.init(policy, jax.random.fold_in(jax.random.key(seed), FOLD))
  trained = adapters | {name: policy[name] for name in OWN if name in policy}

  def kept(path: tuple, x: jax.Array) -> jax.Array:
    narrower = sharding.path_of(path).endswith('w') and jnp.dtype(dtype).itemsize < x.dtype.itemsize
    return x.astype(dtype) if narrower else x

  base = {name: part for name, part in policy.items() if name not in trained or name == 'layers'}
  base = jax.tree_util.tree_map_with_path(kept, base)
  return base, trained if policy is params else {**params, 'policy': trained}


def joined(lora: Lora | None, base: Params | None, trained: Params) -> Params:
  """Parameters for the model to run with, of what stands still and what trains."""
  if lora is None:
    return trained
  assert base is not None
  policy = policy_params(trained)
  whole = lora.join(base, policy)
  return whole if policy is trained else {**trained, 'policy': whole}


def whole_of(config: ConfigDict) -> Callable[[TrainState], Params]:
  """state -> parameters for the model to run with."""
  lora = chosen(config)
  return lambda state: joined(lora, state.reference, state.params)


def restored(
  checkpoints: Checkpoints,
  config: ConfigDict,
  step: int | None = None,
  *,
  ema: bool = False,
  shardings: Params | None = None,
) -> Params:
  """A run's policy, dense: adapters that it trained are merged into float32 weights.

  Args:
    config: the run's.
    step: of its checkpoints, by default the newest that can be read.
    ema: the running average instead.
    shardings: a tree like the policy's parameters; None: arrays on the default device.
  """
  lora = chosen(config) if 'lora' in config else None
  if lora is None:
    found = checkpoints.restore_policy(step, ema=ema, shardings=shardings)
    return jax.tree.map(jnp.asarray, found)
  trained = checkpoints.restore_policy(step, ema=ema)
  if shardings is None:
    base = jax.tree.map(jnp.asarray, checkpoints.restore_reference())
    return merged(lora.join(base, jax.tree.map(jnp.asarray, trained)))
  base = checkpoints.restore_reference({k: v for k, v in shardings.items() if k not in OWN})
  where = sharding.params_sharding(jax.tree.leaves(shardings)[0].mesh, trained)
  trained = hosts.place(trained, where)
  return jax.jit(lambda *parts: merged(lora.join(*parts)), out_shardings=shardings)(base, trained)


def summary(lora: Lora, trained: Params, params: Params) -> str:
  """A line on what trains."""
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  return (
    f'adapters   rank {lora.rank}, alpha {lora.alpha:g}, on {" ".join(lora.targets)}: '
    f'{size(trained):,} parameters train, beside {size(params):,}'
  )
