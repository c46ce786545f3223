"""Tunix's side of the bench, run by the Python of its own environment: `tunix_worker.py job.json`.

A job is what `trl_worker.py` says. Tunix pads every row of a batch to one length (of pairs, every
prompt to one and every completion to another), and its attention holds all scores: 16 pairs of
HH-RLHF took 21 GiB. So it takes a batch in parts, their gradients accumulated, which is faster as
well, and each of these has its own lengths, rounded up to some multiple. That is less work than one
length for everything, which its own tokenising has: batches may come ready made. Every shape is
compiled before the clock starts.
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
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer

# Ids that no token has: what is compared with them is told apart exactly, and nothing ends early.
PAD, END = -1, -2
# Its fastest: how many it takes at once, and the multiple of tokens.
PAIRS, PAIR_ROUND = 1, 128
CHATS, CHAT_ROUND = 1, 64
PROMPTS = 1
NEVER = 10**9


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


def optimizer_of(job):
  given = job['optimizer']
  return optax.chain(
    optax.snapshot('grad_norm', optax.tree.norm),
    optax.clip_by_global_norm(given['clip']),
    optax.adamw(
      given['learning_rate'], given['b1'], given['b2'], given['eps'],
      weight_decay=given['weight_decay'],
    ),
  )  # fmt: skip


def noted_norm(trainer):
  """Of the gradient of all parts of the last step."""
  state = jax.tree.leaves_with_path(nnx.state(trainer.optimizer))
  (norm,) = (x for path, x in state if 'grad_norm' in jax.tree_util.keystr(path))
  return float(norm)


def losses_of(trainer):
  """The list that the trainer's losses go to, one of each part of a step."""
  losses, buffer = [], trainer._buffer_metrics

  def kept(*args, loss, **more):
    losses.append(loss)
    return buffer(*args, loss=loss, **more)

  trainer._buffer_metrics = kept
  return losses


def mean_of(losses):
  """Also waits for them, and forgets them."""
  found = [float(loss) for loss in losses]
  losses.clear()
  return sum(found) / len(found)


def ready():
  versions = protocol.versions('google-tunix', 'jax', 'jaxlib', 'flax', 'optax')
  protocol.say(versions=versions, device=jax.devices()[0].device_kind)


def padded(rows, length, left=False):
  tokens = np.full((len(rows), length), PAD, np.int32)
  mask = np.zeros((len(rows), length), np.int32)
  for at, row in enumerate(rows):
    place = slice(length - len(row), length) if left else slice(0, len(row))
    tokens[at, place], mask[at, place] = row, 1
  return tokens, mask


