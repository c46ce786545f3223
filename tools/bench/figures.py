"""The arithmetic: useful work, medians, ratios and their spread."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models import Model
from jaxpref.train.throughput import Work, train_flops
from tools.bench.pairs import Pair
from tools.bench.shapes import SAMPLED, Shape

PASSES = {  # forward passes' worth of FLOPs that a unit of work needs; a backward pass is two
  'dpo': 3,
  'kto': 3,  # of the labelled completions; those that its reference point reads count nothing
  'sft': 3,
  'reward': 3,
  'grpo': 5,  # sampling, the reference, forward and backward
  'decode': 1,
  'logprobs': 1,
}


def useful(task: str, shape: Shape, pairs: Sequence[Pair]) -> Work:
  """What all steps together must read and score: no padding, every prompt once."""
  prompts = [len(pair['prompt']) for pair in pairs]
  if task in SAMPLED:
    prompts = [min(size, shape.max_prompt) for size in prompts]
    completions = [[shape.new_tokens] * shape.samples for _ in pairs]
  elif task == 'kto':
    completions = [[len(pair['completion'])] for pair in pairs]
  elif task == 'sft':
    completions = [[len(pair['chosen'])] for pair in pairs]
  else:
    completions = [[len(pair['chosen']), len(pair['rejected'])] for pair in pairs]
  scored = sum(map(sum, completions))
  tokens = sum(prompts) + scored
  keys = sum(_triangle(p) for p in prompts)  # what each token attends to, itself included
  for p, sizes in zip(prompts, completions, strict=True):
    keys += sum(_triangle(p + size) - _triangle(p) for size in sizes)
  examples = len(pairs) * (shape.samples if task in SAMPLED else 1)
  return Work(examples, tokens, tokens, scored, keys / tokens)


def _triangle(n: int) -> int:
  return n * (n + 1) // 2


def flops(task: str, model: Model, work: Work) -> float:
  """Model FLOPs of `work`: weights of the layers (never of embeddings), attention, the head.

  The head counts on scored tokens, and a score instead of a head counts nothing. A reference
  counts nothing either: it can be read from a table.
  """
  forward = train_flops(model, work) / 3
  if task == 'reward':
    forward -= work.scored * model.head_flops_per_token
  return PASSES[task] * forward


@dataclasses.dataclass(frozen=True)
class Side:
  """One worker's timed rounds.

  Attributes:
    seconds, cpu_seconds: of one step, the mean of each round.
    peak_gib: the most memory that the process held.
    losses: of the warm-up steps.
    notes: what else the worker said: versions, compile_seconds, grad_norm of the first step ...
  """

  seconds: list[float]
  cpu_seconds: list[float]
  peak_gib: float
  losses: list[float | None]
  notes: dict[str, Any]

  @property
  def step(self) -> float:
    return statistics.median(self.seconds)

  def row(
    self, work: Work, steps: int, flops: float, *, peak: float | None, core_peak: float
  ) -> dict[str, Any]:
    """Rates of `work` and `flops`, those of `steps` steps.

    `peak` FLOP/s of the accelerators; without any, the share is of what a core does in the CPU time
    that was spent, so that other work on the machine does not count.
    """
    rate = 1 / (self.step * steps)
    cpu_seconds = statistics.median(self.cpu_seconds)
    return {
      'step_seconds': self.step,
      'cpu_seconds': cpu_seconds,
      'examples_per_second': work.examples * rate,
      'scored_per_second': work.scored * rate,
      'gflops_per_second': flops * rate / 1e9,
      'mfu': flops * rate / peak if peak else flops / steps / cpu_seconds / core_peak,
      'peak_gib': self.peak_gib,
      'seconds': self.seconds,
      'losses': self.losses,
      **self.notes,
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
  """How many times faster ours is, (of medians, (least, most) over rounds side by side).

  Args:
    ours, theirs: seconds of the same work, round by round.
  """
  if len(ours) != len(theirs) or not ours:
    raise ValueError(f'expected as many rounds on both sides, got {len(ours)} and {len(theirs)}')
  each = [b / a for a, b in zip(ours, theirs, strict=True)]
  return statistics.median(theirs) / statistics.median(ours), (min(each), max(each))


def disagreement(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
  """The largest relative difference of two runs' losses, step by step; None without any."""
  both = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
  return max((abs(a - b) / max(abs(b), 1e-30) for a, b in both), default=None)


def product_flops(size: int = 2048, times: int = 5) -> float:
  """FLOP of a square float32 matrix product in a second of CPU time, the best of `times`."""
  multiply = jax.jit(jnp.dot)
  x = jnp.ones((size, size), jnp.float32)
  multiply(x, x).block_until_ready()
  best = np.inf
  for _ in range(times):
    began = time.process_time()
    multiply(x, x).block_until_ready()
    best = min(best, time.process_time() - began)
  return 2 * size**3 / best
