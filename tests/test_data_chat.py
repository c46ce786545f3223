"""Chat templates: transformers' text and masks, what they may not do, what they may take."""

import dataclasses
import datetime
import json
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from jaxpref.data import chat, renderer
from jaxpref.data.tokenizer import load_tokenizer

FIXTURES = pathlib.Path(__file__).parent / 'testdata' / 'chat'
TALK = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo'}]


def test_texts_and_masks_are_those_of_transformers():
  # From tools/make_chat_fixtures.py; the ids and mask are of templates with {% generation %}.
  made = json.loads((FIXTURES / 'chats.json').read_text())
  base = load_tokenizer(FIXTURES / 'bpe')
  marked = 0
  for case in made['cases']:
    template = (FIXTURES / 'templates' / f'{case["template"]}.jinja').read_text()
    tokenizer = dataclasses.replace(base, templates={'default': template})
    messages, options = made['chats'][case['chat']], case['options']
    if 'error' in case:
      with pytest.raises(ValueError, match=case['error']):
        tokenizer.apply_chat(messages, **options)
      continue
    assert tokenizer.apply_chat(messages, **options) == case['text'], case
    if 'ids' in case:
      ids, mask = tokenizer.encode_chat(messages, **options)
      assert ids == case['ids']
      assert (mask or [False] * len(ids)) == [bool(m) for m in case['mask']], case
      marked += sum(case['mask'])
  assert marked > 20


def text(template, messages=TALK, **options):
  return chat.render(template, messages, **options).text


def test_blocks_leave_no_space_and_tojson_escapes_no_html():
  template = """
{%- for message in messages %}
  {%- if loop.index0 > 1 %}{% break %}{% endif %}
    {% if message.role == 'user' %}
  U {{ message.content | tojson }}
    {% else %}
A {{ message.content }}{{ eos_token }}
    {% endif %}
{%- endfor %}"""
  messages = [{'role': 'user', 'content': '<é>"'}, {'role': 'assistant', 'content': 'b'}] * 2
  assert text(template, messages, variables={'eos_token': '$'}) == '  U "<é>\\""\nA b$\n'
  assert text("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
  assert text('{{ missing }}') == ''


def test_any_text_goes_through_unchanged():
  content = '\x00\r\n\ud800\ufdd0 𝔘 "\\" \u2028 </s> {{ 1 }}'
  assert text('{{ messages[0].content }}', [{'role': 'user', 'content': content}]) == content


def test_templates_are_sandboxed():
  for template in (
    "{{ ''.__class__.__mro__ }}",
    '{{ messages.append(1) }}',
    '{{ cycler.__init__.__globals__ }}',
    '{% set ns = namespace() %}{% set ns.__class__ = 1 %}',
    '{% set ns = namespace(_a=1) %}',
    "{% include '/etc/passwd' %}",
    '{% if',
  ):
    with pytest.raises(ValueError, match='refuses messages'):
      chat.render(template, TALK)
  with pytest.raises(ValueError, match=r'roles \[user, assistant\]: no system'):
    chat.render("{{ raise_exception('no system') }}", TALK)


def test_only_plain_json_goes_in():
  with pytest.raises(ValueError, match=r'plain JSON values: .* bytes'):
    chat.render('', [{'role': 'user', 'content': b'Hi'}])
  endless = {'role': 'user', 'content': 'a'}
  endless['self'] = endless
  with pytest.raises(ValueError, match='plain JSON values'):
    chat.render('', [endless])


# What fails at once, and what the kernel has to end.
@pytest.mark.parametrize(
  ('template', 'limit'),
  [
    ("{{ 'a' * 10**10 }}", 'needs more than 512 MB of memory'),
    ("{{ '%10000000000d' % 1 }}", 'needs more than 512 MB of memory'),
    ("{{ 'a' | center(10**10) }}", 'needs more than 512 MB of memory'),
    ("{{ 'a' * (17 * 10**6) }}", 'longer than 16777216 characters'),
    ('{% for i in range(10**9) %}{% endfor %}', 'Range too big'),
    ('{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}', 'nested too deeply'),
    ('{{' + '(' * 9000 + '1' + ')' * 9000 + '}}', 'nested too deeply'),
    ('a' * (2**20 + 1), 'has 1048577 characters; at most 1048576'),
  ],
)
def test_a_template_that_takes_too_much_is_refused(template, limit):
  with pytest.raises(ValueError, match=limit):
    chat.render(template, TALK)
  assert text('{{ messages[0].content }}') == 'Hi'


@pytest.mark.parametrize(
  'template',
  [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    '{{ 2 ** (2 ** 40) }}',  # inside C code, which holds the interpreter's lock
  ],
)
def test_a_template_that_runs_on_is_ended(template):
  started = time.monotonic()
  with pytest.raises(ValueError, match=r'takes more than 1 s of processor time|MB of memory'):
    chat.render(template, TALK)
  assert time.monotonic() - started < 30  # of a machine that others use too
  assert text('{{ messages[0].content }}') == 'Hi'


def test_memory_that_grows_step_by_step_is_bounded():
  template = (
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    '{% endfor %}{{ ns.s }}'
  )
  with pytest.raises(ValueError, match=r'512 MB of memory|processor time'):
    chat.render(template, TALK)


def test_the_renderer_is_replaced_when_it_is_killed():
  for wait in (True, False):
    assert text(f'a{wait}') == f'a{wait}'
    chat._process.process.kill()
    if wait:
      chat._process.process.wait()
    assert text(f'b{wait}') == f'b{wait}'


def test_a_forked_child_has_a_renderer_of_its_own():
  assert text('{{ 1 }}') == '1'
  program = (
    'import os, sys; from jaxpref.data import chat\n'
    'text = lambda t: chat.render(t, []).text\n'
    'assert text("a") == "a"\n'
    'child = os.fork()\n'
    'for i in range(50): assert text(f"{child} {i}") == f"{child} {i}"\n'
    'if child: sys.exit(os.waitpid(child, 0)[1])\n'
  )
  subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


def test_threads_get_their_own_answers():
  wrong = []

  def ask(i):
    for j in range(20):
      answer = text(f'{i} {{{{ messages[0].content }}}}', [{'role': 'user', 'content': str(j)}])
      if answer != f'{i} {j}':
        wrong.append((i, j, answer))

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_generation_marks_give_spans_and_leave_the_text_alone():
  template = (
    '{% for m in messages %}[{% if m.role == "assistant" %}'
    '{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}]'
    '{% endfor %}'
  )
  assert chat.render(template, TALK * 2) == ('[Hi][Yo][Hi][Yo]', ((5, 7), (13, 15)))
  assert chat.render('{{ messages[0].content }}', TALK).spans == ()


def test_marks_whose_place_is_lost_are_refused():
  block = '{% generation %}{{ messages[1].content }}{% endgeneration %}'
  for template in (
    '{% macro m() %} ' + block + '{% endmacro %}x{{ m() }}',
    '{% set s %} ' + block + '{% endset %}{{ s }}',
    '{% generation %}a' + block + '{% endgeneration %}',
  ):
    with pytest.raises(ValueError, match=r'so where its text ends up cannot be told'):
      chat.render(template, TALK)


def test_thoughts_go_by_every_name_that_templates_know():
  template = '{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}'
  for name in ('reasoning_content', 'thinking', 'reasoning'):
    assert text(template, [{'role': 'assistant', name: 'Hm'}]) == 'Hm|Hm'


def test_the_limits_hold_in_the_process_only():
  assert renderer.render('{{ messages }}', {'messages': 1}) == {'text': '1', 'spans': []}