def rounded(rows, multiple):
  return -(-max(map(len, rows)) // multiple) * multiple


def parts_of(job, most):
  """The batches in parts of `most` examples, and how many of them a step has."""
  size = most if job['batch'] % most == 0 else job['batch']
  pairs = job['pairs']
  return [pairs[at : at + size] for at in range(0, len(pairs), size)], job['batch'] // size


def train(trainer, batches, parts, notes):
  """Serves steps, each on the next `parts` batches."""
  trainer.is_managed_externally = True  # its loop may be entered again and again
  losses = losses_of(trainer)
  shapes = {tuple(x.shape for x in jax.tree.leaves(batch)): batch for batch in batches}
  trained = (trainer.model, trainer.optimizer)
  kept = jax.device_get([nnx.state(part) for part in trained])
  trainer.train(batches[:1])  # from here on its state is placed as the next step finds it
  trainer.train(shapes.values())
  for part, state in zip(trained, kept, strict=True):
    nnx.update(part, jax.device_put(state, jax.devices()[0]))
  losses.clear()
  notes['shapes'] = len(shapes)
  taken = 0

  def step():
    nonlocal taken
    trainer.train(batches[taken : taken + parts])
    taken += parts
    if 'grad_norm' not in notes:
      notes['grad_norm'] = noted_norm(trainer)
    return mean_of(losses)

  ready()
  protocol.serve(step, notes)


def dpo(job, notes):
  groups, parts = parts_of(job, PAIRS)
  config = dpo_trainer.DPOTrainingConfig(
    beta=job['beta'], eval_every_n_steps=NEVER, gradient_accumulation_steps=parts
  )
  model, reference = load(job['model']), load(job['model'])
  trainer = dpo_trainer.DPOTrainer(model, reference, optimizer_of(job), config)
  batches = []
  for pairs in groups:
    rows = {part: [pair[part] for pair in pairs] for part in ('prompt', 'chosen', 'rejected')}
    prompt = rounded(rows['prompt'], PAIR_ROUND)
    completion = rounded(rows['chosen'] + rows['rejected'], PAIR_ROUND)
    fields = {}
    for part in rows:
      left = part == 'prompt'
      tokens, mask = padded(rows[part], prompt if left else completion, left)
      fields |= {f'{part}_ids': tokens, f'{part}_mask': mask}
    batches.append(dpo_trainer.TrainingInput(**fields))
  train(trainer, batches, parts, notes)


def sft(job, notes):
  groups, parts = parts_of(job, CHATS)
  config = peft_trainer.TrainingConfig(eval_every_n_steps=NEVER, gradient_accumulation_steps=parts)
  trainer = peft_trainer.PeftTrainer(load(job['model']), optimizer_of(job), config)
  mean = trainer.loss_fn

  def loss(model, weight, input_tokens, input_mask, positions, attention_mask):
    """A mean over a part's tokens, weighted to make a mean over the step's."""
    return weight * mean(model, input_tokens, input_mask, positions, attention_mask)

  def inputs(batch):
    real = batch['input_tokens'] != PAD
    return batch | {
      'positions': utils.build_positions_from_mask(real),
      'attention_mask': utils.make_causal_attn_mask(real),
    }

  trainer.with_loss_fn(loss).with_gen_model_input_fn(inputs)
  batches = []
  for pairs in groups:
    rows = [pair['prompt'] + pair['chosen'] for pair in pairs]
    tokens, mask = padded(rows, rounded(rows, CHAT_ROUND))
    for at, pair in enumerate(pairs):
      mask[at, : len(pair['prompt'])] = 0
    batches.append({'input_tokens': tokens, 'input_mask': mask})
  for first in range(0, len(batches), parts):
    own = batches[first : first + parts]
    scored = [batch['input_mask'].sum() for batch in own]
    for batch, count in zip(own, scored, strict=True):
      batch['weight'] = np.float32(count * parts / sum(scored))
  train(trainer, batches, parts, notes)


class Words:
  """A tokenizer of texts as `protocol.spelt` writes them."""

  def encode(self, text):
    return [int(word[1:]) for word in text.split()]

  def decode(self, ids):
    return protocol.spelt(ids)

  def bos_id(self):
    return None

  def eos_id(self):
    return END

  def pad_id(self):
    return PAD


def prompts_of(job):
  """The texts of each step's prompts."""
  texts = [protocol.spelt(pair['prompt'][-job['max_prompt'] :]) for pair in job['pairs']]
  return [texts[at : at + job['prompts']] for at in range(0, len(texts), job['prompts'])]


def grpo(job, notes):
  """Tunix's learner in its own loop, which asks for prompts when a step is over."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
  config = rl_cluster.ClusterConfig(
    role_to_mesh=dict.fromkeys(roles, mesh),
    training_config=rl_cluster.RLTrainingConfig(
      actor_optimizer=optimizer_of(job),
      eval_every_n_steps=NEVER,
      max_steps=job['steps'] + 1,  # after the last it still asks for more, and is told to end
      mini_batch_size=job['prompts'],
      train_micro_batch_size=PROMPTS,
      compute_logps_micro_batch_size=PROMPTS,
      rollout_micro_batch_size=job['prompts'],
    ),
    rollout_config=RolloutConfig(
      max_tokens_to_generate=job['new_tokens'],
      max_prompt_length=job['max_prompt'],
      kv_cache_size=job['max_prompt'] + job['new_tokens'],
      temperature=1.0,
    ),
  )
  cluster = rl_cluster.RLCluster(
    actor=load(job['model']),
    reference=load(job['model']),
    tokenizer=Words(),
    cluster_config=config,
  )
  learner = grpo_learner.GRPOLearner(
    cluster,
    # The estimator of GRPO's paper; its default has a gradient of expectation 0.
    grpo_learner.GRPOConfig(
      num_generations=job['samples'], beta=job['kl'], kl_loss_mode='low_var_kl'
    ),
    lambda completions, **_: protocol.variety(completions),
  )
  kept = losses_of(cluster.actor_trainer)

  def asked():
    for losses, prompts in zip(protocol.turns(notes), prompts_of(job), strict=False):
      yield {'prompts': np.array(prompts)}
      losses.append(mean_of(kept))

  ready()
  learner.train(asked())


def decode(job, notes):
  model, size = load(job['model']), job['max_prompt'] + job['new_tokens']
  own = model.config
  cache = CacheConfig(size, own.num_layers, own.num_kv_heads, own.head_dim)
  sampler = Sampler(model, Words(), cache)
  steps = enumerate(prompts_of(job))

  def step():
    seed, prompts = next(steps)
    sampler(
      [prompt for prompt in prompts for _ in range(job['samples'])],
      job['new_tokens'],
      job['max_prompt'],
      temperature=1.0,
      top_p=1.0,
      seed=seed,
    )

  ready()
  protocol.serve(step, notes)


TASKS = {'dpo': dpo, 'sft': sft, 'grpo': grpo, 'decode': decode}


def main(path):
  notes = {'compile_seconds': 0.0}

  def listen(event, seconds, **_):
    if event.endswith(('jaxpr_to_mlir_module_duration', 'backend_compile_duration')):
      notes['compile_seconds'] += seconds

  jax.monitoring.register_event_duration_secs_listener(listen)
  job = json.loads(Path(path).read_text(encoding='utf-8'))
  TASKS[job['task']](job, notes)


if __name__ == '__main__':
  main(sys.argv[1])
