r"""What a run would take, before it is paid for: `jaxpref plan --config=dpo --topology=v5e:8x8`.

  jaxpref plan --config=dpo --config.model=preset:llama3-8b --config.remat=dots \
    --config.batch.row_lengths=1536, --topology=v5e:8x8
  jaxpref plan --config=dpo --config.model=preset:qwen3-0.6b --topology=v5e:2x2 --search
  jaxpref plan --config=dpo --config.model=preset:llama3-8b --topology=gpu:h100:8

For a TPU slice the very step that training would run is compiled ahead of time, with no TPU there
(`pip install 'jaxpref[tpu]'` for its compiler); FLOPs, memory traffic and messages are counted in
the compiled program, loops as often as they turn. For GPUs, and with --analytic, all of it is
arithmetic on shapes. Every example is taken to have the lengths of --lengths. Times are bounds:
what the chips' peaks allow, nothing waiting for anything else. A preset keeps its own vocabulary.
"""

import json
from collections.abc import Sequence

from absl import flags

from jaxpref.cli import configs


def define_flags() -> flags.FlagValues:
  own = flags.FlagValues()
  flags.DEFINE_string('topology', None, "'v5e:8x8', 'gpu:h100:8'", flag_values=own)
  flags.DEFINE_string(
    'lengths', '512,512,512', 'tokens of a prompt and of its completions', flag_values=own
  )
  flags.DEFINE_boolean('analytic', False, 'compile nothing: arithmetic alone', flag_values=own)
  flags.DEFINE_boolean(
    'search', False, 'try meshes, remat, microbatches and rows; rank what fits', flag_values=own
  )
  flags.DEFINE_integer(
    'compile', 2, 'how many of the best that --search estimates to compile', flag_values=own
  )
  flags.DEFINE_float('price', None, 'of a chip for an hour, in any money', flag_values=own)
  flags.DEFINE_boolean('json', False, 'print JSON', flag_values=own)
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', flag_values=own)
  return own


def main(argv: Sequence[str]) -> int:
  """Runs the command; argv[0] is its name. Returns 3 where the plan does not fit."""
  own = define_flags()
  extra = configs.parse(own, argv)
  if own.help:
    print(f'{__doc__}\n{own.get_help()}')
    return 0
  if extra:
    raise flags.Error(f'unexpected {extra[0]!r}; values are given as --config.key=value')
  for name in ('config', 'topology'):
    if own[name].value is None:
      raise flags.Error(f'--{name} is missing; try --config=dpo --topology=v5e:8x8')

  import jax

  jax.config.update('jax_platforms', 'cpu')  # whatever is here is not what is planned for
  from jaxpref.plan import batch, chips, planned, report, search

  topology, lengths = chips.parse(own.topology), batch.parse_lengths(own.lengths)
  if own.search:
    compile_ = 0 if own.analytic or not topology.tpu else own.compile
    found = search.run(own.config, topology, lengths, compile_best=compile_, price=own.price)
    if own.json:
      print(json.dumps(found.as_json(), indent=2))
    else:
      print('\n'.join(search.lines(found)))
    return 0 if any(plan.fits for _, plan in found.ranked) else 3
  plan = planned.make(own.config, topology, lengths, analytic=own.analytic, price=own.price)
  print(json.dumps(plan.as_json(), indent=2) if own.json else '\n'.join(report.lines(plan)))
  return 0 if plan.fits else 3
