"""An objective's metrics of a model on data, with 95 % intervals: `jaxpref eval --model=runs/dpo`.

  jaxpref eval --model=runs/dpo                                  # on what the run held out
  jaxpref eval --model=runs/dpo --data=jsonl:test.jsonl.gz --json=test.json
  jaxpref eval --model=runs/dpo --examples=margins.jsonl          # a line for each example
  jaxpref eval --model=/models/dpo --reference=/models/sft --objective='dpo(beta=0.1)' \
    --data=jsonl:test.jsonl.gz

Several processes evaluate as one, each started with the same flags and --coordinator, --processes
and --process; process 0 prints and writes.

A workdir brings its own objective, held-out split and reference; flags that are given come first.
Intervals take prompts as independent. Objectives without a reference need none.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich import table as rich_table
from rich.console import Console
from rich.progress import track
from rich.text import Text

from jaxpref import config as config_keys
from jaxpref import hosts, offline, sharding
from jaxpref.cli.checkpoints import define_checkpoint_flags, load_model
from jaxpref.cli.data import define_data_flags, open_console, read_data_flags
from jaxpref.cli.processes import define_process_flags, join
from jaxpref.data import Dataset, Tokenizer
from jaxpref.data.batches import Batches
from jaxpref.evals.estimates import estimates
from jaxpref.evals.heldout import collect
from jaxpref.evals.statistics import Estimate
from jaxpref.log_probs import DIVERGENCES
from jaxpref.models import Model
from jaxpref.objectives import Metric, Objective, parse, reduce_metrics
from jaxpref.train import anchor, policy
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.programs import keep_programs
from jaxpref.train.reference import Table
from jaxpref.train.step import make_fields, reported
from jaxpref.train.workdir import read_config
from jaxpref.typing import Params


class Evaluation(NamedTuple):
  """Metrics by name, intervals of those that are means over examples, and those of each example.

  `of_examples` are arrays [n] in the data set's order, NaN where a metric does not apply.
  """

  metrics: dict[str, float]
  intervals: dict[str, Estimate]
  examples: int
  prompts: int
  of_examples: dict[str, np.ndarray]


def define_flags() -> flags.FlagValues:
  """This command's flags, in a set of their own: commands may share names."""
  own = flags.FlagValues()
  text: dict[str, Any] = {'flag_values': own}
  flags.DEFINE_string('model', None, 'workdir, Hugging Face folder or preset:<name>', **text)
  flags.DEFINE_string('reference', '', "another model; default: the run's own reference", **text)
  flags.DEFINE_string('objective', '', "such as 'dpo(beta=0.1)'; default: the run's", **text)
  define_data_flags(own)
  define_checkpoint_flags(own)
  define_process_flags(own)
  flags.DEFINE_integer('batch_size', None, 'examples at a time', lower_bound=1, **text)
  flags.DEFINE_string('json', '', 'write the metrics to this file too', **text)
  flags.DEFINE_string(
    'examples', '', "write every example's own metrics to this JSONL file", **text
  )
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', **text)
  return own


def main(argv: Sequence[str]) -> int:
  """Runs the command; argv[0] is its name. Mistakes raise ValueError, OSError or flags.Error."""
  own = define_flags()
  extra = own(argv)[1:]
  if own.help:
    print(f'{__doc__}\n{own.get_help()}')
    return 0
  if extra:
    raise flags.Error(f'unexpected {extra[0]!r}')
  if own.model is None:
    raise flags.Error('--model is missing: a workdir, a Hugging Face folder or preset:<name>')
  writes = join(own)
  config = read_flags(own)
  objective = parse(config.objective, imports=tuple(config.imports))
  tokenizer = policy.find_tokenizer(own.model, own.tokenizer or '')
  dataset = load_dataset(own, config, tokenizer)
  dataset = offline.with_mismatched(dataset, objective, config.seed)
  mesh = sharding.make_mesh(config_keys.default().mesh.to_dict())  # all devices there are
  tables, live = {}, None
  if needed := bool(objective.fields & {'ref_logps', *DIVERGENCES}):
    if objective.fields & DIVERGENCES.keys():
      live = find_reference(own, tokenizer)[1]
    else:  # the reference goes before the policy comes: memory has to hold one of them only
      dtype = None if config.dtype == 'auto' else config.dtype
      tables['ref_logps'] = tabulate(own, tokenizer, dtype, dataset, mesh)
  keep_programs()
  model, params = load_model(own, tokenizer)
  size = own.batch_size or config.batch.size
  with jax.set_mesh(mesh):
    found = evaluate(model, params, objective, dataset, tables, size, mesh, live)
  if not writes:
    return 0
  show(found, str(objective), open_console())
  if own.json:
    about = {
      'model': own.model,
      'objective': str(objective),
      'reference': own.reference if needed else '',
      'data': config.data.train,
    }
    write(found, about, Path(own.json))
  if own.examples:
    write_examples(found, dataset, Path(own.examples))
  return 0


def read_flags(own: flags.FlagValues) -> ConfigDict:
  """The config of the run that --model is, or the default one, with what the flags say."""
  if policy.is_workdir(own.model):
    base = read_config(own.model)
  elif not own.objective or own.data is None:
    missing = '--data=jsonl:pairs.jsonl' if own.objective else "--objective='dpo(beta=0.1)'"
    raise flags.Error(f'{own.model} is not the workdir of a run, so give {missing}')
  else:
    base = config_keys.default()
  config = read_data_flags(own, base)
  if own.objective:
    config.objective = own.objective
  return config


