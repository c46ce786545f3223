"""Tokenizers: text <-> token ids, conversations -> token ids, special tokens.

Whatever they are read from (`vocabulary`), they are a `tokenizer.json` and its companions by the
time they come here: one class serves all, and what it saves loads in `transformers`.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from jaxpref.data import byte_level, chat, vocabulary
from jaxpref.storage import open_path

_BYTE = re.compile('<0x([0-9A-F]{2})>')  # what a vocabulary with byte fallback calls a byte
_BYTES = {symbol: byte for byte, symbol in byte_level.alphabet().items()}


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
  templates: Mapping[str, str]  # chat templates by name: 'default', 'tool_use', ...
  fingerprint: str  # changes with anything that changes token ids
  backend: tokenizers.Tokenizer
  files: Mapping[str, bytes]

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`; adds no special tokens."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids, special tokens written out; broken UTF-8 becomes U+FFFD."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

  @property
  def vocabulary(self) -> dict[str, int]:
    """Every token's id, added ones too: equal where ids mean the same."""
    return self.backend.get_vocab(with_added_tokens=True)

  @functools.cached_property
  def pieces(self) -> tuple[bytes, ...]:
    """What each token adds to a text, as bytes: a token may hold parts of characters."""
    (*_, before) = self.encode('a')  # at a text's beginning some decoders drop a space
    known = range(self.vocab_size)
    texts = self.backend.decode_batch([[before, i] for i in known], skip_special_tokens=False)
    start = self.decode([before])
    return tuple(self._piece(i, texts[i].removeprefix(start)) for i in known)

  def _piece(self, token: int, text: str) -> bytes:
    if '\ufffd' not in text:
      return text.encode()
    symbol = self.backend.id_to_token(token) or ''
    if byte := _BYTE.fullmatch(symbol):
      return bytes([int(byte[1], 16)])
    if not set(symbol) <= _BYTES.keys():
      return text.encode()  # it is that character
    return bytes(_BYTES[character] for character in symbol)

  @property
  def chat_template(self) -> str | None:
    """The template of conversations without tools."""
    return self.templates.get('default')

  def render_chat(
    self,
    messages: Sequence[chat.Message],
    add_generation_prompt: bool = False,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
  ) -> chat.Rendering:
    """The text of a conversation and the spans that its template marks as the assistant's words.

    Special tokens (bos too, if the template has it) are written out in the text. With tools the
    template called 'tool_use' is taken where there is one. `variables` are what else the template
    knows, such as `enable_thinking=False`; see `chat.render`.
    """
    name = 'tool_use' if tools is not None and 'tool_use' in self.templates else 'default'
    if name not in self.templates:
      others = f' called default, only {sorted(self.templates)}' if self.templates else ''
      raise ValueError(
        f'tokenizer {self.name!r} has no chat template{others}, so it cannot read messages; give '
        "it a 'chat_template' in tokenizer_config.json (or chat_template.jinja), or use plain "
        'strings'
      )
    return chat.render(
      self.templates[name],
      messages,
      tools=tools,
      documents=documents,
      add_generation_prompt=add_generation_prompt,
      variables={**self.special, **variables},
    )

  def apply_chat(
    self, messages: Sequence[chat.Message], add_generation_prompt: bool = False, **options: Any
  ) -> str:
    """The text of a conversation; options as in `render_chat`."""
    return self.render_chat(messages, add_generation_prompt, **options).text

  def encode_chat(
    self, messages: Sequence[chat.Message], add_generation_prompt: bool = False, **options: Any
  ) -> tuple[list[int], list[bool] | None]:
    """Token ids of a conversation, and which of them its template marks as the assistant's words.

    A token that reaches into a marked span belongs to it. None where the template marks nothing.
    """
    text, spans = self.render_chat(messages, add_generation_prompt, **options)
    encoding = self.backend.encode(text, add_special_tokens=False)
    if not spans:
      return encoding.ids, None
    marked = [any(a < end and start < b for start, end in spans) for a, b in encoding.offsets]
    return encoding.ids, marked

  def save(self, folder) -> None:
    """Writes a Hugging Face folder; `load_tokenizer(folder)` equals this tokenizer."""
    for name, content in self.files.items():
      path = open_path(folder) / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)


