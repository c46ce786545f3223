"""RLHF in three stages from nothing, in minutes on a CPU, where the truth is known.

  python -m experiments.sentiment --out=sentiment

The world of `reviews.py`: SFT of a tiny decoder on film reviews, a reward model from pairs of its
samples that a noisy judge of the true sentiment labelled (Bradley-Terry), PPO against the reward
model with KL steered to a target. PPO never sees the truth; held-out prompts then tell what it did:
true score, KL, and how much of what the reward model says it gained is true (`report.md`).

Each stage is a run of `jaxpref train` with a folder of its own (sft, rm, ppo), so what is done is
kept: the same command goes on where it was stopped.

Measured with the defaults, on 160 held-out prompts with 95 % intervals; the target of KL is 2 nats.
The gap is the reward model's gain less the true one, in standard deviations of the reference.

  seed  true score      gain                KL (k1)            distinct      gap
  0     +0.01 -> +0.29  +0.28 [0.26, 0.30]  1.75 [1.62, 1.87]  80 -> 75 %    1.28 [1.19, 1.37]
  1     -0.05 -> +0.47  +0.52 [0.48, 0.55]  1.81 [1.74, 1.87]  80 -> 31 %    0.34 [0.27, 0.41]
  2     -0.01 -> +0.55  +0.56 [0.52, 0.60]  1.76 [1.69, 1.83]  81 -> 37 %    0.01 [-0.07, 0.08]

Seeds differ by their reward models, whose accuracies on held-out labels are 63, 77 and 84 %, of
some 91 % that knowing the truth would give: the weaker one is, the more of what PPO gains by it is
not true. Earlier runs of the same seeds, with other rounding and another order of batches, had 73,
81 and 84 % and gained 0.41, 0.61 and 0.60; there the controller was given the target itself, and
seed 1 ended 0.05 nats above it. That is the one setting changed after results were seen. A run took
120 to 175 s beside other work on 2 CPU cores.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from configs import ppo, reward, sft
from experiments import judge, options, proxies, report, reviews, vocabulary
from experiments.report import Evaluation, Study
from jaxpref import models, run
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.generation import Completion
from jaxpref.models import Model
from jaxpref.rollout.reward_models import RewardModel
from jaxpref.train import reference
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.reward_models import reward_model
from jaxpref.train.writers import read_metrics
from jaxpref.typing import Params

CONSOLE = Console()
VOCABULARY = 640  # tokens at most; enough for every word of the world to be one
AIM = 0.9  # of the KL target: a controller comes to rest on either side of what it is given
PAIRS, HELD_OUT_PAIRS, EVALUATION = range(3)  # rounds of sampling, for random keys
TRUTH = "0*user('experiments.sentiment:true_score')"  # weight 0: logged, never learnt from


@dataclasses.dataclass(frozen=True)
class Settings:
  """What may be varied, from the command line too."""

  seed: int = 0
  sft_steps: int = 600
  sft_learning_rate: float = 6e-3
  samples_per_prompt: int = 16  # of every training prompt; they make half as many pairs
  temperature: float = 0.1  # of the labels: how far two scores must differ to be told apart
  rm_epochs: float = 2.0
  rm_learning_rate: float = 1e-3
  rollouts: int = 60
  prompts: int = 64  # of a rollout
  samples: int = 4  # of each of them
  ppo_learning_rate: float = 5e-4
  kl: float = 0.5  # the first weight of KL in the reward
  kl_target: float = 2.0  # nats a completion, at most
  evaluations: int = 6  # along PPO, evenly spaced
  held_out_samples: int = 4  # of every held-out prompt, at every evaluation
  max_new_tokens: int = 32


def true_score(
  prompts: Sequence[str], completions: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> list[float]:
  """The truth, as a reward."""
  del records
  return [reviews.score(p + c) for p, c in zip(prompts, completions, strict=True)]


def study(settings: Settings, out: pathlib.Path) -> tuple[Study, list[np.ndarray]]:
  """All stages, in `out`; returns what was measured, and the proxy's scores [P, S] beside it."""
  out.mkdir(parents=True, exist_ok=True)
  seconds: dict[str, float] = {}
  timed = functools.partial(_timed, seconds)
  prompts, held_out = reviews.prompts(settings.seed)
  n = settings.held_out_samples

  tokenizer, model, start = timed('SFT', lambda: fine_tuned(settings, prompts, out))
  sample = functools.partial(
    judge.samples, model, tokenizer, settings.max_new_tokens, settings.seed
  )
  agreement = timed(
    'samples and labels', lambda: label(settings, prompts, held_out, start, sample, out)
  )
  accuracy = timed('reward model', lambda: rewarded(settings, out))
  timed('PPO', lambda: optimised(settings, prompts, out))

  def evaluate() -> tuple[list[Evaluation], list[np.ndarray]]:
    checkpoints = Checkpoints(out / 'ppo', read_only=True)
    steps = [0, *checkpoints.steps()]
    kept = [start, *(checkpoints.restore_policy(step) for step in steps[1:])]
    checkpoints.close()
    samples = [sample(params, held_out, n, EVALUATION) for params in kept]
    ref_logps = functools.partial(reference.build, model, start, folder=out / 'tables')
    proxy = reward_model(str(out / 'rm'), spread=1.0)
    said = [_proxy(proxy, held_out, each) for each in samples]
    return judge.evaluations(tokenizer, held_out, steps, samples, ref_logps), said

  evaluations, scored = timed('evaluation', evaluate)
  settings_ = {name.replace('_', ' '): value for name, value in vars(settings).items()}
  found = Study(
    prompts=held_out,
    evaluations=evaluations,
    metrics=read_metrics(out / 'ppo' / 'metrics.jsonl'),
    settings={
      'parameters of the policy': f'{sum(x.size for x in jax.tree.leaves(start)):,}',
      'labels that agree with the true score': f'{agreement:.1%}',
      'accuracy of the reward model on held-out labels': f'{accuracy:.1%}',
      **settings_,
      'device': f'{jax.devices()[0].platform}, jax {jax.__version__}',
    },
    seconds=seconds,
    command=' '.join(('python -m experiments.sentiment', *options.changed(settings))),
    method='PPO',
  )
  return found, scored


