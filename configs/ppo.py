"""Proximal policy optimization: a policy, its critic, and a reward of sampled completions.

  jaxpref train --config=ppo:tiny --workdir=/tmp/ppo                     # CPU, about a minute

The three stages, each beginning with what the one before it made:

  jaxpref train --config=sft --config.model=<Hugging Face folder> \
    --config.data.train=jsonl:chats.jsonl --workdir=runs/sft
  jaxpref train --config=reward --config.model=runs/sft \
    --config.data.train=jsonl:pairs.jsonl --workdir=runs/rm
  jaxpref train --config=ppo --config.model=runs/sft --config.data.train=jsonl:prompts.jsonl \
    --config.rewards="reward_model('runs/rm')" --config.rollout.critic=runs/rm --workdir=runs/ppo

The critic is a model of its own that begins as the reward model; left out, it begins as the policy
with a score of 0; rollout.critic=shared is one score on the policy's own states, which saves a
model's memory. For twenty steps it alone is trained. KL to the first policy is penalised in the
reward and steered to rollout.kl_target nats a completion; that number, not the penalty's first
weight, is what to choose. There is no dropout to turn off: no model here has any.

Small rates, one rate of 1e-6 for models of about 7B, and Adam's ε of 1e-5 are those of "The N
Implementation Details of RLHF with PPO" (Huang et al.,
https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo) and of InstructGPT
(arXiv 2203.02155), as are γ = 1, λ = 0.95, clips of 0.2 and 0.1 for the loss of the values.
"""

import pathlib

from jaxpref import config

TINY = pathlib.Path(__file__).with_name('tiny_pairs.jsonl')


def get_config(arg: str = ''):
  """`arg`: '' (one device) or 'tiny' (CPU, from scratch, embedded prompts, a rule for a reward)."""
  c = config.default()
  c.objective = 'after(20)*ppo_clip() + 0.1*value_loss()'
  c.rollout.advantages = 'gae(gamma=1.0, lam=0.95)'
  c.rollout.prompts = 512
  c.rollout.samples = 1
  c.rollout.max_new_tokens = 256
  c.rollout.epochs = 4
  c.rollout.minibatches = 8
  c.rollout.kl = 0.05
  c.rollout.kl_target = 6.0
  c.rollout.target_kl = 0.05
  c.rollout.missing_eos = 1.0
  c.data.eval_fraction = 0.05
  c.optimizer.learning_rate = 1e-6
  c.optimizer.schedule = 'linear'
  c.optimizer.eps = 1e-5
  c.log.entropy = True
  c.eval.every = 100
  c.checkpoint.every = 500
  if arg == 'tiny':
    c.model = 'preset:tiny'
    c.data.train = f'jsonl:{TINY}'
    c.data.eval_fraction = 0.1
    # The share of these that hold. An untrained model writes random bytes; it learns to shout.
    c.rewards = ' + '.join(f"0.25*regex('[A-Z]{{{n}}}', name='capitals_{n}')" for n in (1, 2, 4, 8))
    c.objective = 'after(4)*ppo_clip() + 0.1*value_loss()'
    c.rollout.prompts = 32
    c.rollout.samples = 4
    c.rollout.max_new_tokens = 12
    c.rollout.epochs = 2
    c.rollout.minibatches = 2
    c.rollout.kl = 0.01
    c.rollout.kl_target = 20.0
    c.rollout.kl_horizon = 1000.0
    c.rollout.target_kl = 0.1
    c.rollout.missing_eos = 0.0
    c.steps = 100
    c.optimizer.learning_rate = 2e-3
    c.eval.every = 20
    c.checkpoint.every = 50
  elif arg:
    raise ValueError(f"configs/ppo.py knows the arguments '' and 'tiny', not {arg!r}")
  return c
