"""What the true score makes of samples: pairs with noisy labels, and evaluations of policies."""

from collections.abc import Callable, Sequence

import numpy as np

from experiments import reviews
from experiments.report import Evaluation
from jaxpref.data.dataset import Dataset, from_examples
from jaxpref.data.examples import Example
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.evals import statistics
from jaxpref.generation import Completion, encode, generate
from jaxpref.models import Model
from jaxpref.train import reference
from jaxpref.typing import Params


def example(tokenizer: Tokenizer, prompt: str, *completions: Sequence[int]) -> Example:
  """A prompt's text and its completions' tokens, as they are; all of the latter are scored."""
  tokens = tuple(np.array(completion, np.int32) for completion in completions)
  head = np.array(encode(tokenizer, prompt, 0), np.int32)
  return Example(head, tokens, tuple(np.ones(len(t), bool) for t in tokens), {})


def samples(
  model: Model,
  tokenizer: Tokenizer,
  max_new_tokens: int,
  seed: int,
  params: Params,
  prompts: Sequence[str],
  n: int,
  rollout: int,
) -> list[list[Completion]]:
  """`n` completions of each prompt at temperature 1, [P][n]."""
  flat = generate(
    model,
    params,
    tokenizer,
    prompts,
    max_new_tokens=max_new_tokens,
    num_samples=n,
    seed=seed,
    rollout=rollout,
    batch_size=256,
  )
  return [flat[i : i + n] for i in range(0, len(flat), n)]


def pairs(
  tokenizer: Tokenizer,
  temperature: float,
  seed: int,
  prompts: Sequence[str],
  completions: Sequence[Sequence[Completion]],
) -> tuple[Dataset, float]:
  """Samples two by two, the one that a noisy judge of the true score prefers first.

  Returns also how often the judge is right, among the pairs whose true scores differ.
  """
  found = [
    (prompt, a, b)
    for prompt, row in zip(prompts, completions, strict=True)
    for a, b in zip(row[::2], row[1::2], strict=True)
    if a.tokens != b.tokens
  ]
  scores = np.array([[reviews.score(prompt + c.text) for c in pair] for prompt, *pair in found])
  first = reviews.prefer(scores[:, 0], scores[:, 1], temperature, seed)
  examples = []
  for (prompt, a, b), a_wins in zip(found, first, strict=True):
    chosen, rejected = (a, b) if a_wins else (b, a)
    examples.append(example(tokenizer, prompt, chosen.tokens, rejected.tokens))
  margin = scores[:, 0] - scores[:, 1]
  right = (margin > 0) == first
  return from_examples(examples), float(right[margin != 0].mean())


def evaluations(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  steps: Sequence[int],
  samples: Sequence[Sequence[Sequence[Completion]]],
  ref_logps: Callable[[Dataset], reference.Table],
) -> list[Evaluation]:
  """Scores and KL of samples [evaluation][prompt][sample].

  The policies' log-probs are the sampler's, the reference's those of the training path; so the
  first KL, of the reference to itself, is zero only as far as the two agree.
  """
  flat = [
    (prompt, c) for each in samples for prompt, row in zip(prompts, each, strict=True) for c in row
  ]
  different = list(dict.fromkeys((prompt, c.tokens) for prompt, c in flat))  # some come again
  row = {text: i for i, text in enumerate(different)}
  data = from_examples([example(tokenizer, *text) for text in different])
  table = ref_logps(data)
  shape = len(samples), len(prompts), len(samples[0][0])
  logps, refs, mask = np.zeros((3, *shape, data.lengths[:, 1].max()))
  for i, (prompt, c) in enumerate(flat):
    at = np.unravel_index(i, shape)
    n = len(c.tokens)
    logps[at][:n], mask[at][:n] = c.logps, 1
    refs[at][:n] = table[row[prompt, c.tokens]][0]
  texts = [prompt + c.text for prompt, c in flat]
  scores = np.array([reviews.score(text) for text in texts]).reshape(shape)
  valid = np.array([reviews.in_world(text) for text in texts]).reshape(shape)
  return [
    Evaluation(
      step=step,
      completions=[[c.text for c in row] for row in samples[i]],
      scores=scores[i],
      valid=valid[i],
      kl=statistics.kl(logps[i], refs[i], mask[i]),
    )
    for i, step in enumerate(steps)
  ]
