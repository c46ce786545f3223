"""Tokenizers: Hugging Face `tokenizer.json` folders, and a built-in one whose tokens are bytes.

The byte tokenizer is a `tokenizer.json` too (256 byte symbols without merges, then pad, bos, eos),
made in memory: one class serves both, and a saved byte tokenizer loads in `transformers`.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from jaxpref.data import chat

_ROLES = (
  'bos_token',
  'eos_token',
  'pad_token',
  'unk_token',
  'sep_token',
  'cls_token',
  'mask_token',
)
_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'added_tokens.json',
  'generation_config.json',
)
# Turns read `<role>content` and end in eos; the assistant's words are marked as its own.
_BYTE_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{{ '<' + message.role + '>' }}"
  "{% if message.role == 'assistant' %}"
  '{% generation %}{{ message.content + eos_token }}{% endgeneration %}'
  '{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}'
  "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text <-> token ids, special tokens, and the chat template.

  Special tokens written out in a text ('<|im_end|>') are read as those tokens, as in transformers.
  """

  name: str
  special: Mapping[str, str]  # 'bos_token' -> '<s>', ...: what templates may name
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  stop_ids: tuple[int, ...]  # a sampler stops at these: eos and the template's end-of-turn
  special_ids: frozenset[int]
  adds_bos: bool  # plain text (no chat template) starts with bos
  vocab_size: int  # one more than the largest id
  chat_template: str | None
  fingerprint: str  # changes with anything that changes token ids
  backend: tokenizers.Tokenizer
  files: Mapping[str, bytes]

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`; adds no special tokens."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids, special tokens written out; broken UTF-8 becomes U+FFFD."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

  def apply_chat(self, messages: Sequence[chat.Message], add_generation_prompt=False) -> str:
    """The text of a conversation, special tokens (bos too, if the template has it) included."""
    return chat.render(
      self._template(),
      messages,
      add_generation_prompt=add_generation_prompt,
      special=self.special,
    )

  def generated_spans(self, messages: Sequence[chat.Message]) -> list[tuple[int, int]]:
    """Character spans of `apply_chat(messages)` that the template marks as the assistant's."""
    return chat.generated_spans(self._template(), messages, self.special)

  def save(self, folder) -> None:
    """Writes the files that this tokenizer was read from; `load_tokenizer(folder)` equals it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self.files.items():
      (folder / name).write_bytes(content)

  def _template(self) -> str:
    if self.chat_template is None:
      raise ValueError(
        f'tokenizer {self.name!r} has no chat template, so it cannot read messages; give it a '
        "'chat_template' in tokenizer_config.json (or chat_template.jinja), or use plain strings"
      )
    return self.chat_template


def load_tokenizer(source) -> Tokenizer:
  """`'byte'`, a folder with `tokenizer.json`, or the path of a `tokenizer.json`."""
  if str(source) == 'byte':
    return _make('byte', _byte_files())
  path = pathlib.Path(source).expanduser()
  folder = path.parent if path.name == 'tokenizer.json' else path
  if not (folder / 'tokenizer.json').is_file():
    there = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else 'no such folder'
    raise FileNotFoundError(
      f"no tokenizer.json in {folder} ({there}); expected 'byte' or a folder that holds one"
    )
  files = {n: (folder / n).read_bytes() for n in _FILES if (folder / n).is_file()}
  return _make(str(source), files)


def _make(name: str, files: Mapping[str, bytes]) -> Tokenizer:
  backend = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
  backend.no_truncation()  # a length limit left in the file would cut examples silently
  backend.no_padding()
  config = _json(name, files, 'tokenizer_config.json')
  special = _special_tokens(config, _json(name, files, 'special_tokens_map.json'))
  added = backend.get_added_tokens_decoder()
  special_ids = frozenset(i for i, token in added.items() if token.special)
  ids = {role: backend.token_to_id(text) for role, text in special.items()}
  for role, text in special.items():
    if ids[role] is None:
      raise ValueError(f'tokenizer {name!r}: {role} {text!r} is not in its vocabulary')
  bos_id = ids.get('bos_token')
  generation_eos = _as_list(_json(name, files, 'generation_config.json').get('eos_token_id'))
  eos_id = ids.get('eos_token', generation_eos[0] if generation_eos else None)
  if eos_id is not None and 'eos_token' not in special:
    if (eos := backend.id_to_token(eos_id)) is None:
      raise ValueError(f'tokenizer {name!r}: generation_config.json names no token: {eos_id}')
    special['eos_token'] = eos
  template = _chat_template(config, files)
  turn_end = None if template is None else _end_of_turn(template, special, backend, special_ids)
  stops = [i for i in (eos_id, *generation_eos, turn_end) if i is not None]
  adds_bos = config.get('add_bos_token')
  if not isinstance(adds_bos, bool):
    adds_bos = backend.encode('a').ids[:1] == [bos_id]
  identity = json.dumps([template, special, stops, adds_bos], sort_keys=True).encode()
  return Tokenizer(
    name=name,
    special=special,
    bos_id=bos_id,
    eos_id=eos_id,
    pad_id=ids.get('pad_token'),
    stop_ids=tuple(dict.fromkeys(stops)),
    special_ids=special_ids,
    adds_bos=adds_bos and bos_id is not None,
    vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
    chat_template=template,
    fingerprint=hashlib.sha256(files['tokenizer.json'] + b'\0' + identity).hexdigest(),
    backend=backend,
    files=files,
  )


def _json(name: str, files: Mapping[str, bytes], file: str) -> dict[str, Any]:
  try:
    return json.loads(files.get(file, b'{}'))
  except ValueError as error:
    raise ValueError(f'tokenizer {name!r}: {file} is not JSON: {error}') from error


def _special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
  """Role -> text, from the first config that has it; values are strings or {'content': ...}."""
  special: dict[str, str] = {}
  for role in _ROLES:
    for config in configs:
      value = config.get(role)
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str) and value:
        special.setdefault(role, value)
  return special


def _chat_template(config: Mapping[str, Any], files: Mapping[str, bytes]) -> str | None:
  if 'chat_template.jinja' in files:
    return files['chat_template.jinja'].decode()
  template = config.get('chat_template')
  if isinstance(template, list):  # several named templates
    named = {entry['name']: entry['template'] for entry in template}
    template = named.get('default')
  return template


def _end_of_turn(template, special, backend, special_ids) -> int | None:
  """The first special token after an assistant's words, such as <|im_end|>."""
  probe = 'jaxpref probe'
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': probe}]
  try:
    text = chat.render(template, messages, special=special)
  except ValueError:  # a template for some other shape of conversation
    return None
  _, found, tail = text.rpartition(probe)
  ids = backend.encode(tail, add_special_tokens=False).ids if found else []
  return next((i for i in ids if i in special_ids), None)


def _as_list(value) -> list:
  return list(value) if isinstance(value, list) else [value] if value is not None else []


def _byte_files() -> dict[str, bytes]:
  # The byte-level alphabet gives each byte a printable character, in this order of bytes.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab={symbol[b]: b for b in range(256)}, merges=[])
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  special = {'pad_token': '<|pad|>', 'bos_token': '<|bos|>', 'eos_token': '<|eos|>'}
  backend.add_special_tokens(list(special.values()))
  bos = special['bos_token']
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{bos} $A', special_tokens=[(bos, backend.token_to_id(bos))]
  )
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'chat_template': _BYTE_TEMPLATE,
    **special,
  }
  return {
    'tokenizer.json': backend.to_str().encode(),
    'tokenizer_config.json': json.dumps(config, indent=2).encode(),
  }
