"""Our side of the bench, a process of its own: `python -m tools.bench.ours job.json`."""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import data, models
from jaxpref.data.batches import Batches, stream
from jaxpref.data.examples import Example
from jaxpref.decoding import sample_groups
from jaxpref.log_probs import log_probs
from jaxpref.models import Model
from jaxpref.objectives import bradley_terry, dpo, kto, parse, sft
from jaxpref.rewards import Term
from jaxpref.rollout.estimators import group_baseline
from jaxpref.rollout.prompts import Prompts
from jaxpref.rollout.rounds import Rounds
from jaxpref.rollout.samples import Sampler, Scorer
from jaxpref.rollout.source import Online
from jaxpref.train import reference
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from jaxpref.typing import Params
from tools.bench.peers import protocol

Step = Callable[[Any], float]  # takes a batch, returns its loss
Turn = Callable[[], float | None]  # the next step, whatever its batch
Job = dict[str, Any]
Notes = dict[str, Any]  # what a worker finds out on its way


class Words:
  """Token ids as text that nothing ends."""

  stop_ids: tuple[int, ...] = ()

  def decode(self, ids: Sequence[int]) -> str:
    return protocol.spelt(ids)


def variety(prompts: Sequence[str], completions: Sequence[str], records: Any) -> list[float]:
  return protocol.variety(completions)


def example(record: dict[str, Any], *parts: str, **extras: float) -> Example:
  """A record of the job with these parts as its candidates, every token of theirs scored."""
  candidates = tuple(np.array(record[part], np.int32) for part in parts)
  scored = tuple(np.ones(len(candidate), bool) for candidate in candidates)
  return Example(np.array(record['prompt'], np.int32), candidates, scored, extras)


def dataset_of(job: Job, *parts: str) -> data.Dataset:
  return data.from_examples([example(pair, *parts) for pair in job['pairs']])


def stepping(batches: Batches, prepare: Callable, step: Step) -> Turn:
  """`step` on one batch after another, once a batch of every shape has been prepared."""
  for at in {batches.shape_of(i): i for i in range(len(batches))}.values():
    prepare(batches[at])
  ahead = stream(batches, 0, len(batches))
  return lambda: step(next(ahead)[1])


class Trainer:
  """Optimizer steps on a source's batches, each shape's program compiled when it first comes."""

  def __init__(self, job: Job, model: Model, params: Params, notes: Notes, objective, live=False):
    self.notes = notes
    self.optimizer = Optimizer()
    self.hparams = Hparams(objective, job['optimizer'])
    kept = jax.tree.map(jnp.copy, params) if live else None
    state = self.optimizer.init(job['optimizer'], params)
    self.state = init_state(params, state, reference=kept, objective=objective)
    self.step = jax.jit(make_step(model, self.optimizer), donate_argnums=0)
    self.compiled: dict[Any, Any] = {}

  def compile(self, batch) -> Callable:
    shape = tuple(np.shape(x) for x in jax.tree.leaves(batch))
    if shape not in self.compiled:
      batch = jax.device_put(batch)
      self.compiled[shape] = self.step.lower(self.state, batch, self.hparams).compile()
    return self.compiled[shape]

  def __call__(self, batch) -> float:
    batch = jax.device_put(batch)
    self.state, metrics = self.compile(batch)(self.state, batch, self.hparams)
    metrics = jax.device_get(metrics)
    self.notes.setdefault('grad_norm', float(metrics['grad_norm']))  # the first step's
    return float(metrics['loss'])


def offline(
  job: Job, model: Model, params: Params, notes: Notes, objective, dataset, tables=(), live=False
) -> Turn:
  batches = Batches(dataset, job['batch'], seed=None, tables=dict(tables))
  trainer = Trainer(job, model, params, notes, objective, live=live)
  turn = stepping(batches, trainer.compile, trainer)
  notes['shapes'] = len(trainer.compiled)
  return turn


def referring(job: Job, model: Model, params: Params, notes: Notes, objective, dataset) -> Turn:
  """Steps of a loss with a reference, in the step or from a table."""
  tables = {}
  if job['reference'] == 'table':
    clock = protocol.Clock()
    with tempfile.TemporaryDirectory() as folder:
      tables['ref_logps'] = reference.build(model, params, dataset, folder)
    notes['table_seconds'] = clock.read()['seconds']
  live = job['reference'] == 'live'
  return offline(job, model, params, notes, objective, dataset, tables, live)


