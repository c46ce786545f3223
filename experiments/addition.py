"""Reinforcement learning with verifiable rewards in small: GRPO learns to add two-digit numbers.

  python -m experiments.addition --out=addition

A decoder of 0.1 M parameters sees '47+85=' byte by byte. It is shown right answers (SFT from random
parameters) only until it gets 15 % of the training sums right, greedily. Then GRPO: it answers
training sums itself, four times each, and is told of each answer whether it is exactly right,
nothing else; no curriculum, no partial credit, no hint at the digits. A tenth of all pairs of
numbers is held out, in both orders: 85+47= is never seen where 47+85= is asked.

Departures from the GRPO paper: no KL penalty; three passes over a rollout, in four minibatches.

Measured with the defaults on the held-out sums (some 810), with 95 % intervals:

  seed  greedy                                     sampled at temperature 1
  0     16.6 [14.0, 19.2] -> 92.9 [91.2, 94.7] %   11.5 [9.3, 13.7] -> 87.0 [84.7, 89.3] %
  1     29.0 [25.9, 32.1] -> 99.9 [99.6, 100.1] %  12.1 [9.8, 14.3] -> 99.1 [98.5, 99.8] %

They took 456 and 407 s of CPU time; on the clock 6.9 minutes at a load of 4, and 11.4 at one of 8,
on 2 cores. Rates, batches and passes were chosen by seed 0's held-out results in eleven trials, so
its line is flattered, and for the end of SFT and the steps a run of seed 1 was seen (30.3 -> 99.5 %
greedy from a fifth of the sums). From the same SFT of 230 steps, 17 % right greedily: 64 sums x 16
answers learnt from once came to 53 % after 205,000 answers; 256 x 8, eight steps on each rollout
and b2 = 0.95 to 60 % after 123,000; 512 x 4, sixteen steps at half the rate and b2 = 0.99 to 69 %
after 102,000; a rate of 3e-3 with one step a rollout lost what SFT had taught. 1500 steps took seed
0 from 25 to 91 % greedy, 84 % sampled.

SFT's end is a share of right answers as seeds differ in when they begin to add: after 290 steps,
seed 0 had 30 % of the held-out sums right greedily, seed 1 had 58 % of training sums right sampled.
SFT alone learns to add sooner than GRPO: 96 % greedy after 450 steps, in one order of the data.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from experiments import judge, options, plots, quickstart
from experiments.report import table
from jaxpref import config, models, run
from jaxpref.data.batches import Batches
from jaxpref.data.dataset import from_examples
from jaxpref.data.tokenizer import Tokenizer, load_tokenizer
from jaxpref.evals import statistics
from jaxpref.evals.statistics import Estimate
from jaxpref.generation import generate
from jaxpref.models import Model
from jaxpref.objectives import parse
from jaxpref.sampling import Sampling
from jaxpref.train.writers import read_metrics
from jaxpref.typing import Params

CONSOLE = Console()
LEAST, MOST = 10, 99  # operands
NEW_TOKENS = 4  # three digits and the end
HELD_OUT = 0.1  # of the pairs of numbers, whatever their order
MODES = {'greedy': 0.0, 'sampled': 1.0}  # temperature
PLOT = 'learning.png'
LOOK, LOOK_EVERY = 512, 10  # training sums, and steps of SFT between two looks at them
SFT_LIMIT = 1000
SHOWN = 10  # held-out sums in the report, the first ones of a random order


@dataclasses.dataclass(frozen=True)
class Settings:
  """What may be varied, from the command line too."""

  seed: int = 0
  enough: float = 0.15  # share of training sums right, greedily, at which SFT ends
  sft_batch: int = 128
  sft_learning_rate: float = 3e-3
  objective: str = 'grpo()'
  advantages: str = 'group_baseline()'
  prompts: int = 512  # of a rollout
  samples: int = 4  # of each prompt
  epochs: int = 3  # passes over a rollout
  minibatches: int = 4
  steps: int = 2400  # optimizer steps, twelve on each rollout
  learning_rate: float = 1e-3
  evaluations: int = 10


class Adder(NamedTuple):
  """A model that is asked for sums."""

  model: Model
  params: Params
  tokenizer: Tokenizer


class Enough(Exception):
  """SFT has taught what it should."""


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a model says to the held-out sums at one temperature."""

  texts: Sequence[str]
  right: np.ndarray  # bool [n]

  @property
  def accuracy(self) -> Estimate:
    return statistics.mean(self.right.astype(float))


