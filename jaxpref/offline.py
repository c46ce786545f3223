"""Runs on a fixed data set: the feed of `jaxpref train` without rewards."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import rich.console
from ml_collections import ConfigDict

from jaxpref import data, hosts, sharding
from jaxpref.data.batches import Batches, Packing
from jaxpref.evals.heldout import heldout
from jaxpref.log_probs import FIELDS, REWARDS
from jaxpref.models import Model, default_dtype, row_attention
from jaxpref.objectives import Objective
from jaxpref.train import anchor, lora, normalisation, policy
from jaxpref.train.feed import Feed, Opened
from jaxpref.train.loop import Offline
from jaxpref.train.state import TrainState
from jaxpref.typing import Params


def prepare(
  config: ConfigDict,
  objective: Objective,
  tokenizer: data.Tokenizer,
  mesh: jax.sharding.Mesh,
  console: rich.console.Console,
) -> Feed:
  """The feed of `config.data`."""
  anchor.check_read(config, objective)
  train_set, eval_set = load_data(config, tokenizer)
  train_set = with_mismatched(train_set, objective, config.seed)
  if eval_set is not None:
    eval_set = with_mismatched(eval_set, objective, config.seed)
  size, micro, groups = config.batch.size, config.batch.microbatches, sharding.groups(mesh)
  steps = config.steps or max(1, round(config.epochs * len(train_set) / size))
  model = with_scores(config, objective, describe(config, tokenizer))
  scores = REWARDS in objective.fields
  check_fits(config, model, tokenizer, train_set)
  packing = Packing(row_lengths=tuple(config.batch.row_lengths))
  batches = Batches(train_set, size, config.seed, micro, groups, packing)
  place = functools.partial(hosts.place, sharding=sharding.batch_sharding(mesh))
  whole = lora.whole_of(config)

  def load() -> Params:
    where = functools.partial(sharding.params_sharding, mesh)
    if scores:
      return policy.load_scored(config.model, tokenizer, config.seed, where, config.heads)[1]
    return policy.load(config.model, tokenizer, config.seed, where(model.param_shapes()))[1]

  def tables(reference: Params | None, dataset: data.Dataset) -> dict:
    if reference is None or config.reference == 'live':
      return {}
    return {'ref_logps': anchor.reference_table(console, model, reference, mesh, dataset)}

  def open_feed(state: TrainState, reference: Params | None, _: pathlib.Path) -> Opened:
    if reference is not None and config.reference == 'live':
      state = state._replace(reference=reference)
    source = dataclasses.replace(batches, tables=tables(reference, train_set))
    evaluate = None
    if eval_set is not None:
      held = -(-min(size, len(eval_set)) // groups) * groups
      passes = Batches(eval_set, held, None, 1, groups, packing, tables(reference, eval_set))
      measure = heldout(model, objective, passes, place=place)
      evaluate = lambda state: measure(whole(state), state.reference, state.memory)  # noqa: E731
    return Opened(state, Offline(source, steps), evaluate, normalise if scores else None)

  def normalise(state: TrainState, workdir: pathlib.Path) -> None:
    if normalisation.of_step(workdir, int(state.step)) is None:
      passes = normalisation.reference_batches(train_set, size, groups, packing)
      found = normalisation.measure(model, whole(state), passes, int(state.step), place=place)
      normalisation.write(workdir, found)
      console.print(
        f'scores have {found} on {found.completions:,} completions of the training data'
      )

  return Feed(
    model=model,
    load=load,
    steps=steps,
    fingerprint=train_set.fingerprint,
    summary=(*_summary(config, train_set, eval_set), f'steps      {steps} of {size} examples'),
    origin=train_set.origin,
    needs_reference=anchor.is_read(objective),
    live=anchor.in_state(config, objective),
    carry=None,
    open=open_feed,
  )


def describe(config: ConfigDict, tokenizer: data.Tokenizer) -> Model:
  """The model of `config`, as `configured` has it here."""
  return configured(config, policy.describe(config.model, tokenizer), jax.default_backend())


def configured(config: ConfigDict, model: Model, platform: str) -> Model:
  """`model` with the dtype of `config`, how it attends and what it keeps for the gradient.

  `platform`: what it will run on, 'cpu', 'gpu' or 'tpu'.
  """
  if config.attention == 'kernel' and config.mesh.context != 1:
    raise ValueError("config.attention='kernel' reads whole rows; set config.mesh.context=1")
  return model.replace(
    dtype=default_dtype(platform) if config.dtype == 'auto' else config.dtype,
    remat=config.remat or None,
    keep_logits=config.keep_logits,
    temperature=config.temperature,
    attention=row_attention(config.attention, platform),
  )


def with_scores(config: ConfigDict, objective: Objective, model: Model) -> Model:
  """`model` with the scores that `objective` trains, in place of its head, or as it is."""
  scores = REWARDS in objective.fields
  if config.heads < 1 or (config.heads > 1 and not scores):
    raise ValueError(
      f'config.heads={config.heads}: how many scores a reward model has, 1 or more; and '
      f'objective={objective} {"trains one" if scores else "reads no rewards"}'
    )
  model = policy.scored(model, config.heads) if scores else model
  check_head(config, objective, model)
  return model


def load_data(
  config: ConfigDict, tokenizer: data.Tokenizer
) -> tuple[data.Dataset, data.Dataset | None]:
  """(training set, held-out set or None) of `config.data`."""
  c = config.data
  if not c.train:
    raise ValueError('config.data.train is empty; give a source, such as jsonl:pairs.jsonl')
  load = functools.partial(
    data.load,
    tokenizer=tokenizer,
    kind=c.kind,
    columns=c.columns,
    max_length=c.max_length,
    truncate=c.truncate,
    on_error=c.on_error,
    seed=config.seed,
  )
  return with_held_out(config, load, 'examples')


def with_held_out(config: ConfigDict, load: Callable[[str], Any], what: str) -> tuple[Any, Any]:
  """(training set, held-out set or None) of `config.data`, whose sources `load` reads."""
  c = config.data
  train_set = load(c.train)
  if c.eval:
    return train_set, load(c.eval)
  if not c.eval_fraction:
    return train_set, None
  train_set, eval_set = train_set.split(c.eval_fraction, config.seed)
  if not len(train_set) or not len(eval_set):
    raise ValueError(
      f'config.data.eval_fraction={c.eval_fraction} leaves {len(train_set)} {what} to train on '
      f'and {len(eval_set)} to evaluate; give config.data.eval, or another fraction'
    )
  return train_set, eval_set


def with_mismatched(dataset: data.Dataset, objective: Objective, seed: int) -> data.Dataset:
  """The data set, with completions of other prompts where the objective reads them."""
  return data.mismatched(dataset, seed) if 'mismatched' in objective.fields else dataset


def check_head(config: ConfigDict, objective: Objective, model: Model) -> None:
  """Raises ValueError where log-probs are read of a model that has scores in place of its head."""
  reads = sorted(objective.fields & FIELDS.keys())
  if not model.config.num_labels or not reads:
    return
  if REWARDS in objective.fields:
    raise ValueError(
      f'{objective} reads rewards, so a score takes the place of the head: there is no {reads}'
    )
  raise ValueError(f'{config.model} is a reward model: it has scores, there is no {reads}')


def check_fits(
  config: ConfigDict, model: Model, tokenizer: data.Tokenizer, dataset: data.Dataset
) -> None:
  """Raises ValueError where tokens or positions of the data are beyond what the model knows."""
  check_vocabulary(config, model, tokenizer)
  longest = int((dataset.lengths[:, :1] + dataset.lengths[:, 1:]).max())
  limit = model.config.position_limit
  if limit is not None and longest > limit:
    raise ValueError(
      f'the data holds sequences of {longest} tokens, but {config.model} knows {limit} positions; '
      'set config.data.max_length to at most that'
    )


def check_vocabulary(config: ConfigDict, model: Model, tokenizer: data.Tokenizer) -> None:
  """Raises ValueError where the tokenizer has tokens that the model does not know."""
  vocabulary = model.config.vocab_size
  if tokenizer.vocab_size > vocabulary:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model} only '
      f'{vocabulary}; give the tokenizer that belongs to the model as config.tokenizer'
    )


def _summary(
  config: ConfigDict, train_set: data.Dataset, eval_set: data.Dataset | None
) -> tuple[str]:
  report = ', '.join(f'{k} {v:,}' for k, v in train_set.report.items() if isinstance(v, int) and v)
  lengths = train_set.lengths.sum(1)
  held = f', {len(eval_set):,} held out' if eval_set is not None else ''
  return (
    f'data       {config.data.train}: {train_set.kind}, {len(train_set):,} examples{held}; '
    f'{lengths.mean():.0f} tokens an example, at most {lengths.max()} ({report})',
  )
