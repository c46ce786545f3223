"""What the compiled train step sends between devices, mesh by mesh."""

import functools

import jax
import pytest

from jaxpref import models, sharding
from jaxpref.data.batches import Batches
from jaxpref.objectives import sft
from jaxpref.plan import costs
from jaxpref.train.optimizer import Optimizer
from jaxpref.train.state import init_state
from jaxpref.train.step import Hparams, make_step
from tests.steps import MESHES, scalars
from tests.worlds import random_pairs

# No two axes are of one length: D = 48, H * head_dim = 64, kv 32, mlp 80, V = 304; rows are 20.
LAYERS, V, D = 2, 304, 48
CHUNK = 64  # tokens that meet the head at once
CONFIG = models.preset(
  'tiny', vocab_size=V, width=D, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=16,
  mlp_width=80, tied=False,
)  # fmt: skip
SCALARS = scalars(0.02, b1=0.9, clip=1.0)


@functools.cache
def messages(name):
  """The collectives of one SFT step, and the sizes that only arrays of tokens have."""
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, MESHES[name], strict=True)))
  model, optimizer = models.Model(CONFIG), Optimizer('adamw')
  state = jax.eval_shape(lambda p: init_state(p, optimizer.init(SCALARS, p)), model.param_shapes())
  groups = sharding.groups(mesh)
  batch = Batches(random_pairs(16, seed=4, longest=20, vocab=V), 16, seed=0, groups=groups)[0]
  places = sharding.params_sharding(mesh, state)
  own = jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch)
  state, batch = (
    jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)
    for tree, where in ((state, places), (batch, own))
  )
  step = jax.jit(
    make_step(model, optimizer, chunk=CHUNK), donate_argnums=0, out_shardings=(places, None)
  )
  with jax.set_mesh(mesh):
    compiled = step.lower(state, batch, Hparams(sft(), SCALARS)).compile()
  return costs.collectives(compiled.as_text())


def parameters(tensor):
  """Shapes of a layer's matrices, the table and the head, as a device of `tensor` has them."""
  found = set()
  for path, x in jax.tree.leaves_with_path(models.Model(CONFIG).param_shapes()):
    spec = sharding.match(sharding.PARAMS, sharding.path_of(path))
    shape = [
      n // (tensor if axis == 'tensor' else 1)
      for n, axis in zip(x.shape, tuple(spec) + (None,) * x.ndim, strict=False)
    ]
    found.add(tuple(shape[1:] if sharding.path_of(path).startswith('layers') else shape))
  return found


def floats(found, *kinds):
  """(shape, times, where from) of float matrices in messages of these kinds."""
  return [
    (array.shape, one.times, one.op_name)
    for one in found
    if one.kind in kinds
    for array in one.arrays
    if array.dtype.startswith(('f', 'bf')) and len(array.shape) > 1
  ]


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=() if n == '2x2x1x2' else pytest.mark.slow) for n in MESHES]
)
def test_only_parameters_are_gathered_and_nothing_is_laid_anew(name):
  _, fsdp, context, tensor = MESHES[name]
  found = messages(name)
  gathered = floats(found, 'all-gather')
  if context > 1:  # keys and values of rows, over context alone: the last axis is head_dim
    kept = [one for one in gathered if one[0][-1] == 16 and len(one[0]) > 4]
    assert sum(times for _, times, _ in kept) == LAYERS * 2 * 2  # k and v, forward and backward
    gathered = [one for one in gathered if one not in kept]
  for shape, _, op in gathered:
    assert shape in parameters(tensor), (shape, op)
  layers = sum(times for shape, times, _ in gathered if V not in shape and V // tensor not in shape)
  head = sum(times for shape, times, _ in gathered if V in shape or V // tensor in shape)
  if fsdp == 1:
    assert not gathered
  else:  # seven matrices a layer, for the pass and for its gradient; the head once more
    assert layers == LAYERS * 7 * 2 and head <= 3
  # Groups are traded for columns of the embedding: once to look up, once for its gradient.
  traded = floats(found, 'all-to-all')
  assert {op.rpartition('/')[2] for _, _, op in traded} <= {
    'gather', 'scatter-add', 'sharding_constraint',
  }  # fmt: skip
  assert len({op for _, _, op in traded}) == (2 if fsdp > 1 else 0)
  # States go round where rows are divided; nothing else moves from place to place.
  moved = floats(found, 'collective-permute')
  assert len(moved) == (2 * (context - 1) if context > 1 else 0)
  assert all(shape[-1] == D for shape, _, _ in moved)


@pytest.mark.parametrize('name', ['2x2x1x2'])
def test_sums_over_data_are_of_gradients(name):
  """Sub-layers' outputs and logits' sums are added over tensor, two devices, and no further."""
  tensor = MESHES[name][-1]
  for one in messages(name):
    if one.kind in ('all-reduce', 'reduce-scatter') and one.group > tensor:
      for array in one.arrays:
        assert array.dtype.startswith('s') or CHUNK not in array.shape
        assert len(array.shape) < 3, (array, one.op_name)