def fine_tuned(
  settings: Settings, prompts: Sequence[str], out: pathlib.Path
) -> tuple[Tokenizer, Model, Params]:
  """Stage 1: a vocabulary, a random model, and SFT on reviews of the training prompts."""
  config = sft.get_config()
  if not (out / 'start' / 'config.json').is_file():
    corpus = reviews.corpus(prompts, settings.sft_steps * config.batch.size, settings.seed)
    _write(out / 'sft.jsonl', (dataclasses.asdict(review) for review in corpus))
    texts = (review.prompt + review.completion for review in corpus)
    tokenizer = vocabulary.learn(texts, VOCABULARY, out / 'start')
    shape = models.preset('tiny', vocab_size=tokenizer.vocab_size, qk_norm=True)
    model, params = models.init(shape, jax.random.key(settings.seed))
    models.save_hf(out / 'start', model, params, tokenizer)
  _common(config, settings, 'start', settings.sft_learning_rate, out)
  config.data.train = f'jsonl:{out / "sft.jsonl"}'
  config.steps = settings.sft_steps
  trained = run.train(config, out / 'sft', console=CONSOLE)
  return trained.tokenizer, trained.model, jax.tree.map(np.asarray, trained.params)


def label(
  settings: Settings,
  prompts: Sequence[str],
  held_out: Sequence[str],
  start: Params,
  sample: Callable[..., list[list[Completion]]],
  out: pathlib.Path,
) -> float:
  """Writes pairs of samples, labelled; returns how often labels agree with the truth."""
  right = []
  for name, texts, n, rollout in (
    ('pairs', prompts, settings.samples_per_prompt, PAIRS),
    ('held_out_pairs', held_out, 4, HELD_OUT_PAIRS),
  ):
    whole = [
      [c for c in row if c.finish_reason == 'stop'] for row in sample(start, texts, n, rollout)
    ]
    pairs = [
      (prompt, a.text, b.text)
      for prompt, row in zip(texts, whole, strict=True)
      for a, b in zip(row[::2], row[1::2], strict=False)
      if a.text != b.text
    ]
    scores = np.array([[reviews.score(p + a), reviews.score(p + b)] for p, a, b in pairs])
    first = reviews.prefer(scores[:, 0], scores[:, 1], settings.temperature, settings.seed)
    margin = scores[:, 0] - scores[:, 1]
    right.append(float(((margin > 0) == first)[margin != 0].mean()))
    _write(
      out / f'{name}.jsonl',
      (
        {'prompt': p, 'chosen': a if wins else b, 'rejected': b if wins else a}
        for (p, a, b), wins in zip(pairs, first, strict=True)
      ),
    )
  return right[0]


