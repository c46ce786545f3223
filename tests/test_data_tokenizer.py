"""Tokenizers and chat templates: round trips, special tokens, what templates may and may not do."""

import gzip
import json

import pytest
import vocabularies

from jaxpref.data.tokenizer import load_tokenizer

TALK = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo'}]


def test_byte_tokens_are_the_bytes_and_three_special_tokens():
  tokenizer = load_tokenizer('byte')
  text = 'né\n\x00 日本 ' + ''.join(map(chr, range(300)))
  assert tokenizer.encode(text) == list(text.encode())
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.vocab_size == 259
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (256, 257, 258)
  assert tokenizer.encode('a<|eos|>') == [97, 258]
  assert tokenizer.decode([97, 258, 0xC3]) == 'a<|eos|>�'


def test_byte_template_marks_what_the_assistant_says():
  tokenizer = load_tokenizer('byte')
  text = tokenizer.apply_chat(TALK)
  assert text == '<|bos|><user>Hi<|eos|><assistant>Yo<|eos|>'
  assert [text[a:b] for a, b in tokenizer.render_chat(TALK).spans] == ['Yo<|eos|>']
  assert text.startswith(tokenizer.apply_chat(TALK[:1], add_generation_prompt=True))


@pytest.mark.parametrize('source', ['byte', 'folder'])
def test_a_saved_tokenizer_loads_as_the_same(source, tmp_path):
  if source == 'folder':
    source = vocabularies.write_tokenizer(tmp_path / 'a', merges=[('a', 'b')])
  tokenizer = load_tokenizer(source)
  tokenizer.save(tmp_path / 'copy')
  for path in (tmp_path / 'copy', tmp_path / 'copy' / 'tokenizer.json'):
    copy = load_tokenizer(path)
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode('xab é') == tokenizer.encode('xab é')
    assert copy.special == tokenizer.special
    assert copy.adds_bos == tokenizer.adds_bos


def test_special_tokens_come_from_any_of_the_files(tmp_path):
  folder = vocabularies.write_tokenizer(
    tmp_path,
    special={'bos_token': {'content': '<s>', 'lstrip': False}},
    added=['</s>', '<eot>'],
    config={
      'chat_template': [{'name': 'default', 'template': 'D'}, {'name': 'tool', 'template': ''}]
    },
    generation={'eos_token_id': [257, 258]},
  )
  tokenizer = load_tokenizer(folder)
  assert tokenizer.bos_id == 256
  assert tokenizer.eos_id == 257 and tokenizer.special['eos_token'] == '</s>'
  assert tokenizer.stop_ids == (257, 258)
  assert tokenizer.chat_template == 'D'
  assert not tokenizer.adds_bos
  (folder / 'special_tokens_map.json').write_text('{"pad_token": "<eot>"}')
  (folder / 'chat_template.jinja').write_text('J')
  again = load_tokenizer(folder)
  assert again.pad_id == 258
  assert again.chat_template == 'J'
  assert again.fingerprint != tokenizer.fingerprint


def test_templates_have_names_and_files_come_first(tmp_path):
  named = [{'name': 'default', 'template': 'D'}, {'name': 'tool_use', 'template': 'T'}]
  folder = vocabularies.write_tokenizer(tmp_path / 'a', config={'chat_template': named})
  tokenizer = load_tokenizer(folder)
  assert tokenizer.apply_chat(TALK) == 'D'
  assert tokenizer.apply_chat(TALK, tools=[]) == 'T'
  (folder / 'additional_chat_templates').mkdir()
  (folder / 'additional_chat_templates' / 'tool_use.jinja').write_text('F{{ tools[0].name }}')
  only = load_tokenizer(folder)  # as in transformers: files replace what the config says
  assert only.chat_template is None
  with pytest.raises(ValueError, match=r"no chat template called default, only \['tool_use'\]"):
    only.apply_chat(TALK)
  (folder / 'chat_template.jinja').write_text('{{ bos_token }}{{ enable_thinking }}')
  both = load_tokenizer(folder)
  assert both.apply_chat(TALK, enable_thinking=False) == 'False'
  assert both.apply_chat(TALK, tools=[{'name': 'f'}]) == 'Ff'
  both.save(tmp_path / 'copy')
  assert load_tokenizer(tmp_path / 'copy').templates == both.templates


def test_tokens_that_only_the_config_knows_are_added(tmp_path):
  decoder = {
    '257': {'content': '<new>', 'special': True, 'lstrip': True},
    '256': {'content': '<s>', 'special': True},
  }
  folder = vocabularies.write_tokenizer(
    tmp_path, special={'bos_token': '<s>'}, config={'added_tokens_decoder': decoder}
  )
  tokenizer = load_tokenizer(folder)
  assert tokenizer.encode('a <new>') == [*tokenizer.encode('a'), 257]
  assert tokenizer.special_ids == {256, 257}
  (folder / 'tokenizer_config.json').write_text('{"bos_token": "<s>"}')
  assert load_tokenizer(folder).fingerprint != tokenizer.fingerprint


