"""Completes prompts: `jaxpref generate --model=<folder, workdir or preset:name> --prompt='...'`.

  jaxpref generate --model=runs/dpo --prompt='Human: Hi!' --stop='Human:' --temperature=0.7
  jaxpref generate --model=preset:tiny --prompts=prompts.jsonl --num_samples=4 --output=out.jsonl

A prompts file has one prompt a line: .jsonl with strings or with objects that have a "prompt" (a
string or chat messages) or "messages"; any other file with plain text, empty lines skipped.
All devices share the work. Several processes do so too, each started with the same flags and
--coordinator, --processes and --process; process 0 prints and writes.
On a terminal completions are shown as text; piped or with --output they are JSON lines with
prompt, completion, sample, finish_reason, tokens (how many) and logp (their sum under the model).
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.text import Text

from jaxpref import config as config_keys
from jaxpref import hosts, sharding
from jaxpref.cli.processes import define_process_flags, join
from jaxpref.generation import Completion, Prompt, stream
from jaxpref.sampling import Sampling
from jaxpref.train import policy
from jaxpref.train.programs import keep_programs


def define_flags() -> flags.FlagValues:
  """This command's flags, in a set of their own: commands may share names."""
  own = flags.FlagValues()
  text: dict[str, Any] = {'flag_values': own}
  flags.DEFINE_string('model', None, 'preset:<name>, Hugging Face folder or workdir', **text)
  flags.DEFINE_string('tokenizer', '', "'byte' or a folder; default: the model's", **text)
  flags.DEFINE_multi_string('prompt', [], 'a prompt; repeatable', **text)
  flags.DEFINE_string('prompts', '', 'a file of prompts, .jsonl or one a line', **text)
  flags.DEFINE_boolean('chat', False, 'prompts are user messages, for the chat template', **text)
  flags.DEFINE_integer('max_new_tokens', 128, 'at most so many tokens', lower_bound=1, **text)
  flags.DEFINE_float('temperature', 1.0, 'divides the logits; 0 is greedy', **text)
  flags.DEFINE_integer('top_k', 0, 'the k likeliest tokens; 0 is off', **text)
  flags.DEFINE_float('top_p', 1.0, 'the likeliest tokens of this total; 1 is off', **text)
  flags.DEFINE_float('min_p', 0.0, "tokens this fraction of the likeliest's; 0 is off", **text)
  flags.DEFINE_integer('seed', 0, 'of the random draws', **text)
  flags.DEFINE_integer('num_samples', 1, 'completions of each prompt', lower_bound=1, **text)
  flags.DEFINE_multi_string('stop', [], 'a string that ends a completion; repeatable', **text)
  flags.DEFINE_integer('batch_size', 16, 'completions side by side', lower_bound=1, **text)
  flags.DEFINE_string('output', '', 'JSON lines go to this file', **text)
  define_process_flags(own)
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', **text)
  return own


def main(argv: Sequence[str]) -> int:
  """Runs the command; argv[0] is its name. Mistakes raise ValueError, OSError or flags.Error."""
  own = define_flags()
  extra = own(argv)[1:]
  if own.help:
    print(f'{__doc__}\n{own.main_module_help() or own.get_help()}')
    return 0
  if extra:
    raise flags.Error(f"unexpected {extra[0]!r}: give prompts as --prompt='...' or --prompts=file")
  if own.model is None:
    raise flags.Error('--model is missing: preset:<name>, a Hugging Face folder or a workdir')
  prompts = [*own.prompt, *(read_prompts(Path(own.prompts)) if own.prompts else [])]
  if not prompts:
    raise flags.Error("no prompts: give --prompt='...' or --prompts=file")
  if own.chat:
    prompts = [[{'role': 'user', 'content': p}] if isinstance(p, str) else p for p in prompts]
  writes = join(own)
  sampling = Sampling(own.temperature, own.top_k, own.top_p, own.min_p)
  tokenizer = policy.find_tokenizer(own.model, own.tokenizer)
  policy.check_writes(own.model, policy.describe(own.model, tokenizer))
  keep_programs()
  mesh = sharding.make_mesh(config_keys.default().mesh.to_dict())  # all devices there are
  model, params = policy.load(own.model, tokenizer)
  params = hosts.place(params, sharding.params_sharding(mesh, params))
  completions = stream(
    model,
    params,
    tokenizer,
    prompts,
    max_new_tokens=own.max_new_tokens,
    sampling=sampling,
    seed=own.seed,
    num_samples=own.num_samples,
    stop=own.stop,
    batch_size=own.batch_size,
    mesh=mesh,
  )
  done = track(
    completions,
    'sampling',
    total=len(prompts) * own.num_samples,
    console=Console(stderr=True),
    transient=True,
    disable=not writes or not sys.stderr.isatty(),
  )
  done = sorted(done, key=lambda c: (c.prompt, c.k))
  if not writes:
    return 0
  if own.output:
    write(done, prompts, Path(own.output))
  else:
    show(done, prompts)
  return 0


def read_prompts(path: Path) -> list[Prompt]:
  """The prompts of a file; raises ValueError with file and line for one that cannot be read."""
  lines = path.expanduser().read_text(encoding='utf-8').splitlines()
  numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
  if path.suffix != '.jsonl':
    return [line for _, line in numbered]
  return [parse_prompt(line, f'{path}:{n}') for n, line in numbered]


def parse_prompt(line: str, where: str) -> Prompt:
  """The prompt in one JSON line; `where` names the line in errors."""
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where}: not JSON: {error}') from None
  value: Any = record
  if isinstance(record, dict):
    value = record.get('prompt', record.get('messages'))
  messages = isinstance(value, list) and value
  if isinstance(value, str) or (
    messages and all(isinstance(m, dict) and {'role', 'content'} <= m.keys() for m in messages)
  ):
    return value
  found = f'an object with {sorted(record)}' if isinstance(record, dict) else repr(record)[:80]
  raise ValueError(
    f'{where}: expected a string, or an object with "prompt" (a string, or messages with role and '
    f'content) or "messages"; got {found}'
  )


def as_record(completion: Completion, prompt: Prompt) -> dict[str, Any]:
  return {
    'prompt': prompt,
    'completion': completion.text,
    'sample': completion.k,
    'finish_reason': completion.finish_reason,
    'tokens': len(completion.tokens),
    'logp': round(sum(completion.logps), 6),
  }


def write(completions: Iterable[Completion], prompts: Sequence[Prompt], path: Path) -> None:
  """JSON lines, one a completion."""
  with path.expanduser().open('w', encoding='utf-8') as out:
    for c in completions:
      print(json.dumps(as_record(c, prompts[c.prompt]), ensure_ascii=False), file=out)


def show(completions: Iterable[Completion], prompts: Sequence[Prompt]) -> None:
  """Panels on a terminal, JSON lines in a pipe."""
  console = Console()
  for c in completions:
    prompt = prompts[c.prompt]
    if not console.is_terminal:
      print(json.dumps(as_record(c, prompt), ensure_ascii=False))
      continue
    said = prompt if isinstance(prompt, str) else '\n'.join(m['content'] for m in prompt)
    note = f'sample {c.k} · {len(c.tokens)} tokens · logp {sum(c.logps):.2f} · {c.finish_reason}'
    body = Text.assemble((said, 'dim'), (c.text, 'bold'))
    console.print(Panel(body, title=f'prompt {c.prompt}', subtitle=note, title_align='left'))