def dpo_step(job: Job, model: Model, params: Params, notes: Notes) -> Turn:
  dataset = dataset_of(job, 'chosen', 'rejected')
  return referring(job, model, params, notes, dpo(beta=job['beta']), dataset)


def kto_step(job: Job, model: Model, params: Params, notes: Notes) -> Turn:
  examples = [
    example(one, 'completion', 'other', label=1.0 if one['label'] else -1.0, mismatched=1.0)
    for one in job['pairs']
  ]
  dataset = data.from_examples(examples)
  return referring(job, model, params, notes, kto(beta=job['beta']), dataset)


def sft_step(job: Job, model: Model, params: Params, notes: Notes) -> Turn:
  return offline(job, model, params, notes, sft(), dataset_of(job, 'chosen'))


def reward_step(job: Job, model: Model, params: Params, notes: Notes) -> Turn:
  dataset = dataset_of(job, 'chosen', 'rejected')
  return offline(job, model, params, notes, bradley_terry(), dataset)


def logprobs_step(job: Job, model: Model, params: Params, notes: Notes) -> Turn:
  batches = Batches(dataset_of(job, 'chosen', 'rejected'), job['batch'], seed=None)
  compute = jax.jit(lambda params, batch: log_probs(model, params, batch)['logps'].sum())

  def step(batch) -> float:
    return float(compute(params, jax.tree.map(lambda x: x[0], batch)))

  return stepping(batches, step, step)


def prompts_of(job: Job) -> Prompts:
  tokens = [np.array(pair['prompt'][-job['max_prompt'] :], np.int32) for pair in job['pairs']]
  texts = [protocol.spelt(prompt.tolist()) for prompt in tokens]
  return Prompts(tokens, texts, [{} for _ in texts], ['made up' for _ in texts])


def grpo_step(job: Job, model: Model, params: Params, notes: Notes) -> Turn:
  objective = parse(f'grpo() + {job["kl"]}*kl()')
  prompts = prompts_of(job)
  sampler = Sampler(model, prompts, job['samples'], job['new_tokens'])
  source = Online(
    model,
    objective,
    sampler,
    Scorer((Term(variety),), Words()),  # type: ignore[arg-type]
    group_baseline(),
    Rounds(prompts=job['prompts']),
    reference=jax.tree.map(jnp.copy, params),
    place=jax.device_put,
  )
  trainer = Trainer(job, model, params, notes, objective)
  carry = source.begin()
  count = 0

  def step() -> float:
    nonlocal carry, count
    batch, carry = source.next(count, trainer.state.params, carry)
    count += 1
    return trainer(batch)

  return step


def decode_step(job: Job, model: Model, params: Params, notes: Notes) -> Turn:
  prompts = prompts_of(job)
  width = max(map(len, prompts.tokens))
  sample = functools.partial(
    sample_groups, model, num_samples=job['samples'], max_new_tokens=job['new_tokens'], seed=0
  )
  count = 0

  def step() -> None:
    nonlocal count
    size = job['prompts']
    tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
    for row, prompt in enumerate(prompts.tokens[count * size : (count + 1) * size]):
      tokens[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
    jax.block_until_ready(sample(params, tokens, mask, rollout=count).tokens)
    count += 1

  return step


STEPS: dict[str, Callable[[Job, Model, Params, Notes], Turn]] = {
  'dpo': dpo_step,
  'kto': kto_step,
  'sft': sft_step,
  'reward': reward_step,
  'grpo': grpo_step,
  'decode': decode_step,
  'logprobs': logprobs_step,
}


def held() -> float:
  """GiB, of the accelerator where there is one."""
  stats = jax.devices()[0].memory_stats()
  return stats['peak_bytes_in_use'] / 2**30 if stats else protocol.peak_gib()


def main(path: str) -> None:
  notes: Notes = {'compile_seconds': 0.0}

  def listen(event: str, seconds: float, **_: Any) -> None:
    if event.endswith(('jaxpr_to_mlir_module_duration', 'backend_compile_duration')):
      notes['compile_seconds'] += seconds

  jax.monitoring.register_event_duration_secs_listener(listen)
  job = json.loads(Path(path).read_text(encoding='utf-8'))
  model, params = models.load_hf(job['model'], dtype=jnp.float32)
  model = model.replace(dtype=job['dtype'], remat=job['remat'] or None)
  step = STEPS[job['task']](job, model, params, notes)
  del params
  known = protocol.versions('jax', 'jaxlib', 'flax', 'optax')
  protocol.say(versions=known, device=jax.devices()[0].device_kind)
  protocol.serve(step, notes, held)


if __name__ == '__main__':
  main(sys.argv[1])
