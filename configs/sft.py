"""Supervised fine-tuning on completions, chats, plain text, or the chosen side of pairs.

  jaxpref train --config=sft:tiny --workdir=/tmp/sft                     # CPU, under a minute
  jaxpref train --config=sft --config.model=<Hugging Face folder> \
    --config.data.train=jsonl:chats.jsonl --workdir=runs/sft             # one device
  jaxpref train --config=sft:8b --config.model=<folder of Llama-3.1-8B> \
    --config.data.train=jsonl:chats.jsonl --workdir=runs/sft-8b          # v5e-64 or 8 x H100

Records hold messages, prompt and completion, or text; pairs train on `chosen`. Only completions and
the assistant's turns are scored. 2e-5 is the usual rate for full fine-tuning of 7B to 8B models.
"""

import pathlib

from jaxpref import config

TINY = pathlib.Path(__file__).with_name('tiny_pairs.jsonl')


def get_config(arg: str = ''):
  """`arg`: '' (one device), 'tiny' (CPU, from scratch, embedded pairs) or '8b' (a pod slice)."""
  c = config.default()
  c.objective = 'sft()'
  c.data.kind = 'sft'
  c.data.eval_fraction = 0.05
  c.optimizer.learning_rate = 2e-5
  c.optimizer.weight_decay = 0.01
  c.eval.every = 100
  c.checkpoint.every = 500
  if arg == 'tiny':
    c.model = 'preset:tiny'
    c.data.train = f'jsonl:{TINY}'
    c.data.eval_fraction = 0.2
    c.data.max_length = 128
    c.batch.size = 16
    c.epochs = 3.0
    c.optimizer.learning_rate = 3e-3
    c.eval.every = 10
    c.checkpoint.every = 10
  elif arg == '8b':
    c.batch.size = 128
    c.batch.row_lengths = (512, 1024, 2048)
    c.data.max_length = 2048
  elif arg:
    raise ValueError(f"configs/sft.py knows the arguments '', 'tiny' and '8b', not {arg!r}")
  return c