def load_tokenizer(source) -> Tokenizer:
  """`'byte'`, a folder, or the path of a file; `vocabulary` says which kinds there are."""
  return _make(str(source), vocabulary.read(source))


def _make(name: str, files: Mapping[str, bytes]) -> Tokenizer:
  try:
    backend = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
  except Exception as error:  # the library raises bare ones
    raise ValueError(f'tokenizer {name!r}: cannot read its tokenizer.json: {error}') from error
  backend.no_truncation()  # a length limit left in the file would cut examples silently
  backend.no_padding()
  added = vocabulary.add_tokens(name, backend, files)
  config = vocabulary.read_json(name, files, 'tokenizer_config.json')
  generation = vocabulary.read_json(name, files, 'generation_config.json')
  special = vocabulary.special_tokens(
    config, vocabulary.read_json(name, files, 'special_tokens_map.json')
  )
  special_ids = frozenset(
    i for i, token in backend.get_added_tokens_decoder().items() if token.special
  )
  ids = {role: backend.token_to_id(text) for role, text in special.items()}
  for role, text in special.items():
    if ids[role] is None:
      raise ValueError(
        f'tokenizer {name!r}: {role} {text!r} is not in its vocabulary; give it an id that the '
        'model knows, in added_tokens.json, or take the role out of tokenizer_config.json'
      )
  bos_id = ids.get('bos_token')
  generation_eos = _as_list(generation.get('eos_token_id'))
  eos_id = ids.get('eos_token', generation_eos[0] if generation_eos else None)
  if eos_id is not None and 'eos_token' not in special:
    if (eos := backend.id_to_token(eos_id)) is None:
      raise ValueError(f'tokenizer {name!r}: generation_config.json names no token: {eos_id}')
    special['eos_token'] = eos
  templates = _templates(name, config, files)
  template = templates.get('default')
  turn_end = None if template is None else _end_of_turn(template, special, backend, special_ids)
  stops = [i for i in (eos_id, *generation_eos, turn_end) if i is not None]
  adds_bos = config.get('add_bos_token')
  if not isinstance(adds_bos, bool):
    adds_bos = backend.encode('a').ids[:1] == [bos_id]
  identity = json.dumps([templates, special, stops, adds_bos, added], sort_keys=True).encode()
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
    templates=templates,
    fingerprint=hashlib.sha256(files['tokenizer.json'] + b'\0' + identity).hexdigest(),
    backend=backend,
    files=files,
  )


def _templates(name: str, config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, str]:
  """Chat templates by name; where there are files of them, tokenizer_config.json has no say."""
  folder = f'{vocabulary.TEMPLATES}/'
  try:
    written = {
      file.removeprefix(folder).removesuffix('.jinja'): content.decode()
      for file, content in files.items()
      if file.startswith(folder)
    }
    if 'chat_template.jinja' in files:
      written['default'] = files['chat_template.jinja'].decode()
    template = config.get('chat_template') or {}
    if isinstance(template, str):
      template = {'default': template}
    elif isinstance(template, list):
      template = {str(entry['name']): str(entry['template']) for entry in template}
    return written or dict(template)
  except (TypeError, KeyError, ValueError) as error:
    raise ValueError(
      f'tokenizer {name!r}: a chat template should be UTF-8 text, or in tokenizer_config.json a '
      f"list of {{'name', 'template'}}; {type(error).__name__}: {error}"
    ) from error


def _end_of_turn(template, special, backend, special_ids) -> int | None:
  """The first special token after an assistant's words, such as <|im_end|>."""
  probe = 'jaxpref probe'
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': probe}]
  try:
    text = chat.render(template, messages, variables=special).text
  except ValueError:  # a template for some other shape of conversation
    return None
  _, found, tail = text.rpartition(probe)
  ids = backend.encode(tail, add_special_tokens=False).ids if found else []
  return next((i for i in ids if i in special_ids), None)


def _as_list(value) -> list:
  return list(value) if isinstance(value, list) else [value] if value is not None else []