def test_a_word_of_the_vocabulary_is_special_by_its_role(tmp_path):
  folder = vocabularies.write_tokenizer(tmp_path, merges=[('a', 'b')], config={'eos_token': 'ab'})
  tokenizer = load_tokenizer(folder)
  assert tokenizer.special_ids == {tokenizer.eos_id}


def test_a_bare_tokenizer_json_has_its_usual_special_tokens(tmp_path):
  folder = vocabularies.write_tokenizer(tmp_path / 'a', added=['<|endoftext|>', '<pad>', '<x>'])
  (folder / 'tokenizer_config.json').unlink()
  content = (folder / 'tokenizer.json').read_bytes()
  (tmp_path / 'b').mkdir()
  path = tmp_path / 'b' / 'some.json.gz'
  path.write_bytes(gzip.compress(content))
  for tokenizer in (load_tokenizer(folder), load_tokenizer(path)):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 256, 257)
    assert not tokenizer.adds_bos
    tokenizer.save(tmp_path / 'copy')
    assert load_tokenizer(tmp_path / 'copy').fingerprint == tokenizer.fingerprint
  (folder / 'generation_config.json').write_text('{"eos_token_id": 258}')
  assert load_tokenizer(folder).eos_id == 258


def test_a_length_limit_in_the_file_does_not_apply(tmp_path):
  tokenizer = load_tokenizer(vocabularies.write_tokenizer(tmp_path))
  assert len(tokenizer.encode('abcdef')) == 6


def test_the_end_of_turn_of_the_template_is_a_stop(tmp_path):
  tokenizer = vocabularies.merging(tmp_path)
  assert [tokenizer.decode([i]) for i in tokenizer.stop_ids] == ['</s>', '<end>']


def test_errors_say_what_was_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no tokenizer.json in .*expected 'byte'"):
    load_tokenizer(tmp_path)
  folder = vocabularies.write_tokenizer(tmp_path / 'a', config={'eos_token': '<nope>'})
  with pytest.raises(ValueError, match="eos_token '<nope>' is not in its vocabulary"):
    load_tokenizer(folder)
  (folder / 'tokenizer_config.json').write_text('[]')
  with pytest.raises(ValueError, match='should hold a JSON object'):
    load_tokenizer(folder)
  (folder / 'tokenizer_config.json').write_text('{')
  with pytest.raises(ValueError, match=r'tokenizer_config.json is not JSON'):
    load_tokenizer(folder)
  (folder / 'tokenizer_config.json').write_text('{}')
  with pytest.raises(ValueError, match='has no chat template'):
    load_tokenizer(folder).apply_chat(TALK)
  (folder / 'tokenizer.json').write_text('{"model": 1}')
  with pytest.raises(ValueError, match=r'cannot read its tokenizer.json'):
    load_tokenizer(folder)


def test_byte_tokenizer_files_are_plain_hugging_face_files(tmp_path):
  load_tokenizer('byte').save(tmp_path)
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert config['tokenizer_class'] == 'PreTrainedTokenizerFast'
  assert config['eos_token'] == '<|eos|>'


@pytest.mark.parametrize(
  ('file', 'content', 'error'),
  [
    ('added_tokens.json', '{"<x>": null}', r'expected \{"text": id\} in added_tokens.json'),
    ('tokenizer_config.json', '{"added_tokens_decoder": [1]}', 'as added_tokens_decoder'),
    ('tokenizer_config.json', '{"added_tokens_decoder": {"a": {}}}', 'as added_tokens_decoder'),
    ('tokenizer_config.json', '{"chat_template": [{"name": "a"}]}', "list of {'name', 'template'}"),
    ('tokenizer_config.json', '{"chat_template": 1}', "list of {'name', 'template'}"),
    ('chat_template.jinja', b'\xff', 'should be UTF-8 text'),
    ('tokenizer.json.gz', b'\x1f\x8b\x08', 'not a gzip file that can be read'),
    ('tokenizer.json', b'\xff', r'cannot read its tokenizer\.json'),
  ],
)
def test_broken_companions_say_what_they_should_hold(file, content, error, tmp_path):
  folder = vocabularies.write_tokenizer(tmp_path / 'a')
  (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
  with pytest.raises(ValueError, match=error):
    load_tokenizer(folder / file if file.endswith('.gz') else folder)
