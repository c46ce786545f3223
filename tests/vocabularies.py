"""Small Hugging Face tokenizer folders, written by the tests that need their quirks."""

import json

import tokenizers

from jaxpref.data.tokenizer import load_tokenizer

# Roles as letters, turns end in <end> and a newline that no sampler gets to.
CHAT = (
  '{{ bos_token }}{% for message in messages %}{{ message.role[0] + ":" + message.content }}'
  '{{ "<end>\\n" }}{% endfor %}{% if add_generation_prompt %}{{ "a:" }}{% endif %}'
)


def write_tokenizer(folder, *, merges=(), special=None, added=(), config=None, generation=None):
  """A byte-level BPE folder: one symbol a byte, `merges`, then the special tokens."""
  folder.mkdir(parents=True, exist_ok=True)
  symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {symbol: i for i, symbol in enumerate([*symbols, *(a + b for a, b in merges)])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  special = {} if special is None else special
  backend.add_special_tokens(
    [v if isinstance(v, str) else v['content'] for v in special.values()] + list(added)
  )
  backend.enable_truncation(max_length=3)  # files carry such limits; they must not apply
  backend.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({**special, **(config or {})}))
  if generation:
    (folder / 'generation_config.json').write_text(json.dumps(generation))
  return folder


def merging(folder, **options):
  """A tokenizer in which 'a' + 'b' is one token; bos '<s>', eos '</s>', end of turn '<end>'."""
  options = {
    'merges': [('a', 'b')],
    'special': {'bos_token': '<s>', 'eos_token': '</s>'},
    'added': ['<end>'],
    'config': {'chat_template': CHAT},
    **options,
  }
  return load_tokenizer(write_tokenizer(folder, **options))
