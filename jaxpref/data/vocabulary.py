"""The files of a tokenizer, wherever it comes from, as those of a Hugging Face folder.

  tokenizer.json, or any other name given as a path (.json, .json.gz)      as it is
  vocab.json|encoder.json + merges.txt|vocab.bpe    byte-level BPE as of GPT-2 and Qwen2
  tokenizer.model, or any other *.model             SentencePiece
  'byte'                                            256 bytes, then pad, bos and eos

The last three become a tokenizer.json, which `transformers` opens with the same ids.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors

from jaxpref.data import byte_level, sentencepiece
from jaxpref.storage import is_url, open_url

ROLES = (
  'bos_token',
  'eos_token',
  'pad_token',
  'unk_token',
  'sep_token',
  'cls_token',
  'mask_token',
)
_USUAL = {
  'bos_token': ('<s>', '<|begin_of_text|>', '<bos>', '<|endoftext|>'),
  'eos_token': ('</s>', '<|end_of_text|>', '<eos>', '<|endoftext|>'),
  'pad_token': ('<pad>', '[PAD]'),
  'unk_token': ('<unk>',),
}
TEMPLATES = 'additional_chat_templates'  # a folder of named ones
_COMPANIONS = (
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'added_tokens.json',
  'generation_config.json',
)
_VOCABULARIES, _MERGES = ('vocab.json', 'encoder.json'), ('merges.txt', 'vocab.bpe')


def read(source) -> dict[str, bytes]:
  """File name -> content: tokenizer.json, and those of its companions that there are.

  Raises FileNotFoundError or ValueError naming the file, what was expected and what came.
  """
  if str(source) == 'byte':
    return byte_level.byte_files()
  path = open_url(source) if is_url(source) else pathlib.Path(source).expanduser()
  if path.name in _VOCABULARIES + _MERGES:
    path = path.parent
  folder = path if path.is_dir() else path.parent
  main = _main_file(path)
  files = {n: (folder / n).read_bytes() for n in _COMPANIONS if (folder / n).is_file()}
  for template in sorted((folder / TEMPLATES).glob('*.jinja')):
    files[f'{TEMPLATES}/{template.name}'] = template.read_bytes()
  if main.name.endswith(('.json', '.json.gz')) and main.name not in _VOCABULARIES:
    files['tokenizer.json'] = _unpacked(main)
    return _usual_config(str(source), files) | files
  config = read_json(str(source), files, 'tokenizer_config.json')
  if main.suffix == '.model':
    backend, special = _sentencepiece(main, config)
    return _converted(str(source), backend, special, files, adds_bos=True)
  kind = _class(config) or 'GPT2Tokenizer'
  merges = next(folder / m for m in _MERGES if (folder / m).is_file())
  spaced = bool(config.get('add_prefix_space', False))
  backend = byte_level.convert(main, merges, kind, prefix_space=spaced)
  return _converted(str(source), backend, byte_level.KINDS[kind], files, adds_bos=False)


def read_json(name: str, files: Mapping[str, bytes], file: str) -> dict[str, Any]:
  """The JSON object in a file, {} where there is no such file."""
  try:
    value = json.loads(files.get(file, b'{}'))
  except ValueError as error:
    raise ValueError(f'tokenizer {name!r}: {file} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'tokenizer {name!r}: {file} should hold a JSON object, got {value!r:.60}')
  return value


def special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
  """Role -> text, from the first config that has it; values are strings or {'content': ...}."""
  special: dict[str, str] = {}
  for role in ROLES:
    for config in configs:
      value = config.get(role)
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str) and value:
        special.setdefault(role, value)
  return special


def add_tokens(
  name: str, backend: tokenizers.Tokenizer, files: Mapping[str, bytes]
) -> list[tuple[int, str]]:
  """Gives `backend` the added tokens that only its companion files know; returns them.

  'added_tokens_decoder' of tokenizer_config.json (id -> token), added_tokens.json (text -> id).
  """
  config = read_json(name, files, 'tokenizer_config.json')
  there = {token.content for token in backend.get_added_tokens_decoder().values()}
  named = set(special_tokens(config, read_json(name, files, 'special_tokens_map.json')).values())
  added = []
  for i, fields in sorted(_listed(name, config, files).items()):
    text = fields['content']
    if text in there:
      continue
    flags = {key: bool(fields.get(key)) for key in ('single_word', 'lstrip', 'rstrip')}
    special = bool(fields.get('special', text in named))
    normalized = bool(fields.get('normalized', not special))
    backend.add_tokens(
      [tokenizers.AddedToken(text, normalized=normalized, special=special, **flags)]
    )
    if backend.token_to_id(text) != i:
      raise ValueError(
        f'tokenizer {name!r}: the added token {text!r} should have the id {i}, but the vocabulary '
        f'gives it {backend.token_to_id(text)}; are vocabulary and added tokens of one model?'
      )
    added.append((i, text))
  for text in sorted(named - there):
    if backend.token_to_id(text) is not None:  # a word of the vocabulary, special only by role
      backend.add_special_tokens([text])
  return added


def _listed(
  name: str, config: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[int, Mapping[str, Any]]:
  """Id -> {'content': text, 'special': ...} of the added tokens that companion files list."""
  try:
    texts = read_json(name, files, 'added_tokens.json')
    listed: dict[int, Mapping[str, Any]] = {int(i): {'content': t} for t, i in texts.items()}
    for i, token in config.get('added_tokens_decoder', {}).items():
      listed[int(i)] = {'content': str(token['content']), **token}
    return listed
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise ValueError(
      f'tokenizer {name!r}: expected {{"text": id}} in added_tokens.json, or {{"id": {{"content": '
      f'...}}}} as added_tokens_decoder of tokenizer_config.json; {type(error).__name__}: {error}'
    ) from error


def _usual_config(name: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
  """A tokenizer_config.json for a bare tokenizer.json, whose special tokens go by usual names."""
  if 'tokenizer_config.json' in files or 'special_tokens_map.json' in files:
    return {}
  added = read_json(name, files, 'tokenizer.json').get('added_tokens') or []
  special = {token.get('content') for token in added if token.get('special')}
  roles = {r: next((t for t in texts if t in special), None) for r, texts in _USUAL.items()}
  if 'eos_token_id' in read_json(name, files, 'generation_config.json'):
    del roles['eos_token']
  return {'tokenizer_config.json': _config_json({r: t for r, t in roles.items() if t})}


def _config_json(values: Mapping[str, Any]) -> bytes:
  fixed = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  return json.dumps({**fixed, **values}, indent=2).encode()


def _main_file(path: pathlib.Path) -> pathlib.Path:
  """The file that holds the vocabulary: `path` itself, or the first that its folder has."""
  if path.is_file():
    if path.name.endswith(('.json', '.json.gz', '.model')):
      return path
    raise ValueError(f'{path}: expected a folder, a .json, a .json.gz or a SentencePiece .model')
  pairs = [v for v in _VOCABULARIES if any((path / m).is_file() for m in _MERGES)]
  for name in ('tokenizer.json', *pairs, 'tokenizer.model', 'spiece.model'):
    if (path / name).is_file():
      return path / name
  found = sorted(path.glob('*.model'))
  if len(found) == 1:
    return found[0]
  there = sorted(p.name for p in path.iterdir())[:10] if path.is_dir() else 'no such folder'
  one = '; several .model files: give the path of one' if found else ''
  raise FileNotFoundError(
    f"no tokenizer.json in {path} ({there}); expected 'byte', or a folder with a tokenizer.json, "
    f'a vocab.json and merges.txt, or a tokenizer.model{one}'
  )


def _unpacked(path: pathlib.Path) -> bytes:
  content = path.read_bytes()
  if path.suffix != '.gz':
    return content
  try:
    return gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'{path}: not a gzip file that can be read: {error}') from error


def _sentencepiece(
  path: pathlib.Path, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, Mapping[str, str]]:
  try:
    model = sentencepiece.parse(path.read_bytes())
  except ValueError as error:
    raise ValueError(
      f"{path}: {error}. A tiktoken vocabulary (as Llama 3's) or a model whose ids transformers "
      'shifts needs the tokenizer.json that transformers saves'
    ) from error
  if _class(config).startswith(('XLM', 'Camembert', 'MBart', 'Barthez', 'NllbTokenizer')):
    raise ValueError(
      f"{path}: {_class(config)} shifts the ids of its SentencePiece model; use the folder's "
      'tokenizer.json, or have transformers save one'
    )
  if isinstance(config.get('add_prefix_space'), bool):
    model = model._replace(dummy_prefix=config['add_prefix_space'])
  backend = sentencepiece.convert(model, prefix_every_part=config.get('legacy') is True)
  return backend, model.special


def _converted(
  name: str,
  backend: tokenizers.Tokenizer,
  defaults: Mapping[str, str],
  files: Mapping[str, bytes],
  *,
  adds_bos: bool,
) -> dict[str, bytes]:
  """The files of a folder whose tokenizer.json says what vocabulary and companions said.

  `defaults` (special tokens) and `adds_bos` hold where tokenizer_config.json is silent.
  """
  add_tokens(name, backend, files)
  config = read_json(name, files, 'tokenizer_config.json')
  special = {r: t for r, t in defaults.items() if backend.token_to_id(t) is not None}
  special |= special_tokens(config, read_json(name, files, 'special_tokens_map.json'))
  backend.add_special_tokens([t for t in special.values() if backend.token_to_id(t) is not None])
  if isinstance(config.get('add_bos_token'), bool):
    adds_bos = config['add_bos_token']
  starts = [special['bos_token']] if adds_bos and 'bos_token' in special else []
  ends = [special['eos_token']] if config.get('add_eos_token') and 'eos_token' in special else []
  if starts or ends:
    backend.post_processor = processors.TemplateProcessing(
      single=' '.join([*starts, '$A', *ends]),
      special_tokens=[(text, backend.token_to_id(text)) for text in {*starts, *ends}],
    )
  kept = ('chat_template', 'model_max_length', 'padding_side', 'truncation_side')
  written = {key: config[key] for key in kept if key in config} | special
  rest = {n: c for n, c in files.items() if 'chat_template' in n or n == 'generation_config.json'}
  return rest | {
    'tokenizer.json': backend.to_str().encode(),
    'tokenizer_config.json': _config_json(written),
  }


def _class(config: Mapping[str, Any]) -> str:
  return str(config.get('tokenizer_class') or '').removesuffix('Fast')
