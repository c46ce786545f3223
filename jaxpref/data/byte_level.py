"""Byte-level BPE: GPT-2 style vocabularies with merges, and the built-in tokenizer of bytes.

Every byte of a text has a printable character; merges join them.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

_END = '<|endoftext|>'
# Splits at contractions, then into runs of letters with a character before, single digits,
# punctuation with the line breaks after it, line breaks, and spaces: https://arxiv.org/abs/2309.16609
_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# What transformers' class of a folder without tokenizer.json says about its special tokens.
KINDS: Mapping[str, Mapping[str, str]] = {
  'GPT2Tokenizer': {'bos_token': _END, 'eos_token': _END, 'unk_token': _END},
  'CodeGenTokenizer': {'bos_token': _END, 'eos_token': _END, 'unk_token': _END},
  'Qwen2Tokenizer': {'eos_token': _END, 'pad_token': _END, 'unk_token': _END},
}
# Turns read `<role>content` and end in eos; the assistant's words are marked as its own.
_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{{ '<' + message.role + '>' }}"
  "{% if message.role == 'assistant' %}"
  '{% generation %}{{ message.content + eos_token }}{% endgeneration %}'
  '{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}'
  "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def convert(
  vocabulary: pathlib.Path, merges: pathlib.Path, kind: str, *, prefix_space: bool = False
) -> tokenizers.Tokenizer:
  """The backend of a vocabulary (JSON, symbol -> id) and merges (a pair of symbols a line).

  Args:
    kind: the tokenizer class of transformers, a key of `KINDS`; it says how text is split.
    prefix_space: put a space before a text that starts with none.
  """
  if kind not in KINDS:
    raise ValueError(
      f'{vocabulary}: how {kind} splits text before its merges is not known here, only for '
      f'{", ".join(KINDS)}; have transformers save its tokenizer.json'
    )
  try:
    vocab = json.loads(vocabulary.read_bytes())
    backend = tokenizers.Tokenizer(models.BPE(vocab, list(_read_merges(merges))))
  except Exception as error:  # the library raises bare ones
    raise ValueError(f'{vocabulary}, {merges.name}: {error}') from error
  if kind == 'Qwen2Tokenizer':
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(_QWEN2), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
      ]
    )
  else:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
  backend.decoder = decoders.ByteLevel()
  if _END in vocab:
    backend.add_special_tokens([_END])
  return backend


def _read_merges(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  for number, line in enumerate(path.read_text('utf-8').split('\n'), 1):
    if not line.strip() or (number == 1 and line.startswith('#version')):
      continue
    parts = line.rstrip('\r').split(' ')
    if len(parts) != 2:
      raise ValueError(f'line {number}: expected two symbols and a space between, got {line!r:.60}')
    yield parts[0], parts[1]


def alphabet() -> dict[int, str]:
  """The printable character that stands for each byte in a byte-level vocabulary."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_files() -> dict[str, bytes]:
  """A Hugging Face folder whose token ids are the bytes, then pad, bos and eos."""
  symbol = alphabet()
  backend = tokenizers.Tokenizer(models.BPE(vocab={symbol[b]: b for b in range(256)}, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  special = {'pad_token': '<|pad|>', 'bos_token': '<|bos|>', 'eos_token': '<|eos|>'}
  backend.add_special_tokens(list(special.values()))
  bos = special['bos_token']
  backend.post_processor = processors.TemplateProcessing(
    single=f'{bos} $A', special_tokens=[(bos, backend.token_to_id(bos))]
  )
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'chat_template': _TEMPLATE,
    **special,
  }
  return {
    'tokenizer.json': backend.to_str().encode(),
    'tokenizer_config.json': json.dumps(config, indent=2).encode(),
  }
