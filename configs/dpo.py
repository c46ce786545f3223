"""Direct preference optimization from preference pairs.

  jaxpref train --config=dpo:tiny --workdir=/tmp/dpo                     # CPU, under a minute
  jaxpref train --config=dpo --config.model=<Hugging Face folder> \
    --config.data.train=jsonl:pairs.jsonl --workdir=runs/dpo             # one device
  jaxpref train --config=dpo:8b --config.model=<folder of Llama-3.1-8B> \
    --config.data.train=jsonl:pairs.jsonl --workdir=runs/dpo-8b          # v5e-64 or 8 x H100

Records hold prompt, chosen and rejected (or chosen and rejected that share a beginning), as text or
chat messages, or HH-RLHF transcripts. Learning rates are those of the paper and of Zephyr
(arXiv 2305.18290, 2310.16944): 5e-7 for full fine-tuning of 7B to 8B models, higher for small ones.
"""

import pathlib

from jaxpref import config

TINY = pathlib.Path(__file__).with_name('tiny_pairs.jsonl')


def get_config(arg: str = ''):
  """`arg`: '' (one device), 'tiny' (CPU, from scratch, embedded pairs) or '8b' (a pod slice)."""
  c = config.default()
  c.objective = 'dpo(beta=0.1)'
  c.data.kind = 'preference'
  c.data.eval_fraction = 0.05
  c.optimizer.learning_rate = 5e-7
  c.eval.every = 100
  c.checkpoint.every = 500
  if arg == 'tiny':
    c.model = 'preset:tiny'
    c.data.train = f'jsonl:{TINY}'
    c.data.eval_fraction = 0.2
    c.data.max_length = 128
    c.batch.size = 16
    c.epochs = 3.0
    c.optimizer.learning_rate = 1e-3
    c.eval.every = 10
    c.checkpoint.every = 10
  elif arg == '8b':
    c.batch.size = 128
    c.batch.row_lengths = (512, 1024, 2048)
    c.data.max_length = 2048
  elif arg:
    raise ValueError(f"configs/dpo.py knows the arguments '', 'tiny' and '8b', not {arg!r}")
  return c
