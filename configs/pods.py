"""Ready settings for slices of TPUs, each one planned (see docs/scaling.md).

  jaxpref plan --config=pods:llama3.1-8b-dpo --topology=v5e:8x8
  jaxpref train --config=pods:llama3.1-8b-dpo --config.model=<folder of Llama-3.1-8B> \
    --config.data.train=jsonl:pairs.jsonl --workdir=/mnt/bucket/dpo

Batches are in pairs; rows hold a prompt of 512 tokens with two completions of 512.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpref import config


class Pod(NamedTuple):
  """A setting, and the slice that it was planned for."""

  topology: str
  model: str
  objective: str
  rate: float
  changes: Mapping[str, Any]


ROWS = {'batch.row_lengths': (1536,)}
SIMPO = 'simpo(beta=2.0, gamma=1.0)'
DPO = 'dpo(beta=0.1)'
B8, B70, SMALL = 'llama3.1-8b', 'llama3.1-70b', 'qwen3-0.6b'
STEPS: Mapping[str, Any] = {'batch.size': 64}
SMALL_STEPS: Mapping[str, Any] = {'batch.size': 16, 'batch.microbatches': 4, 'keep_logits': True}
LORA: Mapping[str, Any] = {'lora.rank': 16, 'lora.alpha': 32.0}
PODS = {
  'llama3.1-8b-dpo': Pod('v5e:8x8', B8, DPO, 5e-7, STEPS),
  'llama3.1-8b-simpo': Pod('v5e:8x8', B8, SIMPO, 1e-6, STEPS),
  'llama3.1-8b-dpo-v5p': Pod('v5p:4x4x4', B8, DPO, 5e-7, STEPS),
  'llama3.1-8b-simpo-v5p': Pod('v5p:4x4x4', B8, SIMPO, 1e-6, STEPS),
  'llama3.1-8b-dpo-lora': Pod('v5e:8x8', B8, DPO, 1e-5, {**STEPS, **LORA}),
  'llama3.1-8b-dpo-lora-v5p': Pod('v5p:4x4x4', B8, DPO, 1e-5, {**STEPS, **LORA}),
  'qwen3-0.6b-dpo': Pod('v5e:2x2', SMALL, DPO, 1e-6, SMALL_STEPS),
  'llama3.1-70b-dpo': Pod('v5p:8x8x8', B70, DPO, 5e-7, {'batch.size': 512}),
}


def get_config(arg: str = 'llama3.1-8b-dpo'):
  """`arg`: a name in `PODS`."""
  if arg not in PODS:
    raise ValueError(f'configs/pods.py knows {", ".join(PODS)}, not {arg!r}')
  pod = PODS[arg]
  c = config.default()
  c.model = f'preset:{pod.model}'
  c.objective = pod.objective
  c.data.kind = 'preference'
  c.data.eval_fraction = 0.05
  c.data.max_length = 1024
  c.optimizer.learning_rate = pod.rate
  c.eval.every = 100
  c.checkpoint.every = 500
  c.update_from_flattened_dict({**ROWS, **pod.changes})
  return c