@dataclasses.dataclass(frozen=True)
class Study:
  """All that the report needs."""

  settings: Settings
  sft_steps: int
  held_out: Sequence[Mapping[str, str]]
  before: Mapping[str, Answers]  # by mode
  after: Mapping[str, Answers]
  metrics: Sequence[Mapping[str, float]]  # of GRPO
  seconds: Mapping[str, tuple[float, float]]  # of a phase: wall, CPU


def conduct(settings: Settings, out: pathlib.Path) -> Study:
  """The whole study; writes data, both runs, `report.md` and its figure into `out`."""
  out.mkdir(parents=True, exist_ok=True)
  train, held_out = sums(settings.seed)
  for name, records in (('train', train), ('held_out', held_out)):
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (out / f'{name}.jsonl').write_text(lines)
  seconds: dict[str, tuple[float, float]] = {}
  with _phase(seconds, 'SFT'):
    first, sft_steps = pretrained(settings, train, out / 'sft')
    before = {mode: ask(first, held_out, t) for mode, t in MODES.items()}
  with _phase(seconds, 'GRPO'):
    trained = run.train(grpo_config(settings, out), out / 'grpo', console=CONSOLE)
    last = Adder(trained.model, trained.params, trained.tokenizer)
    after = {mode: ask(last, held_out, t) for mode, t in MODES.items()}
  metrics = read_metrics(out / 'grpo' / 'metrics.jsonl')
  study = Study(settings, sft_steps, held_out, before, after, metrics, seconds)
  rewards = [line for line in metrics if 'loss' in line]
  plots.learning(out / PLOT, rewards, metrics, before['greedy'].accuracy)
  (out / 'report.md').write_text(markdown(study), encoding='utf-8')
  CONSOLE.print(headline(study), markup=False, highlight=False)
  CONSOLE.print(f'see {out / "report.md"}', highlight=False)
  return study


