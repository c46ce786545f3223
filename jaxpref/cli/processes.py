"""Several processes that run one command together: `--coordinator --processes --process`."""

import os

from absl import flags


def define_process_flags(own: flags.FlagValues) -> None:
  flags.DEFINE_boolean(
    'distributed',
    False,
    'join the other processes of this job, as jax finds them by itself on Cloud TPU, SLURM, Open '
    'MPI and Kubernetes; implied by the three below and by JAX_COORDINATOR_ADDRESS',
    flag_values=own,
  )
  flags.DEFINE_string('coordinator', None, 'host:port of process 0', flag_values=own)
  flags.DEFINE_integer('processes', None, 'how many processes', lower_bound=1, flag_values=own)
  flags.DEFINE_integer('process', None, 'which one this is', lower_bound=0, flag_values=own)


def join(own: flags.FlagValues) -> bool:
  """Joins the processes that the flags name, if any; whether this one is to write and print."""
  import jax  # after the flags: --help and typos should not wait for jax

  from jaxpref import hosts

  told = (own.coordinator, own.processes, own.process)
  if own.distributed or os.environ.get('JAX_COORDINATOR_ADDRESS') or told != (None, None, None):
    hosts.initialize(*told)
  return jax.process_index() == 0
