"""What is measured: shapes of models, batches and lengths by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Shape(NamedTuple):
  """One size of work.

  Attributes:
    model: a preset of `jaxpref.models`, and fields of its config that differ.
    batch: pairs (or examples) a step.
    max_length: tokens of a prompt with its longer completion, at most.
    prompts, samples, new_tokens, max_prompt: of sampling: prompts a step, completions of each,
      tokens of each completion, and tokens of a prompt at most.
    dtype: of the computation.
  """

  model: str
  overrides: Mapping[str, Any]
  batch: int = 16
  max_length: int = 512
  prompts: int = 4
  samples: int = 8
  new_tokens: int = 64
  max_prompt: int = 128
  dtype: str = 'float32'


SHAPES = {
  'micro': Shape(
    'tiny', {}, batch=4, max_length=64, prompts=2, samples=2, new_tokens=8, max_prompt=16
  ),
  'cpu-6m': Shape('small', {}),
  'cpu-30m': Shape('small', {'width': 512, 'num_layers': 8, 'mlp_width': 1408}),
  'gpu-1b': Shape(
    'llama3.2-1b', {}, batch=64, max_length=1024, prompts=16, new_tokens=256, max_prompt=512,
    dtype='bfloat16',
  ),
}  # fmt: skip

TASKS = ('dpo', 'kto', 'sft', 'reward', 'grpo', 'decode', 'logprobs')
TRAINED = ('dpo', 'kto', 'sft', 'reward', 'grpo')  # tasks with a gradient
REFERRING = ('dpo', 'kto')  # tasks with a reference, in the step or from a table
SAMPLED = ('grpo', 'decode')  # tasks whose work is completions, not pairs

# The same arithmetic everywhere: AdamW at a constant rate after clipping by global norm.
OPTIMIZER = {
  'learning_rate': 5e-5, 'weight_decay': 0.0, 'b1': 0.9, 'b2': 0.999, 'eps': 1e-8, 'clip': 1.0,
}  # fmt: skip
BETA = 0.1  # of DPO and KTO
KL = 0.04  # of GRPO
