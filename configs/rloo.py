"""REINFORCE leave-one-out: every sample's baseline is the mean of the prompt's other samples.

  jaxpref train --config=rloo:tiny --workdir=/tmp/rloo                   # CPU, about a minute
  jaxpref train --config=rloo --config.model=runs/sft \
    --config.rewards="reward_model('runs/rm')" \
    --config.data.train=jsonl:prompts.jsonl --workdir=runs/rloo          # one device
  jaxpref train --config=rloo:gsm8k --config.model=<Hugging Face folder> \
    --config.data.train=jsonl:gsm8k/train.jsonl.gz --workdir=runs/rloo-gsm8k

As published (https://arxiv.org/abs/2402.14740): the penalty for leaving the reference is in the
reward, and the loss is REINFORCE, one step on every rollout, without a ratio or a clip. With more
steps, --config.rollout.epochs=2, the objective is 'rloo()', which has both. ReMax, whose baseline
is the score of a greedy completion (https://arxiv.org/abs/2310.10505), is this with
--config.rollout.advantages='remax()' --config.rollout.samples=1. 'tiny', 'gsm8k' and 'svamp' are as
in configs/grpo.py.
"""

from jaxpref.cli import configs


def get_config(arg: str = ''):
  """`arg`: '' (one device), 'gsm8k', 'svamp' (their records), or 'tiny' (CPU, from scratch)."""
  c = configs.load(f'grpo:{arg}' if arg else 'grpo')
  c.objective = 'reinforce()'
  c.rollout.advantages = 'leave_one_out()'
  c.rollout.kl = 0.0 if arg == 'tiny' else 0.05  # random parameters are nothing to stay close to
  return c
