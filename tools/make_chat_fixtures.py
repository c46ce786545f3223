"""Makes tests/testdata/chat/: what transformers and sentencepiece make of chats and hostile texts.

    python3.11 tools/make_chat_fixtures.py [--venv .venv-chat-fixtures]

Makes the virtual environment if it is not there (transformers and sentencepiece, no torch), then
runs itself in it:
  bpe/         a small byte-level vocabulary and merges
  *.model      small SentencePiece models of every kind that jaxpref reads
  texts.json   tokenizer -> ids of every text; bpe/ as GPT2Tokenizer and as Qwen2Tokenizer reads it
  chats.json   conversations, and the text, ids and mask that transformers makes of them with
               templates/*.jinja
The templates are written by hand, reduced from formats that models use: they keep what those do
with spaces, roles, tools and thoughts, and little of their prose.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / 'tests' / 'testdata' / 'chat'
PACKAGES = ('transformers', 'jinja2', 'sentencepiece', 'tokenizers')
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<s>', '</s>', '<|eot_id|>', '<|end|>']

TALK = [
  {'role': 'user', 'content': ' Hi \n'},
  {'role': 'assistant', 'content': '\n Hello, wörld 😀  '},
  {'role': 'user', 'content': '"<b>" & {{ 1 }} \n é 日\r\n\n'},
  {'role': 'assistant', 'content': 'Yes.'},
]
SYSTEM = [{'role': 'system', 'content': ' Be brief. '}, *TALK[:2]]
TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'weather',
      'description': "the weather's état in a <city>",
      'parameters': {
        'type': 'object',
        'properties': {'city': {'type': 'string', 'enum': ['Zürich', 'Roma']}, 'days': {}},
        'required': ['city'],
      },
    },
  },
  {'type': 'function', 'function': {'name': 'now', 'description': '', 'parameters': {}}},
]
CALLS = [
  {'role': 'user', 'content': 'Weather?'},
  {
    'role': 'assistant',
    'content': '',
    'tool_calls': [
      {
        'id': 'abcdefghi',
        'type': 'function',
        'function': {'name': 'weather', 'arguments': {'city': 'Zürich', 'days': 1.0}},
      }
    ],
  },
  {'role': 'tool', 'content': '{"sun": true}', 'tool_call_id': 'abcdefghi'},
  {'role': 'assistant', 'content': 'Sunny.'},
]
THOUGHTS = [
  {'role': 'user', 'content': '1+1?'},
  {'role': 'assistant', 'content': '<think>\nEasy.\n</think>\n\n2'},
  {'role': 'user', 'content': '2+2?'},
  {'role': 'assistant', 'reasoning_content': 'Still easy.', 'content': '4'},
]
DOCUMENTS = [{'title': 'One', 'text': 'First.'}, {'title': 'Zwei', 'text': 'Zweites é.'}]
CHATS = {
  'talk': TALK,
  'question': TALK[:1],
  'system': SYSTEM,
  'answer first': TALK[1:3],
  'calls': CALLS,
  **{f'thoughts {i}': THOUGHTS[:i] for i in (2, 3, 4)},
}


def cases(templates):
  """(template, name of a chat, options of apply_chat_template)."""
  for name in templates:
    yield from ((name, chat, {}) for chat in ('talk', 'system', 'answer first'))
    yield from ((name, chat, {'add_generation_prompt': True}) for chat in ('question', 'system'))
  for name in ('llama3', 'mistral', 'qwen', 'odds'):
    yield name, 'calls', {'tools': TOOLS}
  yield 'qwen', 'system', {'tools': TOOLS, 'add_generation_prompt': True}
  for i in (2, 3, 4):
    yield 'thinking', f'thoughts {i}', {'add_generation_prompt': i == 3}
  yield 'thinking', 'thoughts 3', {'add_generation_prompt': True, 'enable_thinking': False}
  yield 'documents', 'talk', {'documents': DOCUMENTS}


def texts():
  """Texts that tokenizers trip over."""
  fixed = [
    *('', ' ', '  ', '\n', '\n\n\nx', '\t\tx', 'a ', ' a', '   a  b    c     ', '\x00\x01'),
    *(
      'x\r\ny',
      'é',
      'e\u0301',
      '日本語',
      '😀👨\u200d👩\u200d👧 ok',
      '𝔘𝔫𝔦',
      '\U0010ffff',
      'العربية',
    ),
    *('नमस्ते', 'ﬁ Ａ①', '▁', '▁▁a', ' ▁ a', 'a\u00a0b\u3000c', '\u200b\ufeffx', 'it’s “quoted”'),
    *(
      "don't I'LL we'd",
      'def f(x):\n    return x  # c\n',
      '<0x0a> <0xé',
      '<unk',
      '0123 3.14 1,000',
    ),
    *('a' * 20, ' ' * 20 + 'x' + ' ' * 9, 'the the  the', 'x <u> XY<u>y', '<|im_end|> b</s>'),
  ]
  generator = random.Random(0)
  parts = ' |  |▁|a|b|the|\n|\t|é|日|😀|<|0x|A>|.|’s|12'.split('|')
  drawn = [''.join(generator.choices(parts, k=generator.randrange(2, 12))) for _ in range(40)]
  return fixed + drawn


def corpus():
  """Sentences of few words, so that small vocabularies have pieces of many characters."""
  words = 'the fox the dog and theory of weather rain sat that they said quick brown jumps over'
  words = [*words.split(), 'def', 'return', 'naïve', 'déjà vu,', '日本', '😀', 'it’s', '12', '345.']
  generator = random.Random(1)
  lines = [' '.join(generator.choices(words, k=12)) for _ in range(200)]
  return [*lines, *['a  b    c  <b>\n\n\nAssistant: XY (x) # "quoted" ﬁ Ａ'] * 4]


COMMON = dict(vocab_size=310, hard_vocab_limit=False, num_threads=1, minloglevel=2)
LLAMA = dict(byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False)
MODELS = {
  'bpe_bytes': dict(
    model_type='bpe', **LLAMA, split_digits=True, allow_whitespace_only_pieces=True
  ),
  'bpe_user': dict(
    model_type='bpe', **LLAMA, add_dummy_prefix=False, user_defined_symbols=['<u>', '\n\n', 'XY']
  ),
  'bpe_collapse': dict(model_type='bpe', normalization_rule_name='identity', pad_id=3),
  'unigram': dict(model_type='unigram', normalization_rule_name='identity', bos_id=-1),
  'unigram_bytes': dict(model_type='unigram', **LLAMA),
  'unigram_rules': dict(model_type='unigram', add_dummy_prefix=False),
}
# 'ﬁ' -> 'fi', fullwidth A -> A, ideographic space -> space, tab -> space
RULES = 'FB01\t66 69\nFF21\t41\n3000\t20\n9\t20\n'


def make_models(ids):
  import sentencepiece

  with tempfile.TemporaryDirectory() as scratch:
    lines, rules = pathlib.Path(scratch, 'corpus.txt'), pathlib.Path(scratch, 'rules.tsv')
    lines.write_text('\n'.join(corpus()))
    rules.write_text(RULES)
    for name, options in MODELS.items():
      if name == 'unigram_rules':
        options = {**options, 'normalization_rule_tsv': str(rules)}
      sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(pathlib.Path(scratch, name)), **COMMON, **options
      )
      content = pathlib.Path(scratch, f'{name}.model').read_bytes()
      # The paths of this run are no part of the model.
      content = content.replace(scratch.encode(), b'-' * len(scratch))
      (TARGET / f'{name}.model').write_bytes(content)
      processor = sentencepiece.SentencePieceProcessor(model_proto=content)
      ids[f'{name}.model'] = [processor.encode(text) for text in texts()]


def make_merges(ids):
  """Vocabulary and merges of a small byte-level BPE, as GPT2Tokenizer and as Qwen2Tokenizer."""
  import tokenizers
  import transformers

  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator(corpus(), vocab_size=330, min_frequency=2)
  decoder = {
    str(trained.get_vocab_size() + i): {'content': token, 'special': True, 'normalized': False}
    for i, token in enumerate(SPECIAL)
  }
  folder = TARGET / 'bpe'
  folder.mkdir(exist_ok=True)
  trained.save_model(str(folder))
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<|endoftext|>'}
  for kind in ('Qwen2Tokenizer', 'GPT2Tokenizer'):
    config |= {'tokenizer_class': kind, 'added_tokens_decoder': decoder}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=1) + '\n')
    tokenizer = getattr(transformers, kind).from_pretrained(str(folder))
    ids[kind] = [tokenizer(text, add_special_tokens=False).input_ids for text in texts()]
  make_chats(tokenizer)


def make_chats(tokenizer):
  templates = {path.stem: path.read_text() for path in sorted(TARGET.glob('templates/*.jinja'))}
  made = []
  for name, chat, options in cases(templates):
    tokenizer.chat_template = templates[name]
    case = {'template': name, 'chat': chat, 'options': options}
    try:
      case['text'] = tokenizer.apply_chat_template(CHATS[chat], tokenize=False, **options)
      if name.startswith('marked'):
        encoded = tokenizer.apply_chat_template(
          CHATS[chat], return_dict=True, return_assistant_tokens_mask=True, **options
        )
        case |= {'ids': encoded['input_ids'], 'mask': encoded['assistant_masks']}
    except Exception as error:
      case['error'] = str(error)
    made.append(case)
  write('chats.json', {'chats': CHATS, 'cases': made})


def write(name, value):
  (TARGET / name).write_text(json.dumps(value, ensure_ascii=False, separators=(',', ':')) + '\n')


def make():
  TARGET.mkdir(parents=True, exist_ok=True)
  ids = {}
  make_models(ids)
  make_merges(ids)
  write('texts.json', {'texts': texts(), 'ids': ids})


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--venv', default=str(ROOT / '.venv-chat-fixtures'))
  parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.inside:
    make()
    return
  python = pathlib.Path(options.venv) / 'bin' / 'python'
  if not python.exists():
    subprocess.run([sys.executable, '-m', 'venv', options.venv], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '-q', *PACKAGES], check=True)
  subprocess.run([python, __file__, '--inside'], check=True)


if __name__ == '__main__':
  main()
