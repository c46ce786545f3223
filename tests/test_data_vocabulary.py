"""Vocabularies that are no tokenizer.json: ids as SentencePiece and transformers give them."""

import json
import pathlib
import shutil
import subprocess

import pytest

from jaxpref.data import sentencepiece
from jaxpref.data.tokenizer import load_tokenizer

FIXTURES = pathlib.Path(__file__).parent / 'testdata' / 'chat'
EXPECTED = json.loads((FIXTURES / 'texts.json').read_text())
MODELS = sorted(path.name for path in FIXTURES.glob('*.model'))


IN_TRANSFORMERS = """
import json, sys, transformers
texts, folders = json.load(sys.stdin)
made = {}
for folder in folders:
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  plain = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
  made[folder] = [plain, tokenizer(texts[5]).input_ids, tokenizer.special_tokens_map]
print(json.dumps(made))
"""


def merges_folder(target, kind, **changes):
  """A copy of bpe/ that says it is of tokenizer class `kind`."""
  shutil.copytree(FIXTURES / 'bpe', target)
  path = target / 'tokenizer_config.json'
  config = json.loads(path.read_text()) | {'tokenizer_class': kind} | changes
  path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
  return target


def assert_same_ids(tokenizer, name):
  for text, ids in zip(EXPECTED['texts'], EXPECTED['ids'][name], strict=True):
    if not known_difference(tokenizer, name, text):
      assert tokenizer.encode(text) == ids, repr(text)


def known_difference(tokenizer, name, text):
  """What the docstring of `sentencepiece` says, which transformers does too."""
  if not name.endswith('.model'):
    return False
  control = any(token in text for token in tokenizer.special.values())
  rules = name == 'unigram_rules.model' and '\u0301' in text
  return control or rules


@pytest.mark.parametrize('name', MODELS)
def test_ids_are_those_of_sentencepiece(name, tmp_path):
  tokenizer = load_tokenizer(FIXTURES / name)
  assert_same_ids(tokenizer, name)
  tokenizer.save(tmp_path / 'saved')
  saved = load_tokenizer(tmp_path / 'saved')
  assert_same_ids(saved, name)
  assert (saved.fingerprint, saved.special) == (tokenizer.fingerprint, tokenizer.special)
  assert saved.adds_bos == tokenizer.adds_bos == (name != 'unigram.model')  # which has no bos


@pytest.mark.parametrize('kind', ['GPT2Tokenizer', 'Qwen2TokenizerFast'])
def test_ids_are_those_of_vocabulary_and_merges(kind, tmp_path):
  folder = merges_folder(tmp_path / 'a', kind)
  tokenizer = load_tokenizer(folder)
  assert_same_ids(tokenizer, kind.removesuffix('Fast'))
  assert not tokenizer.adds_bos
  tokenizer.save(tmp_path / 'saved')
  saved = load_tokenizer(tmp_path / 'saved')
  assert_same_ids(saved, kind.removesuffix('Fast'))
  assert (saved.fingerprint, saved.special) == (tokenizer.fingerprint, tokenizer.special)
  (folder / 'vocab.json').rename(folder / 'encoder.json')
  (folder / 'merges.txt').rename(folder / 'vocab.bpe')
  for path in (folder, folder / 'encoder.json', folder / 'vocab.bpe'):
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint


def test_text_comes_back():
  for name in ('bpe_bytes.model', 'unigram_bytes.model', 'bpe_user.model', 'bpe'):
    tokenizer = load_tokenizer(FIXTURES / name)
    for text in EXPECTED['texts']:
      if '▁' not in text or name == 'bpe':
        assert tokenizer.decode(tokenizer.encode(text)) == text, (name, text)


def test_legacy_folders_put_a_prefix_after_every_special_token(tmp_path):
  shutil.copy(FIXTURES / 'bpe_bytes.model', tmp_path / 'tokenizer.model')
  assert_same_ids(load_tokenizer(tmp_path), 'bpe_bytes.model')
  (tmp_path / 'tokenizer_config.json').write_text('{"legacy": true, "add_bos_token": false}')
  legacy, today = load_tokenizer(tmp_path), load_tokenizer(FIXTURES / 'bpe_bytes.model')
  assert_same_ids(legacy, 'bpe_bytes.model')
  a = today.encode('a')
  assert today.adds_bos and not legacy.adds_bos
  assert legacy.encode('a</s>a') == [*a, legacy.eos_id, *a]
  assert today.encode('a</s>a') == [*a, today.eos_id, *a[1:]]