def rewarded(settings: Settings, out: pathlib.Path) -> float:
  """Stage 2: the reward model; returns its accuracy on the labels of held-out prompts."""
  config = reward.get_config()
  _common(config, settings, 'sft', settings.rm_learning_rate, out)
  config.data.train = f'jsonl:{out / "pairs.jsonl"}'
  config.data.eval = f'jsonl:{out / "held_out_pairs.jsonl"}'
  config.epochs = settings.rm_epochs
  return run.train(config, out / 'rm', console=CONSOLE).metrics['eval/rewards/accuracies']


def optimised(settings: Settings, prompts: Sequence[str], out: pathlib.Path) -> None:
  """Stage 3: PPO against the reward model, whose weights the critic begins with."""
  _write(out / 'prompts.jsonl', ({'prompt': prompt} for prompt in prompts))
  config = ppo.get_config()
  _common(config, settings, 'sft', settings.ppo_learning_rate, out)
  config.data.train = f'jsonl:{out / "prompts.jsonl"}'
  config.rewards = f'reward_model({str(out / "rm")!r}, spread=1.0) + {TRUTH}'
  config.objective = 'after(8)*ppo_clip() + 0.1*value_loss()'
  rollout = config.rollout
  rollout.critic = str(out / 'rm')
  rollout.prompts, rollout.samples = settings.prompts, settings.samples
  rollout.max_new_tokens = settings.max_new_tokens
  rollout.epochs, rollout.minibatches = 2, 2
  rollout.kl, rollout.kl_target = settings.kl, AIM * settings.kl_target
  rollout.kl_horizon = 2000.0
  config.steps = settings.rollouts * rollout.epochs * rollout.minibatches
  config.checkpoint.every = config.steps // settings.evaluations
  config.checkpoint.keep_last = settings.evaluations + 1
  run.train(config, out / 'ppo', console=CONSOLE)


def _common(
  config: ConfigDict, settings: Settings, model: str, rate: float, out: pathlib.Path
) -> None:
  """What the stages share."""
  config.seed, config.model = settings.seed, str(out / model)
  config.optimizer.learning_rate, config.optimizer.warmup = rate, 0.05
  config.data.max_length, config.data.eval_fraction = 96, 0.0
  config.log.tensorboard = False


def _proxy(
  proxy: RewardModel, prompts: Sequence[str], samples: Sequence[Sequence[Completion]]
) -> np.ndarray:
  """What the reward model says of samples, [P, S]."""
  flat = [(p, c) for p, row in zip(prompts, samples, strict=True) for c in row]
  records = [{'finished': c.finish_reason == 'stop'} for _, c in flat]
  found = proxy([p for p, _ in flat], [c.text for _, c in flat], records)
  return np.array(found, np.float64).reshape(len(prompts), -1)


def _write(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
  path.write_text(''.join(f'{json.dumps(record)}\n' for record in records), encoding='utf-8')


def _timed(seconds: dict[str, float], name: str, stage: Callable[[], Any]) -> Any:
  start = time.perf_counter()
  CONSOLE.print(f'[bold]{name}[/bold]', highlight=False)
  found = stage()
  seconds[name] = time.perf_counter() - start
  return found


def main(argv: Sequence[str] | None = None) -> None:
  settings, out = options.parse(Settings, __doc__, 'sentiment', argv)
  out = out.absolute()
  found, scored = study(settings, out)
  proxies.write(out, found, scored, settings.kl_target)
  report.summary(CONSOLE, found)
  CONSOLE.print(f'Report and figures: {out / "report.md"}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
  main()
