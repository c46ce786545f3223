"""The Hugging Face families: config.json <-> `Config`, and what each calls our parameters.

A family is one entry of `FAMILIES`: two short functions and a table of names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpref.models import spellings
from jaxpref.models.config import Config
from jaxpref.models.fields import Fields
from jaxpref.models.names import GEMMA, GPT2, LLAMA, MIXTRAL, OLMO2, PHI3, QWEN3_MOE


class Family(NamedTuple):
  """How one model_type maps to the decoder.

  Attributes:
    architecture: the class with a language-model head.
    classifier: the class with scores instead.
    read, write: config.json's fields to a `Config` and back; a decoder belongs to the family if it
      survives write and read.
    modules: our modules' paths to their names, see `names`.
    conv1d: whether layers' projections are stored [in, out], as ours, not [out, in].
    buffers: a pattern of stored tensors that hold nothing learned.
  """

  architecture: str
  classifier: str
  read: Callable[[Fields], Config]
  write: Callable[[Config], dict[str, Any]]
  modules: Mapping[str, str]
  conv1d: bool = False
  buffers: str = r'.*\.rotary_emb\.inv_freq'


def family_of(config: Config, preferred: str | None = None) -> str:
  """The model_type that can hold `config`, `preferred` if that one can.

  Raises ValueError naming, for every family, the fields that it cannot hold.
  """
  config = dataclasses.replace(config, num_labels=0)  # every family has a class with scores
  fields = [f.name for f in dataclasses.fields(Config) if f.compare]
  reasons = []
  for name in sorted(FAMILIES, key=lambda name: name != preferred):
    family = FAMILIES[name]
    try:
      again = family.read(Fields(family.write(config)))
    except ValueError as error:
      reasons.append(f'{name}: {error}')
      continue
    differing = [f for f in fields if getattr(again, f) != getattr(config, f)]
    if not differing:
      return name
    reasons.append(f'{name} cannot hold {", ".join(differing)}')
  raise ValueError(f'no Hugging Face family holds this decoder: {"; ".join(reasons)}')


def _named(stem: str, read: Callable, write: Callable, modules: Mapping[str, str]) -> Family:
  return Family(f'{stem}ForCausalLM', f'{stem}ForSequenceClassification', read, write, modules)


FAMILIES = {
  'llama': _named('Llama', spellings.read_llama, spellings.write_llama, LLAMA),
  'mistral': _named('Mistral', spellings.read_mistral, spellings.write_same_window, LLAMA),
  'qwen2': _named('Qwen2', spellings.read_qwen2, spellings.write_qwen2, LLAMA),
  'qwen3': _named('Qwen3', spellings.read_qwen3, spellings.write_qwen3, LLAMA),
  'qwen3_moe': _named('Qwen3Moe', spellings.read_qwen3_moe, spellings.write_qwen3_moe, QWEN3_MOE),
  'mixtral': _named('Mixtral', spellings.read_mixtral, spellings.write_mixtral, MIXTRAL),
  'gemma': _named('Gemma', spellings.read_gemma, spellings.write_gemma, LLAMA),
  'gemma2': _named('Gemma2', spellings.read_gemma2, spellings.write_capped_gemma, GEMMA),
  'gemma3_text': _named('Gemma3', spellings.read_gemma3, spellings.write_gemma3, GEMMA)._replace(
    classifier='Gemma3TextForSequenceClassification'
  ),
  'phi3': _named('Phi3', spellings.read_phi3, spellings.write_phi3, PHI3),
  'olmo2': _named('Olmo2', spellings.read_olmo2, spellings.write_olmo2, OLMO2),
  'gpt2': Family(
    'GPT2LMHeadModel',
    'GPT2ForSequenceClassification',
    spellings.read_gpt2,
    spellings.write_gpt2,
    GPT2,
    conv1d=True,
    buffers=r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',  # the causal mask
  ),
}


def supported() -> str:
  return ', '.join(f'{name} ({family.architecture})' for name, family in FAMILIES.items())
