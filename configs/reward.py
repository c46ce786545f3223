"""A reward model from preference pairs, or a verifier of steps from labelled solutions.

  jaxpref train --config=reward:tiny --workdir=/tmp/rm                   # CPU, under a minute
  jaxpref train --config=reward --config.model=runs/sft \
    --config.data.train=jsonl:pairs.jsonl --workdir=runs/rm              # one device
  jaxpref eval --model=runs/rm --data=jsonl:test.jsonl                   # accuracy, calibration
  jaxpref train --config=reward:process --config.model=runs/sft \
    --config.data.train=jsonl:steps.jsonl --workdir=runs/prm

The model starts as the SFT model, with one score in place of its head, 0 everywhere; it may be
smaller than the policy. The score of a completion is that of its last token. The mean of the scores
on the training data is kept in the workdir, and 0 where the model is used:
--config.rewards="reward_model('runs/rm')". Runs of several seeds make an ensemble:
"minimum(reward_model('runs/rm0'), reward_model('runs/rm1'))", or penalised(..., k=1.0).
An ensemble of n heads on one decoder costs hardly more than one model: --config.heads=5, and
"penalised(reward_model('runs/rm'), k=1.0)". Its heads share what the decoder has learnt, so they
agree more than models do; 'rewards/head_std' says by how much.

A verifier of steps scores samples by its verdicts on their lines, the least, the product or the
last of them: --config.rewards="process_reward_model('runs/prm', reduce=min)".

Pairs hold prompt, chosen and rejected; with margins use bradley_terry_margin, with shares of judges
bradley_terry_soft (docs/losses.md). Steps hold prompt, completions and labels, as PRM800K and
Math-Shepherd do. One epoch at 1e-5 is what Llama 2 (arXiv 2307.09288) trained its 7B to 34B reward
models with; pairs seen twice are soon known by heart.
"""

import pathlib

from jaxpref import config

PAIRS = pathlib.Path(__file__).with_name('tiny_pairs.jsonl')
STEPS = pathlib.Path(__file__).with_name('tiny_steps.jsonl')


def get_config(arg: str = ''):
  """`arg`: '' (one device), 'tiny' (CPU, from scratch, embedded pairs), 'process' (steps), or
  'process,tiny'."""
  if arg not in ('', 'tiny', 'process', 'process,tiny'):
    raise ValueError(
      f"configs/reward.py knows the arguments '', 'tiny', 'process' and 'process,tiny', not {arg!r}"
    )
  process, tiny = arg.startswith('process'), arg.endswith('tiny')
  c = config.default()
  c.objective = 'process_reward()' if process else 'bradley_terry(centring=0.01)'
  c.data.kind = 'stepwise' if process else 'preference'
  c.data.eval_fraction = 0.05
  c.optimizer.learning_rate = 1e-5
  c.eval.every = 100
  c.checkpoint.every = 500
  if tiny:
    c.model = 'preset:tiny'
    c.data.train = f'jsonl:{STEPS if process else PAIRS}'
    c.data.eval_fraction = 0.2
    c.data.max_length = 128
    c.batch.size = 16
    c.epochs = 12.0 if process else 3.0  # steps ask for a comparison of two digits
    c.optimizer.learning_rate = 3e-3 if process else 1e-3
    c.eval.every = 10
    c.checkpoint.every = 10
  return c