def sums(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
  """(training, held-out) sums of two-digit numbers, in random order; no pair is in both."""
  numbers = range(LEAST, MOST + 1)
  pairs = [(a, b) for a in numbers for b in numbers if a <= b]
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(pairs))
  held = {pairs[i] for i in order[: round(HELD_OUT * len(pairs))].tolist()}
  both: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
  for i in rng.permutation(len(numbers) ** 2).tolist():
    a, b = numbers[i // len(numbers)], numbers[i % len(numbers)]
    answer = str(a + b)
    record = {'prompt': f'{a}+{b}=', 'completion': answer, 'answer': answer}
    both[(min(a, b), max(a, b)) in held].append(record)
  return both


def pretrained(
  settings: Settings, train: Sequence[Mapping[str, str]], folder: pathlib.Path
) -> tuple[Adder, int]:
  """A model that gets `settings.enough` of some training sums right, and the steps of SFT it took.

  Seeds differ in when they begin to add, and then learn it within a hundred steps; so what they
  begin GRPO with is fixed, and not the number of steps. Held-out sums have no part in it.
  """
  tokenizer = load_tokenizer('byte')
  model, params = models.init(models.preset('tiny'), jax.random.key(settings.seed))
  examples = [
    judge.example(tokenizer, r['prompt'], [*tokenizer.encode(r['answer']), tokenizer.eos_id])
    for r in train
  ]
  batches = Batches(from_examples(examples), settings.sft_batch, settings.seed)
  looks = []

  def look(params: Params) -> dict[str, float]:
    adder = Adder(model, jax.tree.map(jnp.copy, params), tokenizer)
    looks.append(adder)
    share = ask(adder, train[:LOOK], 0.0).accuracy.value
    if share >= settings.enough:
      raise Enough
    return {'eval/reward/mean': share}

  with contextlib.suppress(Enough):
    rate = settings.sft_learning_rate
    quickstart.train(model, params, batches, parse('sft()'), rate, SFT_LIMIT, look, LOOK_EVERY)
    raise RuntimeError(f'{SFT_LIMIT} steps of SFT got less than {settings.enough:.0%} right')
  models.save_hf(folder, model, looks[-1].params, tokenizer)
  return looks[-1], len(looks) * LOOK_EVERY


def grpo_config(settings: Settings, out: pathlib.Path) -> ConfigDict:
  """The same model, its own answers, and 1 for a right one."""
  c = config.default()
  c.seed = settings.seed
  c.data.train = f'jsonl:{out / "train.jsonl"}'
  c.data.eval = f'jsonl:{out / "held_out.jsonl"}'
  c.data.max_length = 32
  c.log.tensorboard = False
  c.model = str(out / 'sft')
  c.objective = settings.objective
  c.rewards = 'exact_match(key=answer)'
  c.data.kind = 'prompt'
  c.rollout.prompts = settings.prompts
  c.rollout.samples = settings.samples
  c.rollout.epochs = settings.epochs
  c.rollout.minibatches = settings.minibatches
  c.rollout.max_new_tokens = NEW_TOKENS
  c.rollout.advantages = settings.advantages
  c.rollout.show = 25
  c.steps = settings.steps
  c.optimizer.learning_rate = settings.learning_rate
  c.optimizer.b2 = 0.99  # gradients are noisier than with the answers at hand
  c.eval.every = max(1, settings.steps // settings.evaluations)
  c.eval.temperature = 0.0
  return c


def ask(adder: Adder, records: Sequence[Mapping[str, str]], temperature: float) -> Answers:
  """One answer to every sum; right is the exact text, ended by itself."""
  answers = generate(
    *adder,
    [record['prompt'] for record in records],
    max_new_tokens=NEW_TOKENS,
    sampling=Sampling(temperature),
    batch_size=256,
  )
  right = [
    found.text == record['answer'] and found.finish_reason == 'stop'
    for found, record in zip(answers, records, strict=True)
  ]
  return Answers([found.text for found in answers], np.array(right))


def headline(study: Study) -> str:
  """What happened, in a sentence."""
  changes = [
    f'{study.before[mode].accuracy.value:.1%} -> {study.after[mode].accuracy.value:.1%} {mode}'
    for mode in MODES
  ]
  return f'Exact held-out sums: {", ".join(changes)}.'


def markdown(study: Study) -> str:
  """The report."""
  settings = study.settings
  rows = [
    (
      f'{mode}, temperature {temperature:g}',
      *(f'{answers[mode].accuracy:.1%}' for answers in (study.before, study.after)),
    )
    for mode, temperature in MODES.items()
  ]
  samples = settings.steps // (settings.epochs * settings.minibatches)
  samples *= settings.prompts * settings.samples
  greedy = study.before['greedy'], study.after['greedy']
  shown = [
    (record['prompt'], *(answers.texts[i] for answers in greedy), record['answer'])
    for i, record in enumerate(study.held_out[:SHOWN])
  ]
  seconds = [(k, f'{wall:.0f}', f'{cpu:.0f}') for k, (wall, cpu) in study.seconds.items()]
  values = [(k, str(v)) for k, v in dataclasses.asdict(settings).items()]
  return f"""# GRPO on sums of two-digit numbers

**{headline(study)}**

{len(study.held_out)} sums are held out: a tenth of all pairs of numbers, in both orders. SFT from
random parameters saw {study.sft_steps * settings.sft_batch:,} right answers to the others and
ended where {settings.enough:.0%} of {LOOK} training sums were right. GRPO saw no answer: it was
told of {samples:,} answers of its own whether they were exactly right.

{table(('', 'after SFT', 'after GRPO'), rows, '-::')}

In brackets: 95 % intervals over the held-out sums. An answer is right if its text is the sum and it
ended by itself.

![share of right answers over the steps of GRPO]({PLOT})

## Answers

The first {len(shown)} held-out sums, greedy; none is picked.

{table(('sum', 'after SFT', 'after GRPO', 'right'), shown, '-:::')}

## How to read this

- The intervals cover the draw of held-out sums, not that of the training seed: run with `--seed=1`.
- Settings were chosen by seed 0's held-out results (`experiments/addition.py` says how), so seed 0
  is a little flattered; other seeds hold out other pairs.
- SFT was stopped early on purpose. With the answers at hand, more of it learns to add sooner than
  GRPO does: what is shown here is learning from being told right or wrong.

## Settings and times

{table(('setting', 'value'), values, '--')}

{table(('phase', 'seconds', 'CPU seconds'), seconds, '-::')}
"""


@contextlib.contextmanager
def _phase(seconds: dict[str, tuple[float, float]], name: str) -> Iterator[None]:
  wall, cpu = time.perf_counter(), time.process_time()
  CONSOLE.print(f'[bold]{name}[/bold]', highlight=False)
  yield
  seconds[name] = time.perf_counter() - wall, time.process_time() - cpu


def main(argv: Sequence[str] | None = None) -> None:
  conduct(*options.parse(Settings, __doc__, 'addition', argv))


if __name__ == '__main__':
  main()
