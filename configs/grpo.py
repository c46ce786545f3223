"""Group relative policy optimization: reinforcement learning with rewards that can be verified.

  jaxpref train --config=grpo:tiny --workdir=/tmp/grpo                   # CPU, about a minute
  jaxpref train --config=grpo:gsm8k --config.model=<Hugging Face folder> \
    --config.data.train=jsonl:gsm8k/train.jsonl.gz --workdir=runs/grpo   # one device
  jaxpref train --config=grpo:svamp --config.model=<Hugging Face folder> \
    --config.data.train=jsonl:svamp/train.jsonl --workdir=runs/grpo-svamp

'tiny' starts from random parameters, so what is learnt is how to answer: reward goes from 0 to 0.5
as completions become numbers, long before any of them is the sum. `python -m experiments.addition`
goes on from there, from a supervised model to sums that are right.

'' takes records with prompt and answer, as chats or text. The answer is read as GSM8K's is: the
number after ####, in \\boxed{}, or the last one. One optimizer step a rollout, so exactly on
policy; the penalty that DeepSeekMath has (https://arxiv.org/abs/2402.03300, eq. 3) needs a
reference in memory: --config.objective='grpo() + 0.04*kl(reduce=sequence_mean)'. Dr. GRPO is
--config.objective='dr_grpo()' --config.rollout.advantages='group_baseline(scale=no_scale)', DAPO
'dapo()' with --config.rollout.tries=4 --config.rollout.mask_truncated. 1e-6 is the paper's rate for
a model of 7B.
"""

import pathlib

from jaxpref import config

TINY = pathlib.Path(__file__).with_name('tiny_sums.jsonl')
FORMAT = "0.2*regex('^[0-9]', name='digit') + 0.3*regex('^[0-9]{2,3}$', name='number')"
COLUMNS = {
  'gsm8k': r'prompt={question}\nThink step by step and write the answer, a number, after ####.\n',
  'svamp': r'prompt={Body} {Question}\nWrite the answer, a number, after ####.\n',
}
KEYS = {'gsm8k': 'answer', 'svamp': 'Answer'}  # of records


def get_config(arg: str = ''):
  """`arg`: '' (one device), 'gsm8k', 'svamp' (their records), or 'tiny' (CPU, from scratch)."""
  c = config.default()
  c.objective = 'grpo()'
  c.rewards = f'numeric_answer(key={KEYS.get(arg, "answer")})'
  c.rollout.prompts = 64
  c.rollout.samples = 8
  c.rollout.max_new_tokens = 512
  c.rollout.advantages = 'group_baseline()'
  c.data.kind = 'prompt'
  c.data.eval_fraction = 0.02
  c.optimizer.learning_rate = 1e-6
  c.optimizer.schedule = 'constant'
  c.optimizer.warmup = 0.02
  c.log.entropy = True
  c.eval.every = 50
  c.eval.temperature = 0.0
  c.checkpoint.every = 50
  if arg in COLUMNS:
    c.data.columns = COLUMNS[arg]
  elif arg == 'tiny':
    tiny(c)
  elif arg:
    raise ValueError(
      f"configs/grpo.py knows the arguments '', 'gsm8k', 'svamp' and 'tiny', not {arg!r}"
    )
  return c


def tiny(c) -> None:
  """Sums of two numbers from random parameters: first the form of an answer, worth a half."""
  c.model = 'preset:tiny'
  c.rewards = f'{FORMAT} + exact_match(key=answer)'
  c.data.train = f'jsonl:{TINY}'
  c.data.eval_fraction = 0.2
  c.data.max_length = 16
  c.rollout.prompts = 32
  c.rollout.samples = 16
  c.rollout.max_new_tokens = 4
  c.rollout.missing_eos = 0.2  # what only stops is on its way, too
  c.rollout.show = 20
  c.steps = 80
  c.optimizer.learning_rate = 3e-3
  c.eval.every = 20
  c.eval.temperature = 1.0
  c.checkpoint.every = 20
