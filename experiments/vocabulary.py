"""A small byte-level BPE vocabulary of a world's own, learned from its texts in under a second.

Words become one token each, so a decoder of a few hundred thousand parameters hardly ever misspells
one; any other text can still be written, byte by byte.
"""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxpref.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = {'pad_token': '<|pad|>', 'bos_token': '<|bos|>', 'eos_token': '<|eos|>'}


def learn(texts: Iterable[str], size: int, folder: pathlib.Path) -> Tokenizer:
  """Learns at most `size` tokens, writes them to `folder` as a Hugging Face tokenizer, reads it.

  Tokens never join two words, nor a word and a full stop: a prompt that ends with a word is the
  same tokens alone and in a review.
  """
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=list(SPECIAL.values()),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  folder.mkdir(parents=True, exist_ok=True)
  backend.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': True, **SPECIAL}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2))
  return load_tokenizer(folder)
