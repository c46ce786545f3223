"""What a batch is worth: useful tokens and model FLOPs, and what the devices could do.

Padding never counts, and a prompt counts once however its candidates were packed.
"""

from typing import NamedTuple

import jax
import numpy as np

from jaxpref.models import Model
from jaxpref.typing import Batch

# Peak dense bf16 FLOP/s of one chip, by its makers, as `Device.device_kind` names it.
PEAK = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


class Work(NamedTuple):
  """Counts of one batch; `context` is the mean number of keys a real token attends to."""

  examples: int
  tokens: int  # computed rows, padding left out
  computed: int  # rows, padding included
  scored: int
  context: float


def work(batch: Batch) -> Work:
  real = [np.asarray(rows.layout.examples) > 0 for rows in batch.rows]
  tokens = int(sum(r.sum() for r in real))
  keys = sum(
    int((np.asarray(rows.layout.positions) + 1)[r].sum())
    for rows, r in zip(batch.rows, real, strict=True)
  )
  return Work(
    examples=int((np.asarray(batch.fields['ids']) >= 0).sum()),
    tokens=tokens,
    computed=sum(r.size for r in real),
    scored=int(np.asarray(batch.fields['mask']).sum()),
    context=keys / max(tokens, 1),
  )


def train_flops(model: Model, todo: Work, *, frozen: bool = False) -> float:
  """Model FLOPs forward and backward; recomputation does not count.

  A matrix product is three, the forward one and two for its gradients; of `frozen` weights, with
  adapters beside them, two.
  """
  weights = todo.tokens * model.flops_per_token(0) + todo.scored * model.head_flops_per_token
  attention = todo.tokens * (model.flops_per_token(todo.context) - model.flops_per_token(0))
  return (2 if frozen else 3) * weights + 3 * attention


def peak_flops(devices: list[jax.Device] | None = None) -> float | None:
  """Of all devices together; None where one's peak is not known."""
  devices = list(jax.devices() if devices is None else devices)
  peaks = [PEAK.get(device.device_kind) for device in devices]
  known = [peak for peak in peaks if peak is not None]
  return sum(known) if len(known) == len(peaks) else None
