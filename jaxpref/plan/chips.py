"""What accelerators can do, by their makers, and meshes of ones that are not here."""

import dataclasses
import importlib.metadata
import os
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
  """One chip's peaks: dense bf16 FLOP/s, bytes of memory that a program gets, bytes/s of it, and
  bytes/s that it sends to its neighbours, all links together, and to other slices."""

  flops: float
  memory: float
  bandwidth: float
  links: float
  network: float


# cloud.google.com/tpu/docs/v5e, v5p and v6e (read November 2026): peak, HBM and its bandwidth; the
# links' figure is for both ways, so half of it. A v5e program gets 15.75 of 16 GiB, a v6e 31.25 of
# 32. The network of the data centre: 6.4 and 25.6 Tbit/s for the 256 chips of a v5e and a v6e pod,
# 50 Gbit/s for a v5p chip. nvidia.com's data sheets of A100, H100 and H200 SXM: NVLink likewise is
# given for both ways; between nodes a DGX A100 has 200 Gbit/s for each GPU, the others 400.
CHIPS = {
  'v5e': Chip(197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9),
  'v5p': Chip(459e12, 95e9, 2765e9, 600e9, 6.25e9),
  'v6e': Chip(918e12, 31.25 * GIB, 1640e9, 448e9, 12.5e9),
  'a100': Chip(312e12, 80e9, 2039e9, 300e9, 25e9),
  'h100': Chip(989e12, 80e9, 3350e9, 450e9, 50e9),
  'h200': Chip(989e12, 141e9, 4800e9, 450e9, 50e9),
}
TPUS = ('v5e', 'v5p', 'v6e')


class Topology(NamedTuple):
  """One slice, or one node of GPUs; `name` as it was given, 'v5e:8x8' or 'gpu:h100:8'."""

  name: str
  chip: str
  chips: int

  @property
  def tpu(self) -> bool:
    return self.chip in TPUS

  @property
  def peaks(self) -> Chip:
    return CHIPS[self.chip]


def parse(text: str) -> Topology:
  """'v5e:8x8' (64 TPU chips) or 'gpu:h100:8'.

  Raises:
    ValueError: neither, or a chip that is not known.
  """
  kind, _, rest = text.partition(':')
  gpu = kind == 'gpu'
  if gpu:
    kind, _, rest = rest.partition(':')
  sizes = rest.split('x')
  known = [name for name in CHIPS if (name in TPUS) != gpu]
  if kind not in known or not all(size.isdigit() and int(size) for size in sizes):
    raise ValueError(
      f"--topology={text}: expected a TPU slice such as 'v5e:8x8' or 'v5p:4x4x4', or "
      f"'gpu:h100:8'; chips: {', '.join(CHIPS)}"
    )
  count = 1
  for size in sizes:
    count *= int(size)
  return Topology(text, kind, count)


@dataclasses.dataclass(frozen=True)
class StandIn:
  """What a mesh asks of a device that is only counted."""

  id: int
  slice_index: int
  platform: str
  process_index: int = 0
  device_kind: str = 'stand-in'


def stand_ins(topology: Topology, slices: int = 1) -> Any:
  """Devices that nothing can be compiled for, as many as there would be."""
  platform = 'tpu' if topology.tpu else 'gpu'
  count = topology.chips * slices
  return [StandIn(i, i // topology.chips, platform) for i in range(count)]


def devices(topology: Topology, slices: int = 1) -> Any:
  """The devices of TPU slices that are not here: what programs can be compiled for.

  Raises:
    ImportError: the TPU's compiler is not installed.
    ValueError: no such slice.
  """
  # The compiler is a library of this process alone: no machine to ask about, no other to fear.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', f'{topology.chip}-{topology.chips}')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  from jax.experimental import topologies

  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ImportError(
      "compiling for a TPU needs its compiler: pip install 'jaxpref[tpu]' (no TPU has to be "
      'there); or give --analytic for estimates alone'
    ) from error
  try:
    return topologies.get_topology_desc(topology.name, 'tpu', num_slices=slices).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    first = str(error).splitlines()[0]
    raise ValueError(f'--topology={topology.name}: {first}') from error


def versions() -> dict[str, str]:
  """Of the compiler for TPUs."""
  return {'libtpu': importlib.metadata.version('libtpu')}
