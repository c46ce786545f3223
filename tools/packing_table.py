"""What packing saves on a data set: tokens computed per pair under three layouts, and equal losses.

python -m tools.packing_table --data=jsonl:pairs.jsonl --tokenizer=<folder> [--max_length=512]
"""

import argparse

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxpref import data, models
from jaxpref.data.batches import Batches, Packing
from jaxpref.objectives import dpo
from jaxpref.train.step import make_fields

LAYOUTS = {
  'padded': Packing(alone=True, share_prompts=False),
  'packed': Packing(share_prompts=False),
  'packed, prompts shared': Packing(),
}
LOSS_BATCH = 8


class Flat:
  """A reference that gives every token the same log-prob: the loss is then that of a real batch."""

  def __init__(self, dataset: data.Dataset):
    self._lengths = dataset.lengths

  def __getitem__(self, i: int) -> list[np.ndarray]:
    return [np.full(n, -5.0, np.float32) for n in self._lengths[i, 1:]]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--data', required=True)
  parser.add_argument('--tokenizer', default='byte')
  parser.add_argument('--columns', default='', help='as config.data.columns')
  parser.add_argument('--max_length', type=int, default=512)
  parser.add_argument('--sizes', type=int, nargs='*', default=[16, 64])
  parser.add_argument('--batches', type=int, default=50)
  args = parser.parse_args()
  tokenizer = data.load_tokenizer(args.tokenizer)
  dataset = data.load(
    args.data, tokenizer, columns=args.columns, kind='preference', max_length=args.max_length
  )
  unique = dataset.lengths.sum(1).mean()
  console = Console()
  scored = dataset.lengths[:, 1:].sum(1).mean()
  console.print(f'{len(dataset):,} pairs, {unique:.0f} unique and {scored:.0f} scored tokens each')

  table = Table('pairs a batch', 'layout', 'tokens a pair', 'of unique', 'scored slots', 'shapes')
  for size in args.sizes:
    for name, packing in LAYOUTS.items():
      batches = Batches(dataset, size, seed=0, packing=packing)
      shapes = [batches.shape_of(step) for step in range(args.batches)]
      mine = sum(dataset.lengths[batches.indices(step)].sum() for step in range(args.batches))
      scored = sum(dataset.lengths[batches.indices(step), 1:].sum() for step in range(args.batches))
      tokens = sum(shape.tokens for shape in shapes)
      table.add_row(
        str(size),
        name,
        f'{tokens / args.batches / size:.0f}',
        f'{tokens / mine:.3f}',
        f'{sum(shape.scored for shape in shapes) / scored:.3f}',
        str(len(set(shapes))),
      )
  console.print(table)

  model, params = models.init(
    models.preset('tiny', vocab_size=tokenizer.vocab_size), jax.random.key(0)
  )
  for name, packing in LAYOUTS.items():
    reference = {'ref_logps': Flat(dataset)}
    batch = Batches(dataset, LOSS_BATCH, seed=0, packing=packing, tables=reference)[0]
    fields = jax.jit(make_fields(model, dpo()))(params, None, batch)
    loss, _ = dpo(beta=0.1)({k: v for k, v in fields.items() if k != 'ids'})
    console.print(f'dpo loss of {LOSS_BATCH} pairs, {name}: {float(loss):.7f}')


if __name__ == '__main__':
  main()
