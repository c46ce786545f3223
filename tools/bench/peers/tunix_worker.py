"""Tunix's side of the bench, run by the Python of its own environment: `tunix_worker.py job.json`.

A job is what `trl_worker.py` says. Tunix pads every prompt to one length and every completion to
another, and its attention holds all scores: 16 pairs of HH-RLHF took 21 GiB. So it takes a batch in
`MICRO` pairs at a time, its gradients accumulated, which is faster as well, and each of these has
its own two lengths, rounded up to `ROUND` tokens. That is less work than the one pair of lengths
for everything that its own tokenising has: batches may come ready made. Every shape is compiled
before the clock starts.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft.dpo import dpo_trainer

PAD = 0
ROUND = 128
MICRO = 4


def load(folder):
  """The model of a Llama's folder, with its own float32 weights."""
  given = json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8'))
  if given['model_type'] != 'llama' or given.get('rope_scaling'):
    raise SystemExit("Tunix's side is a Llama without scaled rotary positions: take a cpu preset")
  config = llama3.ModelConfig(
    num_layers=given['num_hidden_layers'],
    vocab_size=given['vocab_size'],
    embed_dim=given['hidden_size'],
    hidden_dim=given['intermediate_size'],
    num_heads=given['num_attention_heads'],
    head_dim=given['head_dim'],
    num_kv_heads=given['num_key_value_heads'],
    rope_theta=given['rope_theta'],
    norm_eps=given['rms_norm_eps'],
    weight_tying=given['tie_word_embeddings'],
    remat_config=llama3.RematConfig.NONE,  # its fastest
  )
  # 0.1.7 turns every Llama by the function's own default, whatever the config's rope_theta.
  llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=given['rope_theta'])
  return llama3_params.create_model_from_safe_tensors(folder, config, dtype=jnp.float32)


def padded(rows, length, left=False):
  tokens = np.full((len(rows), length), PAD, np.int32)
  mask = np.zeros((len(rows), length), np.int32)
  for at, row in enumerate(rows):
    place = slice(length - len(row), length) if left else slice(0, len(row))
    tokens[at, place], mask[at, place] = row, 1
  return tokens, mask


def batch_of(pairs):
  def longest(*parts):
    size = max(len(pair[part]) for pair in pairs for part in parts)
    return -(-size // ROUND) * ROUND

  fields = {}
  for part, length in (
    ('prompt', longest('prompt')),
    ('chosen', longest('chosen', 'rejected')),
    ('rejected', longest('chosen', 'rejected')),
  ):
    rows = [pair[part] for pair in pairs]
    fields[f'{part}_ids'], fields[f'{part}_mask'] = padded(rows, length, left=part == 'prompt')
  return dpo_trainer.TrainingInput(**fields)


class Trainer(dpo_trainer.DPOTrainer):
  """The trainer, its losses kept."""

  def _buffer_metrics(self, buffer, loss, step, additional_metrics=None):
    self.losses.append(loss)
    return super()._buffer_metrics(buffer, loss, step, additional_metrics)

  def losses_of(self, batches):
    self.losses = []
    self.train(batches)
    return [float(loss) for loss in self.losses]


def dpo(job, notes):
  given = job['optimizer']
  optimizer = optax.chain(
    optax.clip_by_global_norm(given['clip']),
    optax.adamw(
      given['learning_rate'], given['b1'], given['b2'], given['eps'],
      weight_decay=given['weight_decay'],
    ),
  )  # fmt: skip
  micro = MICRO if job['batch'] % MICRO == 0 else job['batch']
  parts = job['batch'] // micro
  config = dpo_trainer.DPOTrainingConfig(
    beta=job['beta'], eval_every_n_steps=10**9, gradient_accumulation_steps=parts
  )
  trainer = Trainer(load(job['model']), load(job['model']), optimizer, config)
  trainer.is_managed_externally = True  # its loop may be entered again and again
  pairs = job['pairs']
  batches = [batch_of(pairs[at : at + micro]) for at in range(0, len(pairs), micro)]
  shapes = {(b.prompt_ids.shape[1], b.chosen_ids.shape[1]): b for b in batches}
  trained = (trainer.model, trainer.optimizer)
  kept = jax.device_get([nnx.state(part) for part in trained])
  trainer.losses_of(batches[:1])  # from here on its state is placed as the next step finds it
  trainer.losses_of(shapes.values())
  for part, state in zip(trained, kept, strict=True):
    nnx.update(part, jax.device_put(state, jax.devices()[0]))
  notes['shapes'] = len(shapes)
  taken = 0

  def step():
    nonlocal taken
    taken += parts
    losses = trainer.losses_of(batches[taken - parts : taken])
    return sum(losses) / len(losses)

  return step


def main(path):
  notes = {'compile_seconds': 0.0}

  def listen(event, seconds, **_):
    if event.endswith(('jaxpr_to_mlir_module_duration', 'backend_compile_duration')):
      notes['compile_seconds'] += seconds

  jax.monitoring.register_event_duration_secs_listener(listen)
  job = json.loads(Path(path).read_text(encoding='utf-8'))
  step = dpo(job, notes)
  versions = protocol.versions('google-tunix', 'jax', 'jaxlib', 'flax', 'optax')
  protocol.say(versions=versions, device=jax.devices()[0].device_kind)
  protocol.serve(step, notes)


if __name__ == '__main__':
  main(sys.argv[1])
