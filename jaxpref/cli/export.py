"""Writes a trained model as a Hugging Face folder: `jaxpref export --model=runs/dpo --output=dpo`.

  jaxpref export --model=runs/dpo --output=/models/dpo --dtype=bfloat16
  jaxpref export --model=runs/dpo --output=/models/dpo-best --step=best --ema

Several processes may export together, each started with the same flags and --coordinator,
--processes and --process: all read the checkpoint, process 0 writes.

The folder holds config.json, safetensors and the tokenizer's files; transformers loads it, and so
does every jaxpref command that takes --model. A run that began with a Hugging Face folder keeps the
fields of that folder's config.json.

A reward model becomes a ...ForSequenceClassification with a label for each head, beside it
normalisation.json with the mean and std of its scores. transformers reads the score at the last
token that is not padding: where the padding token also ends completions, that is one token earlier
than here, unless sequences go in one by one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console

from jaxpref import hosts, models
from jaxpref.cli.checkpoints import chosen_step, define_checkpoint_flags, load_model
from jaxpref.cli.processes import define_process_flags, join
from jaxpref.storage import is_url, open_path
from jaxpref.train import normalisation, policy
from jaxpref.typing import Params

DTYPES = ('source', 'float32', 'bfloat16', 'float16')


def define_flags() -> flags.FlagValues:
  """This command's flags, in a set of their own: commands may share names."""
  own = flags.FlagValues()
  text: dict[str, Any] = {'flag_values': own}
  flags.DEFINE_string('model', None, 'workdir of a run', **text)
  flags.DEFINE_string('output', None, 'folder to write', **text)
  flags.DEFINE_enum('dtype', 'source', DTYPES, "of the weights; source: as the run's base", **text)
  flags.DEFINE_boolean('overwrite', False, 'replace the model in --output', **text)
  define_checkpoint_flags(own)
  define_process_flags(own)
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', **text)
  return own


def main(argv: Sequence[str]) -> int:
  """Runs the command; argv[0] is its name. Mistakes raise ValueError, OSError or flags.Error."""
  own = define_flags()
  extra = own(argv)[1:]
  if own.help:
    print(f'{__doc__}\n{own.get_help()}')
    return 0
  if extra:
    raise flags.Error(f'unexpected {extra[0]!r}')
  for name in ('model', 'output'):
    if own[name].value is None:
      raise flags.Error(f'--{name} is missing: export --model=<workdir> --output=<folder>')
  if is_url(own.output):
    raise flags.Error(f'--output={own.output}: give a folder; it can be copied to a bucket then')
  writes = join(own)
  output = Path(own.output).expanduser()
  hosts.in_turn(lambda: check_output(output, own.overwrite))  # before any of them has written
  tokenizer = policy.find_tokenizer(own.model)
  model, params = load_model(own, tokenizer)
  dtype = source_dtype(model, params) if own.dtype == 'source' else own.dtype
  scores = bool(model.config.num_labels) and policy.is_workdir(own.model)
  step = chosen_step(own) if scores else None
  if not writes:
    hosts.together(lambda: None)
    return 0
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  hosts.together(lambda: models.save_hf(output, model, params, tokenizer))
  count = sum(x.size for x in jax.tree.leaves(params))
  note = f'{output}: {count / 1e6:,.1f} M parameters in {jnp.dtype(dtype).name}'
  if model.config.num_labels:
    note += f'; {export_normalisation(own, output, step)}'
  Console(soft_wrap=True).print(note, markup=False, highlight=False)
  return 0


def export_normalisation(own: flags.FlagValues, output: Path, step: int | None) -> str:
  """Writes that of the exported scores, if it is known, beside them; says what it did."""
  folder = open_path(own.model)
  known = normalisation.read(folder)
  if known and policy.is_workdir(own.model) and (own.ema or step != known.step):
    known = None
  (output / normalisation.FILE).unlink(missing_ok=True)  # of the model that was here before
  if known is None:
    return 'the mean of its scores is not known: it is measured at the end of a run'
  normalisation.write(output, known)
  return f'scores have {known} on the training data'


def check_output(folder: Path, overwrite: bool) -> None:
  """Raises ValueError where writing to `folder` would destroy something."""
  if policy.is_workdir(str(folder)):
    raise ValueError(f'--output={folder} is the workdir of a run; choose another folder')
  if (folder / 'config.json').exists() and not overwrite:
    raise ValueError(f'--output={folder} holds a model already; --overwrite replaces it')


def source_dtype(model: models.Model, params: Params) -> str:
  """The dtype that the base model's config.json names; without one that of the parameters."""
  source = json.loads(model.config.source or '{}')
  return source.get('dtype') or source.get('torch_dtype') or params['embed']['w'].dtype.name
