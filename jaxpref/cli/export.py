"""Writes a trained model as a Hugging Face folder: `jaxpref export --model=runs/dpo --output=dpo`.

  jaxpref export --model=runs/dpo --output=/models/dpo --dtype=bfloat16
  jaxpref export --model=runs/dpo --output=/models/dpo-best --step=best --ema

The folder holds config.json, safetensors and the tokenizer's files; transformers loads it, and so
does every jaxpref command that takes --model. A run that began with a Hugging Face folder keeps the
fields of that folder's config.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console

from jaxpref import models
from jaxpref.cli.checkpoints import define_checkpoint_flags, load_model
from jaxpref.train import policy
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
  output = Path(own.output).expanduser()
  check_output(output, own.overwrite)
  tokenizer = policy.find_tokenizer(own.model)
  model, params = load_model(own, tokenizer)
  dtype = source_dtype(model, params) if own.dtype == 'source' else own.dtype
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  models.save_hf(output, model, params, tokenizer)
  count = sum(x.size for x in jax.tree.leaves(params))
  note = f'{output}: {count / 1e6:,.1f} M parameters in {jnp.dtype(dtype).name}'
  Console(soft_wrap=True).print(note, markup=False, highlight=False)
  return 0


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
