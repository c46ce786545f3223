"""Align a language model from nothing, in minutes on a CPU, where the truth is known.

  python -m experiments.quickstart --out=quickstart     (make quickstart; 4 minutes on two cores)

The controlled-sentiment setting of the DPO paper (https://arxiv.org/abs/2305.18290, section 6), in
small: SFT of a byte-level decoder on templated film reviews (`reviews.py`), samples from it on
training prompts, Bradley-Terry labels from the true score, DPO on the labels. Held-out prompts then
tell what that did: true score, KL to the reference, win rate, samples, plots (`report.md`).
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import report, reviews
from experiments.report import Evaluation, Study
from jaxpref import models
from jaxpref.data.batches import Batches, Packing
from jaxpref.data.dataset import Dataset, from_examples
from jaxpref.data.examples import Example
from jaxpref.data.tokenizer import Tokenizer, load_tokenizer
from jaxpref.evals import statistics
from jaxpref.generation import Completion, encode, generate
from jaxpref.models import Model
from jaxpref.objectives import Objective, parse
from jaxpref.objectives.schedules import warmup_cosine
from jaxpref.train import reference
from jaxpref.train.loop import Offline, Run, fit
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.progress import open_progress
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_fields, make_step
from jaxpref.train.writers import Writers
from jaxpref.typing import Params

CONSOLE = Console()
PACKING = Packing(row_lengths=(256,))
TRAIN_SAMPLES, HELD_OUT_PAIRS, HELD_OUT_SAMPLES = range(3)  # rounds of sampling, for random keys


@dataclasses.dataclass(frozen=True)
class Settings:
  """What may be varied, from the command line too; the defaults fit 4 minutes on two cores."""

  seed: int = 0
  width: int = 96
  layers: int = 3
  sft_steps: int = 600
  sft_batch: int = 32
  sft_learning_rate: float = 4e-3
  samples_per_prompt: int = 8  # of every training prompt; they make half as many pairs
  temperature: float = 0.2  # of the labels: how far two scores must differ to be told apart
  objective: str = 'dpo(beta=0.1)'
  dpo_steps: int = 120
  dpo_batch: int = 32
  dpo_learning_rate: float = 3e-4
  evaluations: int = 4  # along DPO, evenly spaced
  held_out_samples: int = 4  # of every held-out prompt, at every evaluation
  max_new_tokens: int = 96


def run(settings: Settings, out: pathlib.Path) -> Study:
  """The whole study; writes `report.md` and its figures into `out`."""
  seconds: dict[str, float] = {}
  tokenizer = load_tokenizer('byte')
  prompts, held_out = reviews.prompts(settings.seed)

  with _phase('SFT', seconds):
    corpus = reviews.corpus(prompts, settings.sft_steps * settings.sft_batch, settings.seed)
    data = from_examples([_example(tokenizer, r.prompt, r.completion) for r in corpus])
    config = models.preset(
      'tiny',
      vocab_size=tokenizer.vocab_size,
      width=settings.width,
      num_layers=settings.layers,
      num_kv_heads=4,
      mlp_width=8 * settings.width // 3,
      qk_norm=True,
    )
    model, params = models.init(config, jax.random.key(settings.seed))
    sft = _batches(data, settings.sft_batch, settings.seed)
    rate, steps = settings.sft_learning_rate, settings.sft_steps
    start, _ = train(model, params, sft, parse('sft()'), rate, steps)

  with _phase('sampling and labels', seconds):
    sample = functools.partial(_sample, model, tokenizer=tokenizer, settings=settings)
    n = settings.samples_per_prompt
    pairs = _pairs(prompts, sample(start, prompts, n, TRAIN_SAMPLES), tokenizer, settings)
    held_out_pairs = _pairs(
      held_out, sample(start, held_out, 4, HELD_OUT_PAIRS), tokenizer, settings
    )

  with _phase('reference log-probs', seconds), tempfile.TemporaryDirectory() as folder:
    tables = [reference.build(model, start, data, folder) for data in (pairs, held_out_pairs)]

  with _phase('DPO', seconds):
    dpo = parse(settings.objective)
    batches = _batches(pairs, settings.dpo_batch, settings.seed, ref_logps=tables[0])
    held_out_batches = _batches(held_out_pairs, 64, None, ref_logps=tables[1])
    fields = jax.jit(make_fields(model, ('logps',)))
    kept, held_out_metrics = [], []

    def keep(params: Params) -> dict[str, float]:
      kept.append(jax.tree.map(jnp.copy, params))  # the loop's own are donated to the next step
      parts = [fields(params, held_out_batches[i]) for i in range(len(held_out_batches))]
      loss, metrics = dpo(jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts))
      held_out_metrics.append(jax.tree.map(float, {'loss': loss, **metrics}))
      return held_out_metrics[-1]

    keep(start)
    every = max(1, settings.dpo_steps // settings.evaluations)
    rate, steps = settings.dpo_learning_rate, settings.dpo_steps
    _, train_metrics = train(model, start, batches, dpo, rate, steps, keep, every)
    at = [min(i * every, steps) for i in range(len(kept))]

  with _phase('evaluation', seconds), tempfile.TemporaryDirectory() as folder:
    n = settings.held_out_samples
    samples = [sample(params, held_out, n, HELD_OUT_SAMPLES) for params in kept]
    evaluations = _evaluations(model, start, held_out, at, samples, tokenizer, folder)

  options = ' '.join(f'--{name}={value!r}' for name, value in _changed(settings).items())
  study = Study(
    prompts=held_out,
    evaluations=evaluations,
    train_metrics=train_metrics,
    held_out_metrics=[
      {'step': i, **metrics} for i, metrics in zip(at, held_out_metrics, strict=True)
    ],
    settings=_described(settings, params, prompts, pairs),
    seconds=seconds,
    command=f'python -m experiments.quickstart {options}'.strip(),
  )
  path = report.write(out, study)
  report.summary(CONSOLE, study)
  CONSOLE.print(f'{sum(seconds.values()):.0f} s; report and figures: {path}')
  return study


class Memory:
  """A writer that keeps the lines of a run."""

  def __init__(self):
    self.lines: list[dict[str, float]] = []

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self.lines.append({'step': step, **metrics})

  def close(self) -> None:
    pass


def train(
  model: Model,
  params: Params,
  batches: Batches,
  objective: Objective,
  peak: float,
  steps: int,
  evaluate: Callable[[Params], dict[str, float]] | None = None,
  every: int = 0,
) -> tuple[Params, list[dict[str, float]]]:
  """Trains a copy of `params`; returns it and the metrics of every step, without evaluations'."""
  optimizer, memory = Optimizer(), Memory()
  rate = warmup_cosine(peak, steps // 20, steps)
  scalars = dict(learning_rate=rate, weight_decay=0.01, b1=0.9, b2=0.95, eps=1e-8, clip=1.0)
  params = jax.tree.map(jnp.copy, params)
  progress = open_progress(steps, every=100, console=CONSOLE)
  run = Run(
    step=jax.jit(make_step(model, optimizer), donate_argnums=0),
    source=Offline(batches, steps),
    hparams=Hparams(objective, scalars),
    stop=steps,
    writers=Writers([memory]),
    progress=progress,
    evaluate=evaluate,
    eval_every=every,
  )
  try:
    state = fit(run, init_state(params, optimizer.init(scalars, params)))
  finally:
    progress.close()
  return state.params, [line for line in memory.lines if 'learning_rate' in line]


def _sample(
  model: Model,
  params: Params,
  prompts: Sequence[str],
  n: int,
  rollout: int,
  *,
  tokenizer: Tokenizer,
  settings: Settings,
) -> list[list[Completion]]:
  """`n` completions of each prompt at temperature 1, [P][n]."""
  flat = generate(
    model,
    params,
    tokenizer,
    prompts,
    max_new_tokens=settings.max_new_tokens,
    num_samples=n,
    seed=settings.seed,
    rollout=rollout,
    batch_size=256,
  )
  return [flat[i : i + n] for i in range(0, len(flat), n)]


def _pairs(
  prompts: Sequence[str],
  completions: Sequence[Sequence[Completion]],
  tokenizer: Tokenizer,
  settings: Settings,
) -> Dataset:
  """Samples two by two, the one that a noisy judge of the true score prefers first."""
  found = [
    (prompt, a, b)
    for prompt, row in zip(prompts, completions, strict=True)
    for a, b in zip(row[::2], row[1::2], strict=True)
    if a.tokens != b.tokens
  ]
  scores = np.array([[reviews.score(prompt + c.text) for c in pair] for prompt, *pair in found])
  first = reviews.prefer(scores[:, 0], scores[:, 1], settings.temperature, settings.seed)
  examples = []
  for (prompt, a, b), a_wins in zip(found, first, strict=True):
    examples.append(_sampled(tokenizer, prompt, *((a, b) if a_wins else (b, a))))
  return from_examples(examples)


def _evaluations(
  model: Model,
  start: Params,
  prompts: Sequence[str],
  steps: Sequence[int],
  samples: Sequence[Sequence[Sequence[Completion]]],
  tokenizer: Tokenizer,
  folder: str,
) -> list[Evaluation]:
  """Scores and KL of samples [evaluation][prompt][sample].

  The policies' log-probs are the sampler's, the reference's those of the training path; so the
  first KL, of the reference to itself, is zero only as far as the two agree.
  """
  rows = [(prompt, row) for each in samples for prompt, row in zip(prompts, each, strict=True)]
  flat = [(prompt, c) for prompt, row in rows for c in row]
  data = from_examples([_sampled(tokenizer, prompt, c) for prompt, c in flat])
  table = reference.build(model, start, data, folder)
  shape = len(samples), len(prompts), len(samples[0][0])
  logps, ref_logps, mask = np.zeros((3, len(flat), int(data.lengths[:, 1].max())))
  for i, (_, c) in enumerate(flat):
    logps[i, : len(c.tokens)] = c.logps
    ref_logps[i, : len(c.tokens)] = table[i][0]
    mask[i, : len(c.tokens)] = 1
  tokens = [x.reshape(*shape, -1) for x in (logps, ref_logps, mask)]
  scores = np.array([reviews.score(prompt + c.text) for prompt, c in flat]).reshape(shape)
  valid = np.array([reviews.in_world(prompt + c.text) for prompt, c in flat]).reshape(shape)
  return [
    Evaluation(
      step=step,
      completions=[[c.text for c in row] for row in samples[i]],
      scores=scores[i],
      valid=valid[i],
      kl=statistics.kl(*(x[i] for x in tokens)),
    )
    for i, step in enumerate(steps)
  ]


def _batches(data: Dataset, size: int, seed: int | None, **tables: reference.Table) -> Batches:
  return Batches(data, min(size, len(data)), seed, packing=PACKING, tables=tables)


def _example(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
  tokens = np.array([*tokenizer.encode(completion), tokenizer.eos_id], np.int32)
  head = np.array(encode(tokenizer, prompt, 0), np.int32)
  return Example(head, (tokens,), (np.ones(len(tokens), bool),), {})


def _sampled(tokenizer: Tokenizer, prompt: str, *completions: Completion) -> Example:
  """An example of exactly the tokens that were sampled; no end is added to one that was cut off."""
  tokens = tuple(np.array(c.tokens, np.int32) for c in completions)
  head = np.array(encode(tokenizer, prompt, 0), np.int32)
  return Example(head, tokens, tuple(np.ones(len(t), bool) for t in tokens), {})


def _described(
  settings: Settings, params: Params, prompts: Sequence[str], pairs: Dataset
) -> Mapping[str, object]:
  device = jax.devices()[0]
  return {
    'parameters': f'{sum(x.size for x in jax.tree.leaves(params)):,}',
    'training prompts': len(prompts),
    'training pairs': len(pairs),
    **{name.replace('_', ' '): value for name, value in dataclasses.asdict(settings).items()},
    'device': f'{device.platform}, jax {jax.__version__}',
  }


def _changed(settings: Settings) -> dict[str, object]:
  defaults = dataclasses.asdict(Settings())
  return {k: v for k, v in dataclasses.asdict(settings).items() if v != defaults[k]}


@contextlib.contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
  start = time.perf_counter()
  CONSOLE.print(f'{name} ...')
  yield
  seconds[name] = time.perf_counter() - start
  CONSOLE.print(f'{name}: {seconds[name]:.1f} s')


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('quickstart'))
  for field in dataclasses.fields(Settings):
    parser.add_argument(f'--{field.name}', type=type(field.default), default=field.default)
  options = vars(parser.parse_args(argv))
  run(out=options.pop('out'), settings=Settings(**options))


if __name__ == '__main__':
  main()
