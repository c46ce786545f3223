"""The process that renders chat templates: a request a line on stdin, a reply a line on stdout.

Templates come with downloaded tokenizers. jinja2's sandbox keeps them off the machine, but one
expression ('a' * 10**10, 9**9**9, a list that holds itself ten thousandfold) can still take all
memory or run for hours inside C code, where no Python thread can stop it. So they run in a process
that the kernel ends: `SECONDS` of processor time a rendering, `MEMORY` bytes in all (on Linux;
macOS counts the time alone).

`chat` runs this file as a script, which imports jinja2 and nothing of jaxpref.
A request is [template, variables]; a reply {"text": str, "spans": [[start, end], ...]}, the spans
being what the template wrote inside {% generation %}, or {"error": str}.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

SECONDS = 1.0
MEMORY = 2**29
MAX_TEXT = 2**24  # characters of a rendering


class _Generation(ext.Extension):
  """`{% generation %} ... {% endgeneration %}`: what the assistant says, end-of-turn included."""

  def __init__(self, environment: jinja2.Environment):
    super().__init__(environment)
    self.tags = {'generation'}
    self.texts: list[str] = []

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.CallBlock(self.call_method('_record'), [], [], body).set_lineno(line)

  def _record(self, caller) -> str:
    text = caller()
    self.texts.append(text)
    return text


class _Namespace(jinja2.utils.Namespace):
  """jinja2's, without attributes that begin with an underscore: those reach into Python."""

  def __init__(*args, **values):  # a template may store an attribute called 'self'
    for name in values:
      _check_name(name)
    jinja2.utils.Namespace.__init__(*args, **values)

  def __setitem__(self, name, value):
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: str) -> None:
  if name.startswith('_'):
    raise jinja2.exceptions.SecurityError(f'a namespace cannot hold {name!r}')


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """JSON without jinja2's escapes for HTML."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
  )
  environment.filters['tojson'] = _tojson
  environment.globals |= {
    'namespace': _Namespace,
    'raise_exception': _raise_exception,
    'strftime_now': _strftime_now,
  }
  return environment.from_string(template)


def render(template: str, variables: dict[str, Any]) -> dict[str, Any]:
  """The reply to one request; raises what jinja2 raises."""
  compiled = _compile(template)
  generation = compiled.environment.extensions[_Generation.identifier]
  assert isinstance(generation, _Generation)
  generated = generation.texts
  generated.clear()
  pieces: list[str] = []
  spans: list[tuple[int, int]] = []
  length = 0
  for piece in compiled.generate(**variables):
    # A generation block is one piece, the first one after the block was recorded.
    if len(generated) > len(spans):
      if len(generated) > len(spans) + 1 or piece != generated[-1]:
        raise jinja2.TemplateError(
          '{% generation %} stands inside a macro, a {% set %} block or another {% generation %}, '
          'so where its text ends up cannot be told'
        )
      spans.append((length, length + len(piece)))
    pieces.append(piece)
    length += len(piece)
    if length > MAX_TEXT:
      raise jinja2.TemplateError(f'the text is longer than {MAX_TEXT} characters')
  return {'text': ''.join(pieces), 'spans': spans}


def _reply(request: bytes) -> dict[str, Any]:
  try:
    return render(*json.loads(request))
  except MemoryError:
    return {'error': f'it needs more than {MEMORY >> 20} MB of memory'}
  except RecursionError:
    return {'error': 'it is nested too deeply'}
  except Exception as error:  # whatever a template does wrong, in its own words
    return {'error': str(error) or type(error).__name__}


def main() -> None:
  # Written memory only: some allocators reserve far more address space than they use.
  _, most = resource.getrlimit(resource.RLIMIT_DATA)
  memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
  resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  print('ready', flush=True)
  for request in sys.stdin.buffer:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process
    reply = _reply(request)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(reply), flush=True)


if __name__ == '__main__':
  main()
