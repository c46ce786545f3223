"""Chat templates: messages -> text, rendered the way `transformers` renders them.

Templates see `messages`, `tools`, `documents`, `add_generation_prompt`, the special tokens' text
(`bos_token`, `eos_token`, ...), `raise_exception(message)`, `strftime_now(format)` and a `tojson`
that escapes no HTML. They run in jinja2's immutable sandbox, in a process of their own
(`renderer`), which bounds their time and memory.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpref.data import renderer

Message = Mapping[str, Any]  # {'role': 'user', 'content': 'Hi', ...}

MAX_TEMPLATE = 2**20  # characters
MAX_REQUEST = 2**26  # bytes of JSON
_REASONING = ('reasoning_content', 'thinking', 'reasoning')


class Rendering(NamedTuple):
  """The text of a conversation, and the character spans inside `{% generation %}`."""

  text: str
  spans: tuple[tuple[int, int], ...]  # [start, end)


def render(
  template: str,
  messages: Sequence[Message],
  *,
  tools: Sequence[Mapping[str, Any]] | None = None,
  documents: Sequence[Mapping[str, Any]] | None = None,
  add_generation_prompt: bool = False,
  variables: Mapping[str, Any] | None = None,
) -> Rendering:
  """Renders a conversation.

  Args:
    template: jinja2 text, as in a tokenizer's `chat_template`.
    messages: plain JSON values, one mapping a turn.
    tools: JSON schemas of the functions that the model may call.
    documents: {'title', 'text'} mappings, for templates that quote them.
    add_generation_prompt: end with what opens the assistant's turn.
    variables: anything else the template names: special tokens, `enable_thinking`, ...

  Raises:
    ValueError: the template cannot be parsed, fails, calls `raise_exception`, or takes more time
      or memory than `renderer` grants.
  """
  if len(template) > MAX_TEMPLATE:
    raise ValueError(
      f'the chat template has {len(template)} characters; at most {MAX_TEMPLATE} are rendered'
    )
  try:
    values = {
      **(variables or {}),
      'messages': [_with_reasoning(message) for message in messages],
      'tools': tools,
      'documents': documents,
      'add_generation_prompt': add_generation_prompt,
    }
    request = f'[{_quoted(template)},{json.dumps(values)}]\n'.encode()
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'a chat template takes plain JSON values: {error}') from error
  if len(request) > MAX_REQUEST:
    raise ValueError(
      f'the conversation has {len(request)} bytes as JSON; at most {MAX_REQUEST} are rendered'
    )
  reply = _process.ask(request)
  if 'error' in reply:
    roles = ', '.join(str(message.get('role')) for message in messages)
    raise ValueError(f'the chat template refuses messages with roles [{roles}]: {reply["error"]}')
  return Rendering(reply['text'], tuple((start, end) for start, end in reply['spans']))


def _with_reasoning(message: Message) -> Message:
  """Under every name that templates read it by, what the assistant thought before it spoke."""
  thought = next((message[key] for key in _REASONING if message.get(key) is not None), None)
  if thought is None:
    return message
  return {'thinking': thought, **message, 'reasoning_content': thought}


_quoted = functools.lru_cache(maxsize=16)(json.dumps)


class _Process:
  """The process that renders: started when first needed, and again after a limit ended it."""

  def __init__(self):
    self.lock = threading.Lock()
    self.process: subprocess.Popen[bytes] | None = None
    # The same prompt is rendered for every completion, and for its text, spans and tokens.
    self.recent = functools.lru_cache(maxsize=8)(self._ask)

  def ask(self, request: bytes) -> dict[str, Any]:
    with self.lock:
      return self.recent(request)

  def _ask(self, request: bytes) -> dict[str, Any]:
    for _ in range(2):
      process = self.process = self.process or _start()
      try:
        reply = _exchange(process, request)
      except BrokenPipeError:
        reply = b''
      except BaseException:  # an interrupt: this reply must not answer the next request
        process.kill()
        self.close()
        raise
      if reply.endswith(b'\n'):
        return json.loads(reply)
      self.close()
      if process.returncode == -signal.SIGPROF:
        return {'error': f'it takes more than {renderer.SECONDS:g} s of processor time'}
      # Something else ended the process, perhaps long ago: no fault of the template. Once more.
    raise RuntimeError(f'the process that renders chat templates ended with {process.returncode}')

  def close(self) -> None:
    if self.process is not None:
      process, self.process = self.process, None
      # Leaving closes its stdin, which ends it, and waits. What a dead one has not read is lost.
      with contextlib.suppress(BrokenPipeError), process:
        pass


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
  assert process.stdin and process.stdout  # `_start` opens both
  process.stdin.write(request)
  process.stdin.flush()
  return process.stdout.readline()


def _start() -> subprocess.Popen[bytes]:
  # -P: files beside the script must not shadow the standard library. A session of its own: signals
  # to a terminal's or a job's whole group are the training run's to handle.
  process = subprocess.Popen(
    [sys.executable, '-P', str(pathlib.Path(renderer.__file__))],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    start_new_session=True,
  )
  if _exchange(process, b'') != b'ready\n':
    process.kill()
    raise RuntimeError(f'cannot start the process that renders chat templates: {process.args!r}')
  return process


def _forked() -> None:
  """A forked child gets a process of its own: two writers would mix up each other's replies."""
  global _process, _parents
  _parents, _process = _process, _Process()


_process = _Process()
_parents: _Process | None = None
atexit.register(lambda: _process.close())
os.register_at_fork(after_in_child=_forked)
