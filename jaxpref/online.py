"""Runs on a policy's own samples: the feed of `jaxpref train` with rewards."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from ml_collections import ConfigDict

from jaxpref import advantages, data, hosts, rewards, roles, sharding, stops
from jaxpref.evals.sampled import sampled
from jaxpref.limits import check_numbers, sampling_of
from jaxpref.log_probs import DIVERGENCES, ActorCritic, policy_of, policy_params
from jaxpref.models import Lora, Model, brought_in, without
from jaxpref.objectives import Objective
from jaxpref.offline import check_vocabulary, describe, with_held_out
from jaxpref.rollout import estimators
from jaxpref.rollout.prompts import Prompts, load_prompts
from jaxpref.rollout.rounds import Rounds
from jaxpref.rollout.samples import Sampler, Scorer
from jaxpref.rollout.source import Online
from jaxpref.rollout.tables import Tables
from jaxpref.train import anchor, critics, lora, policy, reward_models
from jaxpref.train.feed import Feed, Opened
from jaxpref.train.state import TrainState
from jaxpref.typing import Params


def prepare(
  config: ConfigDict,
  objective: Objective,
  tokenizer: data.Tokenizer,
  mesh: jax.sharding.Mesh,
  console: rich.console.Console,
) -> Feed:
  """The feed of `config.rewards` and `config.rollout`."""
  c = config.rollout
  if config.reference_sync.every:
    raise ValueError(
      'config.reference_sync moves a reference that samples are compared with; with rewards it '
      'stands still: set reference_sync.every=0'
    )
  check_numbers(config)
  whole, adapted = lora.whole_of(config), lora.chosen(config)
  own = roles.divide(config, mesh)
  terms = rewards.parse(config.rewards, more=reward_models.makers(own.rewards, tokenizer))
  estimator = estimators.parse(c.advantages)
  groups = sharding.groups(mesh)
  rounds = rounds_of(config, groups)
  check_rewards(c, estimator)
  check_by_prompt(config, terms, estimator)
  critics.check_values(c, objective, estimator)
  train_prompts, eval_prompts = load_both(config, tokenizer)
  steps = config.steps or max(1, round(config.epochs * len(train_prompts) / c.prompts)) * (
    rounds.steps
  )
  actor = describe(config, tokenizer)
  policy.check_writes(config.model, actor)
  check_vocabulary(config, actor, tokenizer)
  if c.critic not in ('', critics.SHARED, config.model):
    critics.check(c.critic, tokenizer)
  model = critics.with_critic(
    config, actor, functools.partial(policy.describe, tokenizer=tokenizer)
  )
  place = functools.partial(hosts.place, sharding=sharding.batch_sharding(mesh))
  sampler = sampler_of(config, actor, train_prompts, tokenizer, own.sampler)
  held = None
  if eval_prompts is not None:
    held = dataclasses.replace(
      sampler,
      prompts=eval_prompts,
      num_samples=config.eval.samples,
      slots=0,
      sampling=sampling_of(config, 'eval'),
    )
  scorer = Scorer(terms, tokenizer, timeout=c.timeout, missing_eos=c.missing_eos, stop=c.stop)
  narrow = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(actor.dtype), brought_in(params)))

  def cast(params: Params) -> Params:
    home = own.reference if params is source.reference else mesh
    with jax.set_mesh(home):
      copy = narrow(params)
    if own.sampler is home:
      return copy
    return jax.device_put(copy, sharding.params_sharding(own.sampler, copy))

  controller = advantages.fixed_kl
  if c.kl_target:
    controller = advantages.adaptive_kl(c.kl_target, c.kl_horizon)

  def load() -> Params:
    where = functools.partial(sharding.params_sharding, mesh)
    _, params = policy.load(config.model, tokenizer, config.seed, where(actor.param_shapes()))
    if not isinstance(model, ActorCritic):
      return params
    if model.shared:
      critic = policy.new_scores(model.critic, place=where)
    else:
      critic = policy.load_scored(c.critic or config.model, tokenizer, config.seed, where)[1]
    return {'policy': params, 'critic': critic}

  tables = Tables(c.show, console)
  source = Online(
    model,
    objective,
    sampler,
    scorer,
    estimator,
    rounds,
    reference_mesh=None if own.reference is mesh else own.reference,
    beta=c.kl,
    controller=controller,
    cast=cast,
    show=tables,
    place=place,
  )

  live = anchor.in_state(config, objective)
  check_roles(own, rounds, source.needs_reference, objective, terms)

  def open_feed(state: TrainState, reference: Params | None, folder: Path) -> Opened:
    if own.reference is not mesh and reference is not None:
      reference = jax.device_put(reference, sharding.params_sharding(own.reference, reference))
    source.reference = None if adapted else reference  # then it is in what trains
    tables.open(folder, int(state.carry['rollout']))
    if live and not adapted:  # the step donates its state, hence a copy
      state = state._replace(
        reference=jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), reference)
      )
    evaluate = None
    if held is not None:
      size = -(-min(c.prompts, len(held.prompts)) // groups) * groups
      measure = sampled(held, scorer, size, cast=cast)

      def evaluate(state: TrainState) -> dict[str, float]:
        params = policy_params(whole(state))
        return measure(params, without(params) if adapted else reference)

    return Opened(state, source, evaluate)

  held_out = f', {len(eval_prompts):,} held out' if eval_prompts is not None else ''
  return Feed(
    model=model,
    load=load,
    steps=steps,
    fingerprint=train_prompts.fingerprint,
    summary=(
      f'prompts    {config.data.train}: {len(train_prompts):,}{held_out}; at most '
      f'{train_prompts.longest} tokens',
      f'rewards    {config.rewards}; advantages {c.advantages}',
      f'rollouts   {c.prompts} prompts x {c.samples} samples of at most {c.max_new_tokens} tokens, '
      f'{rounds.steps} step{"s" * (rounds.steps > 1)} on each; {steps} steps in all',
      f'devices    {own}',
      memory(model, adapted, source.needs_reference, sampler, c.prompts, terms),
    ),
    origin='rollout row {}'.format,
    needs_reference=source.needs_reference or live,
    live=live,
    carry=source.begin(),
    open=open_feed,
  )


def rounds_of(config: ConfigDict, groups: int) -> Rounds:
  """How `config` cuts a rollout into steps on so many data groups."""
  c = config.rollout
  return Rounds(
    prompts=c.prompts,
    epochs=c.epochs,
    minibatches=c.minibatches,
    ahead=c.ahead,
    tries=c.tries,
    mask_truncated=c.mask_truncated,
    importance_cap=c.importance_cap,
    target_kl=c.target_kl,
    seed=config.seed,
    microbatches=config.batch.microbatches,
    shards=groups,
    row_length=max(config.batch.row_lengths, default=0),
  )


def sampler_of(
  config: ConfigDict,
  actor: Model,
  prompts: Prompts,
  tokenizer: data.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> Sampler:
  """What completes `prompts` in training."""
  c = config.rollout
  return Sampler(
    actor,
    prompts,
    c.samples,
    c.max_new_tokens,
    slots=c.slots,
    sampling=sampling_of(config, 'rollout'),
    stop_ids=tuple(sorted(tokenizer.stop_ids)),
    stops=stops.automaton(c.stop, tokenizer.pieces) if c.stop else None,
    seed=config.seed,
    mesh=mesh,
  )


def check_roles(
  own: roles.Roles,
  rounds: Rounds,
  needs_reference: bool,
  objective: Objective,
  terms: Sequence[rewards.Term],
) -> None:
  """Raises ValueError for devices that would have nothing to do, or not enough each."""
  if rounds.prompts % sharding.groups(own.sampler):
    raise ValueError(
      f'rollout.prompts={rounds.prompts} must be a multiple of the {sharding.groups(own.sampler)} '
      'groups of devices that sample'
    )
  if own.rewards is not own.training and not any(term.traits.nbytes for term in terms):
    raise ValueError(
      f'rollout.reward_devices={own.rewards.size}, and no reward is a model that lives on devices'
    )
  if own.reference is own.training:
    return
  count = own.reference.size
  if objective.fields & DIVERGENCES.keys():
    raise ValueError(
      f'rollout.reference_devices={count}: {sorted(objective.fields & DIVERGENCES.keys())} compare '
      'whole vocabularies in the train step, so the reference stays with the policy; set it to 0'
    )
  if not needs_reference:
    raise ValueError(f'rollout.reference_devices={count}, and nothing reads a reference')
  cells = rounds.minibatches * rounds.microbatches * sharding.groups(own.reference)
  if rounds.prompts % cells:
    raise ValueError(
      f'rollout.prompts={rounds.prompts} must be a multiple of minibatches * microbatches * '
      f'reference_devices = {rounds.minibatches} * {rounds.microbatches} * {count}'
    )


def load_both(config: ConfigDict, tokenizer: data.Tokenizer) -> tuple[Prompts, Prompts | None]:
  """(training prompts, held-out prompts or None) of `config.data`."""
  c = config.data
  if not c.train:
    raise ValueError('config.data.train is empty; give a source, such as jsonl:prompts.jsonl')
  load = functools.partial(
    load_prompts,
    tokenizer=tokenizer,
    columns=c.columns,
    max_length=c.max_length,
    on_error=c.on_error,
    seed=config.seed,
  )
  return with_held_out(config, load, 'prompts')


def check_rewards(c: ConfigDict, estimator: Any) -> None:
  """Raises ValueError for what the advantages cannot do, or would leave without effect."""
  if getattr(estimator, 'group', False) and c.samples < 2:
    raise ValueError(
      f'rollout.advantages={c.advantages} compares the samples of a prompt, and '
      f'rollout.samples={c.samples}: take at least 2, or whitened_returns() or gae()'
    )
  if c.kl_target and not c.kl:
    raise ValueError('rollout.kl_target steers rollout.kl, which is 0: give it a first value')
  ignored = [f'rollout.{key}={c[key]:g}' for key in ('kl', 'missing_eos') if c[key]]
  if isinstance(estimator, estimators.each_reward) and ignored:
    raise ValueError(
      f'rollout.advantages={c.advantages} compares every reward by itself, so nothing would come '
      f'of {", ".join(ignored)}: set it to 0; the loss may have the KL, as in grpo() + 0.04*kl(), '
      'and rollout.mask_truncated leaves out what was cut off'
    )
  if c.target_kl and c.epochs < 2:
    raise ValueError(
      f'rollout.target_kl={c.target_kl:g} ends further passes over a rollout, and '
      f'rollout.epochs={c.epochs}: take more, or set it to 0'
    )
  if c.tries > 1 and c.samples < 2:
    raise ValueError(
      f'rollout.tries={c.tries} looks for prompts whose samples differ in reward, and '
      f'rollout.samples={c.samples}: take at least 2, or tries=1'
    )


def check_by_prompt(config: ConfigDict, terms: Sequence[rewards.Term], estimator: Any) -> None:
  """Raises ValueError for rewards that compare samples of a prompt where there is one."""
  counts = {'rollout.samples': config.rollout.samples}
  if config.data.eval or config.data.eval_fraction:
    counts['eval.samples'] = config.eval.samples
  single = [f'{key}={count}' for key, count in counts.items() if count < 2]
  for term in terms:
    if not term.traits.by_prompt:
      continue
    if getattr(estimator, 'greedy', False):
      raise ValueError(
        f'{term} compares the samples of a prompt, and rollout.advantages='
        f'{config.rollout.advantages} scores one greedy completion alone: take leave_one_out()'
      )
    if single:
      raise ValueError(f'{term} compares the samples of a prompt, and {single[0]}: take at least 2')


def memory(
  model: Model | ActorCritic,
  adapted: Lora | None,
  reference: bool,
  sampler: Sampler,
  prompts: int,
  terms: Sequence[rewards.Term],
) -> str:
  """A line on what a run holds, over all devices."""
  actor = policy_of(model)
  split = functools.partial(lora.split, adapted, seed=0, dtype=actor.dtype)
  still, trained = jax.eval_shape(split, model.param_shapes())
  size = lambda shapes: sum(x.size for x in jax.tree.leaves(shapes))  # noqa: E731
  own, critic = size(actor.param_shapes()), 0
  if isinstance(model, ActorCritic):
    critic = size(trained['critic'])
  trained = size(trained)
  slots = sampler.slots or prompts * sampler.num_samples
  width = np.dtype(actor.dtype).itemsize
  parts = {
    'parameters': 4 * (trained - critic),
    'critic': 4 * critic,
    'optimizer': 8 * trained,
    'gradients': 4 * trained,
    'frozen': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(still)),
    'reference': 4 * own * (reference and not adapted),
    'rewards': sum(term.traits.nbytes for term in terms),
    'sampler': own * width * (actor.dtype != jnp.float32),
    f'cache of {slots} slots': sampler.cache_bytes(prompts),
  }
  listed = ', '.join(f'{name} {bytes_ / 2**20:,.1f}' for name, bytes_ in parts.items() if bytes_)
  return f'memory     MiB: {listed}; activations come on top'