def load_dataset(own: flags.FlagValues, config: ConfigDict, tokenizer: Tokenizer) -> Dataset:
  """--data, or what the run held out."""
  given, held_out = offline.load_data(config, tokenizer)
  if own.data is not None:
    return given
  if held_out is None:
    raise ValueError(f'the run in {own.model} held nothing out; give --data=jsonl:pairs.jsonl')
  return held_out


def tabulate(
  own: flags.FlagValues, tokenizer: Tokenizer, dtype: str | None, dataset: Dataset, mesh: Mesh
) -> Table:
  """The reference's log-probs on `dataset`."""
  model, params = find_reference(own, tokenizer)
  params = hosts.place(params, sharding.params_sharding(mesh, params))
  console = Console(stderr=True)
  return anchor.reference_table(console, model.replace(dtype=dtype), params, mesh, dataset)


def find_reference(own: flags.FlagValues, tokenizer: Tokenizer) -> tuple[Model, Params]:
  """The model called --reference, or by default what the run saved as its reference."""
  if own.reference:
    theirs = policy.find_tokenizer(own.reference, own.tokenizer or '')
    if theirs.fingerprint != tokenizer.fingerprint:
      raise ValueError(
        f'--reference={own.reference} has the tokenizer {theirs.name!r}, the model '
        f'{tokenizer.name!r}: their log-probs are of different tokens'
      )
    return policy.load(own.reference, tokenizer)
  if policy.is_workdir(own.model):
    checkpoints = Checkpoints(own.model, read_only=True)
    if checkpoints.has_reference():
      model = Model(policy.architecture(own.model, tokenizer))
      return model, checkpoints.restore_reference()
  raise flags.Error(
    'the objective compares with a reference; give --reference=<workdir, folder or preset:name>'
  )


def evaluate(
  model: Model,
  params: Params,
  objective: Objective,
  dataset: Dataset,
  tables: Mapping[str, Table],
  batch_size: int,
  mesh: Mesh,
  reference: Params | None = None,
) -> Evaluation:
  """Metrics of `objective` and the policy's entropy over `dataset`; `tables` as for `Batches`.

  `reference` are the parameters of a live one, of the same architecture.
  """
  console = Console(stderr=True)
  groups = sharding.groups(mesh)
  size = -(-min(batch_size, len(dataset)) // groups) * groups
  batches = Batches(dataset, size, None, 1, groups, tables=tables)
  compute = jax.jit(make_fields(model, objective, extra=reported(model)))
  params = hosts.place(params, sharding.params_sharding(mesh, params))
  if reference is not None:
    reference = hosts.place(reference, sharding.params_sharding(mesh, reference))
  ticks = iter(
    track(
      range(len(batches)),
      'evaluating',
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )
  )

  def place(batch):
    next(ticks, None)
    return hosts.place(batch, sharding.batch_sharding(mesh))

  fields = collect(functools.partial(compute, params, reference), batches, place)
  fields = {name: values for name, values in fields.items() if name != 'ids'}
  _, metrics = objective.partial(fields, objective.norms(fields))
  counts = fields['mask'].sum((1, 2))
  for name in reported(model):
    mean = np.where(fields['mask'], fields[name], 0).sum((1, 2)) / np.maximum(counts, 1)
    metrics[name] = Metric(mean, counts.astype(np.float32))
  values = {name: float(value) for name, value in sorted(reduce_metrics(metrics).items())}
  prompts = dataset.arrays.prompts[dataset.indices]
  of_examples = {
    name: np.where(np.asarray(metric.weights) > 0, np.asarray(metric.values, np.float64), np.nan)
    for name, metric in sorted(metrics.items())
    if np.shape(metric.values) == (len(dataset),)
  }
  return Evaluation(
    values, estimates(metrics, prompts), len(dataset), len(np.unique(prompts)), of_examples
  )


def show(found: Evaluation, title: str, console: Console) -> None:
  """Prints a table of the metrics."""
  table = rich_table.Table(title=Text(title))
  table.add_column('metric')
  table.add_column('value', justify='right')
  table.add_column('95 % interval')
  for name, value in found.metrics.items():
    interval = found.intervals.get(name)
    table.add_row(
      name, f'{value:.4f}', f'[{interval.low:.4f}, {interval.high:.4f}]' if interval else ''
    )
  table.caption = f'{found.examples:,} examples, {found.prompts:,} prompts'
  console.print(table)


def write(found: Evaluation, about: dict[str, str], path: Path) -> None:
  """One JSON object; nan and infinities, which JSON lacks, are strings, as in metrics.jsonl."""
  record = {
    **about,
    'examples': found.examples,
    'prompts': found.prompts,
    'metrics': {name: _plain(value) for name, value in found.metrics.items()},
    'intervals': {n: [_plain(e.low), _plain(e.high)] for n, e in sorted(found.intervals.items())},
  }
  path.expanduser().write_text(json.dumps(record, indent=2, allow_nan=False) + '\n')


def write_examples(found: Evaluation, dataset: Dataset, path: Path) -> None:
  """A line of JSON an example: where it came from, and its metrics; null where one has none."""
  with open(path.expanduser(), 'w') as file:
    for i in range(len(dataset)):
      own = {name: float(values[i]) for name, values in found.of_examples.items()}
      line = {name: None if math.isnan(value) else _plain(value) for name, value in own.items()}
      file.write(json.dumps({'origin': dataset.origin(i), **line}, allow_nan=False) + '\n')


def _plain(value: float) -> float | str:
  return value if math.isfinite(value) else str(value)