def test_added_tokens_follow_the_vocabulary(tmp_path):
  shutil.copy(FIXTURES / 'unigram_bytes.model', tmp_path / 'spiece.model')
  size = load_tokenizer(tmp_path).vocab_size
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'<end>': size + 1, '<turn>': size}))
  (tmp_path / 'special_tokens_map.json').write_text('{"pad_token": "<end>"}')
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode('<turn><end>') == [size, size + 1]
  assert tokenizer.pad_id == size + 1
  assert size + 1 in tokenizer.special_ids and size not in tokenizer.special_ids
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'<turn>': size + 5}))
  with pytest.raises(ValueError, match=f"'<turn>' should have the id {size + 5}.*gives it {size}"):
    load_tokenizer(tmp_path)


def test_files_that_cannot_be_read_say_why(tmp_path):
  content = (FIXTURES / 'bpe_bytes.model').read_bytes()
  for name, bad, reason in (
    ('cut', content[:-3], r'a field of \d+ bytes, but \d+ are left'),
    ('empty', b'', 'it has no pieces'),
    ('text', b'IQ== 0\nIg== 1\n', 'tiktoken'),
    ('word', b'\x18\x03'.join(content.rsplit(b'\x18\x02', 1)), 'it is a word model'),
  ):
    (tmp_path / f'{name}.model').write_bytes(bad)
    with pytest.raises(ValueError, match=reason):
      load_tokenizer(tmp_path / f'{name}.model')
  with pytest.raises(FileNotFoundError, match=r'several .model files: give the path of one'):
    load_tokenizer(tmp_path)
  folder = merges_folder(tmp_path / 'a', 'BartTokenizer')
  with pytest.raises(ValueError, match=r'how BartTokenizer splits text .* tokenizer.json'):
    load_tokenizer(folder)
  folder = merges_folder(tmp_path / 'b', 'GPT2Tokenizer')
  (folder / 'merges.txt').write_text('#version: 0.2\nt h\nabc\n')
  with pytest.raises(ValueError, match=r"merges.txt: line 3: expected two symbols .* 'abc'"):
    load_tokenizer(folder)
  (folder / 'merges.txt').write_text('t 日\n')
  with pytest.raises(ValueError, match=r'vocab.json, merges.txt: .*日'):
    load_tokenizer(folder)


def test_every_prefix_of_a_model_file_is_refused_or_read():
  content = (FIXTURES / 'unigram.model').read_bytes()
  for size in range(0, len(content), 7):
    try:
      assert sentencepiece.parse(content[:size]).pieces
    except ValueError as error:
      assert 'not a SentencePiece model' in str(error)


@pytest.mark.slow
def test_saved_folders_open_in_transformers_with_the_same_ids(tmp_path):
  python = pathlib.Path(__file__).parent.parent / '.venv-chat-fixtures' / 'bin' / 'python'
  if not python.exists():
    pytest.skip('no transformers: tools/make_chat_fixtures.py makes .venv-chat-fixtures')
  texts = EXPECTED['texts']
  sources = {name: FIXTURES / name for name in MODELS} | {'byte': 'byte'}
  for kind in ('GPT2Tokenizer', 'Qwen2Tokenizer'):
    sources[kind] = merges_folder(tmp_path / f'source {kind}', kind)
  expected = {}
  for name, source in sources.items():
    tokenizer, folder = load_tokenizer(source), tmp_path / name
    tokenizer.save(folder)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    ids = [tokenizer.encode(text) for text in texts]
    expected[str(folder)] = [ids, bos + ids[5], tokenizer.special]
  done = subprocess.run(
    [python, '-c', IN_TRANSFORMERS],
    input=json.dumps([texts, list(expected)]),
    capture_output=True,
    text=True,
    check=True,
  )
  assert json.loads(done.stdout) == expected
