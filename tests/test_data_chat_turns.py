"""The assistant's tokens in a conversation, by token prefixes, drawn as ‹what is scored›."""

import json
import pathlib
import shutil

import pytest

from jaxpref.data import turns
from jaxpref.data.tokenizer import load_tokenizer

FIXTURES = pathlib.Path(__file__).parent / 'testdata' / 'chat'
CHATS = json.loads((FIXTURES / 'chats.json').read_text())['chats']
TALK = [
  {'role': 'user', 'content': ' Hi '},
  {'role': 'assistant', 'content': ' Hello\n'},
  {'role': 'user', 'content': 'And?'},
  {'role': 'assistant', 'content': 'Yes.'},
]


def load(folder, template):
  shutil.copytree(FIXTURES / 'bpe', folder)
  (folder / 'chat_template.jinja').write_text(template)
  return load_tokenizer(folder)


def fixture(name):
  return (FIXTURES / 'templates' / f'{name}.jinja').read_text()


def draw(tokenizer, messages, first=1, tools=None):
  tokens, spans = turns.read_chat(messages, first, tokenizer, tools)
  at, text = 0, ''
  for start, end in spans:
    text += tokenizer.decode(tokens[at:start]) + f'‹{tokenizer.decode(tokens[start:end])}›'
    at = end
  return text + tokenizer.decode(tokens[at:])


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    (
      'chatml',
      '<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n‹ Hello\n<|im_end|>›\n'
      '<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n‹Yes.<|im_end|>›',
    ),
    (  # strips what it is given
      'llama2',
      '<s>[INST] Hi [/INST]‹ Hello </s>›<s>[INST] And? [/INST]‹ Yes. </s>›',
    ),
    (  # adds a system prompt of its own
      'qwen',
      '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'
      '<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n‹ Hello\n<|im_end|>›\n'
      '<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n‹Yes.<|im_end|>›',
    ),
    (  # ends turns with what is no special token here
      'gemma',
      '<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n‹Hello<end_of_turn>\n›'
      '<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n‹Yes.<end_of_turn>\n</s>›',
    ),
    (  # closes a conversation that ends, after its last turn
      'phi3',
      '<|user|>\n Hi <|end|>\n<|assistant|>\n‹ Hello\n<|end|>›\n'
      '<|user|>\nAnd?<|end|>\n<|assistant|>\n‹Yes.<|end|>›\n</s>',
    ),
    (  # has no generation prompt: the sampler writes the header too
      'documents',
      '<s><|USER|>Hi<|end|>‹<|ASSISTANT|>Hello<|end|>›<|USER|>And?<|end|>'
      '‹<|ASSISTANT|>Yes.<|end|>›',
    ),
    (
      'marked',
      '<s><|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n‹Hello<|im_end|>›\n'
      '<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n‹Yes.<|im_end|>›',
    ),
  ],
)
def test_the_assistants_tokens(name, expected, tmp_path):
  tokenizer = load(tmp_path / 'a', fixture(name))
  assert draw(tokenizer, TALK) == expected
  if name != 'marked':  # earlier turns are the prompt's
    head, _, tail = expected.partition('‹')
    assert draw(tokenizer, TALK, first=2) == head + tail.replace('›', '', 1)


def test_turns_that_end_in_no_token_of_their_own(tmp_path):
  template = (
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
  )
  talk = [{**message, 'content': message['content'].strip()} for message in TALK]
  expected = 'USER: Hi ASSISTANT:‹ Hello ›USER: And? ASSISTANT:‹ Yes. </s>›'
  assert draw(load(tmp_path / 'a', template), talk) == expected


def test_thoughts_that_later_turns_lose_are_refused(tmp_path):
  tokenizer = load(tmp_path / 'a', fixture('thinking'))
  with pytest.raises(ValueError, match=r"writes message 1 .*'<think>\\nE.* becomes '2"):
    turns.read_chat(CHATS['thoughts 4'], 1, tokenizer)
  last = draw(tokenizer, CHATS['thoughts 4'], first=3)  # that one is as a sampler would write it
  assert last.endswith('assistant\n‹<think>\nStill easy.\n</think>\n\n4<|im_end|>›')


def test_tools_that_move_are_refused(tmp_path):
  tokenizer = load(tmp_path / 'a', fixture('mistral'))
  tools = [{'type': 'function', 'function': {'name': 'f'}}]
  with pytest.raises(ValueError, match=r'writes (what comes before )?message [13]'):
    turns.read_chat(TALK, 1, tokenizer, tools)
  assert draw(tokenizer, TALK, 2, tools).endswith('[/AVAILABLE_TOOLS][INST] And?[/INST]‹ Yes.</s>›')
  assert draw(tokenizer, CHATS['calls'], 1, tools).count('‹') == 2


def test_what_a_template_counts_or_cuts_is_refused(tmp_path):
  for i, template in enumerate(
    (
      '{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}',
      '{% for m in messages[-2:] %}[{{ m.role }} {{ m.content }}]{% endfor %}',
    )
  ):
    with pytest.raises(ValueError, match='differently once the conversation goes on'):
      turns.read_chat(TALK, 1, load(tmp_path / str(i), template))
