"""The `jaxpref` command: one subcommand a file, each with flags of its own."""

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from absl import flags
from absl import logging as absl_logging

COMMANDS = {
  'train': 'train a model from a config, or resume the run in its workdir',
  'eval': "an objective's metrics of a trained model on held-out data",
  'generate': 'complete prompts',
  'export': 'write a trained model as a Hugging Face folder',
  'plan': 'what a run would take on a slice of TPUs or GPUs, before it is paid for',
  'launch': 'run a command on TPU VMs, GKE, SLURM or several local processes',
  'data': 'look at data (inspect) or find what is wrong with it (lint)',
}


def usage() -> str:
  width = max(map(len, COMMANDS))
  lines = [f'  {name:<{width}}  {what}' for name, what in COMMANDS.items()]
  return '\n'.join(['usage: jaxpref <command> [flags]', '', *lines, '', 'jaxpref <command> --help'])


def main(argv: Sequence[str]) -> int:
  """Runs `argv` (without the program's name); the exit status: 0, or 2 for a user's mistake."""
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(usage())
    return 0 if argv else 2
  name = argv[0]
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    print(f'jaxpref: unknown command {name!r}{hint}\n\n{usage()}', file=sys.stderr)
    return 2
  logging.basicConfig(format='jaxpref: %(message)s')  # absl's messages come to this handler too
  absl_logging.set_verbosity(absl_logging.WARNING)
  if not os.environ.get('JAXPREF_DEBUG'):
    logging.getLogger().handlers[0].addFilter(is_news)
  command = importlib.import_module(f'jaxpref.cli.{name}')
  try:
    return command.main(argv)
  except (ValueError, TypeError, OSError, ArithmeticError, ImportError, flags.Error) as error:
    if os.environ.get('JAXPREF_DEBUG'):
      raise
    print(f'jaxpref {name}: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f'jaxpref {name}: interrupted', file=sys.stderr)
    return 130


def is_news(record: logging.LogRecord) -> bool:
  """What threads of Orbax log with a traceback is raised as well, and said then in a line."""
  return not record.exc_info or not (record.name == 'asyncio' or 'orbax' in record.pathname)


def use_huge_pages() -> None:
  """Starts this process again with huge pages for large buffers, where Linux leaves that to us.

  XLA gives a step's buffers back to the kernel, and the next step faults them in anew: 4 KiB at a
  time that is a third of a training step on a CPU. glibc reads this switch only when it starts.
  """
  setting = Path('/sys/kernel/mm/transparent_hugepage/enabled')
  if 'GLIBC_TUNABLES' in os.environ or not setting.is_file():
    return
  if '[madvise]' in setting.read_text():
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def leave_out_echoes() -> None:
  """Threads of TensorStore print a traceback each when Orbax no longer waits for their errors."""
  shown = sys.excepthook

  def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not (kind is RuntimeError and str(error) == 'Event loop is closed'):
      shown(kind, error, trace)

  sys.excepthook = hook


def run() -> None:
  use_huge_pages()
  leave_out_echoes()
  sys.exit(main(sys.argv[1:]))


if __name__ == '__main__':
  run()
