"""What was run where, in words: the title of a table and the paragraph under it."""

import argparse
import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.models import Config
from tools.bench.shapes import REFERRING, SAMPLED, Shape


def units(task: str) -> str:
  return 'completions' if task in SAMPLED else 'examples' if task in ('kto', 'sft') else 'pairs'


def values(task: str) -> str:
  """What a step says of itself, and both sides should say alike."""
  return 'sums of log-probs' if task == 'logprobs' else 'losses'


def key(args: argparse.Namespace) -> str:
  """Names the work: a result replaces an older one of the same key."""
  reference = args.reference if args.task in REFERRING else ''
  parts = (args.task, args.preset, reference, args.remat, args.cores and f'{args.cores}-core')
  return ' '.join(filter(None, parts))


def title(args: argparse.Namespace) -> str:
  words = [args.task, args.preset]
  if args.task in REFERRING:
    words.append(
      {'live': 'reference in the step', 'table': 'reference from a table'}[args.reference]
    )
  if args.remat:
    words.append(f'with and without remat {args.remat}')
  if args.cores:
    words.append(f'on {args.cores} core' + 's' * (args.cores > 1))
  return ', '.join(words)


def setting(
  args: argparse.Namespace,
  shape: Shape,
  config: Config,
  sides: Mapping[str, Mapping[str, Any]],
  core_peak: float,
  load: float,
) -> str:
  work = f'{shape.batch} {units(args.task)} of at most {shape.max_length} tokens a step'
  if args.task in SAMPLED:
    work = (
      f'{shape.prompts} prompts x {shape.samples} completions of {shape.new_tokens} tokens a step'
    )
  source = Path(args.data).name if args.data else 'made-up pairs'
  versions = (f'{name} {v}' for side in sides.values() for name, v in side['versions'].items())
  return (
    f'{work}, {source}; {config.num_layers} layers x {config.width}, vocabulary '
    f'{config.vocab_size}, {shape.dtype}. {datetime.date.today()}, '
    f'{hardware(sides["ours"]["device"])}; a core does {core_peak / 1e9:.0f} GFLOP/s in float32 '
    f'products, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after. '
    f'{", ".join(dict.fromkeys(versions))}.'
  )


def hardware(device: str) -> str:
  """The accelerator that our worker named, or the processor with its cores."""
  if device != 'cpu':
    return device
  name = platform.processor() or platform.machine()
  info = Path('/proc/cpuinfo')
  if info.exists():
    lines = (line.partition(':') for line in info.read_text(encoding='utf-8').splitlines())
    name = next((value.strip() for key, _, value in lines if key.strip() == 'model name'), name)
  return f'{os.cpu_count()} cores of {name}'
