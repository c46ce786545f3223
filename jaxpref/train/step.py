"""One optimizer step: (state, batch, hparams) -> (state, metrics), a pure function.

Gradients are exact for any number of microbatches. Objectives are sums of terms over a norm that
depends on the batch only, so norms are added over all microbatches first and every microbatch then
contributes its share. A coupled objective needs all fields at once: one scan computes them
forward, the objective gives value and cotangents over the global batch, a second scan pulls the
cotangents back.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.log_probs import (
  CHUNK,
  DIVERGENCES,
  DRAWN,
  KNOWN,
  ActorCritic,
  log_probs,
  logp_difference,
  stacked,
)
from jaxpref.models import Lora, Model, brought_in
from jaxpref.objectives import Memory, Objective, reduce_metrics
from jaxpref.train.anchor import Sync, attach
from jaxpref.train.lora import joined
from jaxpref.train.optimizer import Optimizer, Scalars, ema_update, global_norm
from jaxpref.train.state import TrainState
from jaxpref.typing import Array, Batch, Params

Forward = Callable[[Params, Batch], dict[str, Array]]
WORST = 8  # examples named by a step


class Hparams(NamedTuple):
  """Everything numeric that a run may vary without compiling again.

  `optimizer` holds learning_rate, weight_decay, b1, b2, eps, clip; numbers or schedules. `ema` is
  the running average's decay. `sync` moves a live reference; None leaves it where it is.
  """

  objective: Objective
  optimizer: Scalars
  ema: Any = 0.999
  sync: Sync | None = None


def model_fields(
  objective: Objective, supplied: Sequence[str], *, live: bool = False
) -> tuple[str, ...]:
  """The fields that the model must compute; `live`: its reference is at hand.

  Raises:
    ValueError: for a field that neither the data nor the model supplies, saying who asked.
  """
  missing = sorted(objective.fields - set(supplied) - ({'ref_logps'} if live else set()))
  lacking = [name for name in missing if name not in KNOWN]
  if not live and (over := [name for name in missing if name in DIVERGENCES]):
    raise ValueError(
      f"objective {objective} needs {over}, divergences over the vocabulary: set reference='live', "
      "as a table holds the reference's log-probs of the tokens alone"
    )
  if lacking:
    raise ValueError(
      f'objective {objective} needs {lacking}, which neither the data ({sorted(supplied)}) '
      f'nor the model ({sorted(KNOWN)}) supplies'
    )
  return tuple(missing)


def reported(model: Model | ActorCritic) -> tuple[str, ...]:
  """The model fields worth a look whatever the objective reads; a model that scores has none."""
  return () if model.config.num_labels else ('entropy',)


def make_step(
  model: Model | ActorCritic,
  optimizer: Optimizer,
  *,
  extra: Sequence[str] = (),
  chunk: int = CHUNK,
  lora: Lora | None = None,
) -> Callable[[TrainState, Batch, Hparams], tuple[TrainState, dict[str, Any]]]:
  """The train step of `model`; jit it with the state donated.

  Args:
    extra: model fields (such as 'entropy') to compute for their own sake; reported as their mean.
    chunk: scored tokens that meet the LM head at once.
    lora: how the state's parameters join its reference, where they are adapters.

  Returns:
    step(state, batch, hparams) -> (state, metrics). Metrics are float32 scalars over the global
    batch, and 'worst': ids and losses of the `WORST` examples with the highest loss. A step whose
    loss or gradient is not finite leaves parameters, moments and average as they were and counts
    in `state.skipped`.
  """

  def step(state: TrainState, batch: Batch, hparams: Hparams) -> tuple[TrainState, dict[str, Any]]:
    objective = hparams.objective
    names = model_fields(objective, tuple(batch.fields), live=state.reference is not None)
    fields = tuple(dict.fromkeys((*names, *extra)))
    reference = brought_in(state.reference)
    batch = _complete(model, objective, reference, batch, chunk)
    whole = functools.partial(joined, lora, reference)
    forward = functools.partial(_forward, model, fields, chunk, reference, whole)
    gradients = coupled_gradients if objective.coupled else separable_gradients
    loss, grads, metrics, outputs = gradients(
      forward, objective, optimizer.trainable, state.params, batch, state.step, state.memory
    )
    norm = global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    tx = optimizer.transform(hparams.optimizer, state.step, state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, updates)
    ema = None if state.ema is None else ema_update(state.ema, params, hparams.ema)
    data = _merge(batch.fields, 3)
    scalars: dict[str, Any] = dict(reduce_metrics(metrics))
    memory = objective.update(state.memory, scalars, state.step)
    old = (state.params, state.opt_state, state.ema, state.memory)
    params, opt_state, ema, memory = _choose(finite, (params, opt_state, ema, memory), old)
    kept = state.reference
    if hparams.sync is not None:
      kept = hparams.sync(state.step, finite, params, reference)
    mask = data['mask']
    for name in extra:
      scalars[name] = jnp.sum(outputs[name]) / jnp.maximum(jnp.sum(mask), 1)
    if DRAWN in data and 'logps' in outputs:
      scalars |= logp_difference(data[DRAWN], outputs['logps'], mask)
    rate = hparams.optimizer['learning_rate']
    skipped = jnp.where(finite, 0, state.skipped + 1).astype(jnp.int32)
    scalars |= {
      'loss': loss,
      'grad_norm': norm,
      'learning_rate': jnp.asarray(rate(state.step) if callable(rate) else rate, jnp.float32),
      'skipped': skipped,
      'worst': _worst(metrics['loss'].values, data['ids']),
    }
    new = TrainState(state.step + 1, params, opt_state, ema, skipped, kept, memory)
    return new, scalars

  return step


def make_fields(
  model: Model, objective: Objective, *, extra: Sequence[str] = (), chunk: int = CHUNK
) -> Callable[[Params, Params | None, Batch], dict[str, Array]]:
  """fields(params, reference, batch): what `objective` reads and `extra`, [M*G*B, ...].

  The data's and the model's fields, without a gradient; `reference` as in `TrainState`.
  """

  def fields(params: Params, reference: Params | None, batch: Batch) -> dict[str, Array]:
    names = model_fields(objective, tuple(batch.fields), live=reference is not None)
    names = tuple(dict.fromkeys((*names, *extra)))
    reference = brought_in(reference)
    batch = _complete(model, objective, reference, batch, chunk)
    outputs = stacked(model, params, batch, names, chunk=chunk, reference=reference)
    return _merge(batch.fields | outputs, 3)

  return fields


def separable_gradients(
  forward: Forward,
  objective: Objective,
  trainable: Callable,
  params: Params,
  batch: Batch,
  step: Array,
  memory: Memory,
) -> tuple[Array, Params, dict[str, Any], dict[str, Array]]:
  """(loss, gradients, metrics, outputs): norms of the whole batch first, then one scan."""
  norms = objective.norms(_merge(batch.fields, 3), step)

  def share(params: Params, micro: Batch) -> tuple[Array, Any]:
    outputs = forward(trainable(params), micro)
    loss, metrics = objective.partial(_merge(micro.fields, 2) | outputs, norms, step, memory)
    return loss, (metrics, outputs)

  def body(carry: tuple[Array, Params], micro: Batch) -> tuple[tuple[Array, Params], Any]:
    (loss, aux), grads = jax.value_and_grad(share, has_aux=True)(params, micro)
    return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], grads)), aux

  zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
  if batch.fields['mask'].shape[0] == 1:
    (loss, (metrics, outputs)), grads = jax.value_and_grad(share, has_aux=True)(
      params, jax.tree.map(lambda x: x[0], batch)
    )
    return loss, grads, metrics, outputs
  (loss, grads), (metrics, outputs) = jax.lax.scan(body, zero, batch)
  return loss, grads, _merge(metrics, 2), _merge(outputs, 2)


def coupled_gradients(
  forward: Forward,
  objective: Objective,
  trainable: Callable,
  params: Params,
  batch: Batch,
  step: Array,
  memory: Memory,
) -> tuple[Array, Params, dict[str, Any], dict[str, Array]]:
  """The same for an objective that mixes examples: fields, value and cotangents, then their vjp.

  Between the scans over microbatches only fields [B, K, T] are kept, and accumulating costs one
  extra forward pass; a single microbatch keeps its activations instead.
  """
  data = _merge(batch.fields, 3)

  def value(outputs: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
    fields = data | outputs
    return objective.partial(fields, objective.norms(fields, step), step, memory)

  def pullback(micro: Batch) -> tuple[dict[str, Array], Callable]:
    return jax.vjp(lambda p: forward(trainable(p), micro), params)

  if batch.fields['mask'].shape[0] == 1:
    outputs, pull = pullback(jax.tree.map(lambda x: x[0], batch))
    (loss, metrics), cotangents = jax.value_and_grad(value, has_aux=True)(outputs)
    return loss, pull(cotangents)[0], metrics, outputs

  _, pieces = jax.lax.scan(lambda _, micro: (None, forward(params, micro)), None, batch)
  outputs = _merge(pieces, 2)
  (loss, metrics), cotangents = jax.value_and_grad(value, has_aux=True)(outputs)
  cotangents = jax.tree.map(lambda x, piece: x.reshape(piece.shape), cotangents, pieces)

  def body(grads: Params, xs: tuple[Batch, dict[str, Array]]) -> tuple[Params, None]:
    micro, cotangent = xs
    return jax.tree.map(jnp.add, grads, pullback(micro)[1](cotangent)[0]), None

  zero = jax.tree.map(jnp.zeros_like, params)
  grads, _ = jax.lax.scan(body, zero, (batch, cotangents))
  return loss, grads, metrics, outputs


def _complete(
  model: Model | ActorCritic,
  objective: Objective,
  reference: Params | None,
  batch: Batch,
  chunk: int,
) -> Batch:
  """The batch with the log-probs of a live reference, where they are read and not there."""
  if 'ref_logps' not in objective.fields or 'ref_logps' in batch.fields:
    return batch
  return attach(model, reference, batch, chunk)


def _forward(
  model: Model | ActorCritic,
  names: tuple[str, ...],
  chunk: int,
  reference: Params | None,
  whole: Callable[[Params], Params],
  params: Params,
  micro: Batch,
) -> dict[str, Array]:
  """Model fields [G*B, K, T] of one microbatch."""
  values = log_probs(model, whole(params), micro, names, chunk=chunk, reference=reference)
  return _merge(values, 2)


def _merge(tree: Any, axes: int) -> Any:
  """Merges the leading `axes` axes of every array: [M, G, B, ...] -> [M*G*B, ...]."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)


def _choose(condition: Array, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _worst(losses: Array, ids: Array) -> dict[str, Array]:
  """Ids and losses of the examples with the highest loss; what is not finite comes first."""
  key = jnp.where(ids < 0, -jnp.inf, jnp.where(jnp.isfinite(losses), losses, jnp.inf))
  _, top = jax.lax.top_k(key, min(WORST, len(ids)))
  return {'ids': jnp.asarray(ids)[top], 'loss': losses[top]}
