"""What a compiled program costs, counted on programs whose costs are known by hand."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxpref import sharding
from jaxpref.models import preset
from jaxpref.plan import costs, hlo, messages
from jaxpref.plan.planned import attention_price


def text_of(f, *shapes, **options):
  """The compiled text of `f` on float32 arrays of these shapes."""
  arguments = [
    shape if isinstance(shape, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in shapes
  ]
  return jax.jit(f, **options).lower(*arguments).compile().as_text()


def chain(x, weights):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


PRODUCT = 2 * 8 * 16 * 16  # of [8, 16] and [16, 16]


def test_a_scan_counts_as_often_as_it_turns():
  assert costs.count(text_of(chain, (8, 16), (7, 16, 16))).flops == 7 * PRODUCT


def test_the_gradient_of_a_scan_is_two_more_products_a_layer():
  gradient = jax.grad(lambda x, w: chain(x, w).sum(), argnums=(0, 1))
  assert costs.count(text_of(gradient, (8, 16), (7, 16, 16))).flops == 3 * 7 * PRODUCT


def test_rematerialisation_is_counted():
  layer = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None), prevent_cse=False)
  loss = lambda x, w: jax.lax.scan(layer, x, w)[0].sum()  # noqa: E731
  # Two products a layer forward, four backward; the first of the two again in between, the second
  # too where the compiler does not see that only its tanh is needed.
  flops = costs.count(text_of(jax.grad(loss, argnums=1), (8, 16), (5, 16, 16))).flops
  assert flops == 5 * PRODUCT * 8


@pytest.mark.parametrize('turns', [1, 6])
def test_loops_within_loops_multiply(turns):
  def f(x, w):
    def outer(_, x):
      return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ w), x)

    return jax.lax.fori_loop(0, turns, outer, x)

  assert costs.count(text_of(f, (8, 16), (16, 16))).flops == turns * 3 * PRODUCT


def test_batched_and_transposed_products():
  f = functools.partial(jnp.einsum, 'bqhd,bkhd->bhqk')
  assert costs.count(text_of(f, (2, 5, 3, 8), (2, 7, 3, 8))).flops == 2 * (2 * 3 * 5 * 7) * 8


def test_a_loop_that_only_running_it_would_tell_is_named_and_guessed():
  def f(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

  text = text_of(f, (8, 16), (16, 16))
  assert len(costs.count(text).unknown) == 1
  assert costs.count(text, unknown=10).flops == 10 * costs.count(text).flops == 10 * PRODUCT
  assert costs.count(text_of(chain, (8, 16), (7, 16, 16))).unknown == ()


@pytest.mark.parametrize(
  ('stride', 'padding', 'dilation'),
  [(1, 'VALID', 1), (2, 'VALID', 1), (1, ((3, 2),), 1), (2, ((1, 1),), 2), (1, ((9, 9),), 3)],
)
def test_convolutions_count_where_data_is_met(stride, padding, dilation):
  """Against the sum over all places, written out: only those on the data count."""
  data, kernel, channels, out = 11, 4, 3, 5

  def f(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (stride,), padding, lhs_dilation=(dilation,), dimension_numbers=('NWC', 'WIO', 'NWC')
    )

  text = jax.jit(f).lower(jnp.ones((2, data, channels)), jnp.ones((kernel, channels, out)))
  length = (data - 1) * dilation + 1
  low, high = (0, 0) if padding == 'VALID' else padding[0]
  real = [i % dilation == 0 and 0 <= i < length for i in range(-low, length + high)]
  places = range(0, len(real) - kernel + 1, stride)
  met = sum(sum(real[start : start + kernel]) for start in places)
  flops = costs.count(text.compiler_ir('hlo').as_hlo_text()).flops
  assert flops == 2 * 2 * channels * out * met


LOOP = """\
  HloModule by_hand

  %add (a: f32[], b: f32[]) -> f32[] {
    %a = f32[] parameter(0)
    %b = f32[] parameter(1)
    ROOT %sum = f32[] add(%a, %b)
  }

  %begin (p.0: bf16[64,32]) -> (bf16[64,128], u32[]) {
    %p.0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
    %gather.0 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=3, \
replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={1}, frontend_attributes={chain_id="1"}
    ROOT %start = (bf16[64,128]{1,0}, u32[]{:S(2)}) custom-call(%gather.0), \
custom_call_target="AsyncCollectiveStart"
  }

  %meanwhile (p.1: bf16[64,32], p.2: bf16[8,64], p.3: bf16[64,16]) -> bf16[8,16] {
    %p.1 = bf16[64,32]{1,0} parameter(0)
    %p.2 = bf16[8,64]{1,0} parameter(1)
    %p.3 = bf16[64,16]{1,0} parameter(2)
    %gather.1 = bf16[64,128]{1,0} all-gather(%p.1), channel_id=3, \
replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={1}, frontend_attributes={chain_id="1"}
    ROOT %product = bf16[8,16]{1,0} convolution(%p.2, %p.3), dim_labels=bf_io->bf
  }

  %scatter (p.4: f32[128,16]) -> f32[32,16] {
    %p.4 = f32[128,16]{1,0} parameter(0)
    %reduced = f32[128,16]{1,0} all-reduce(%p.4), channel_id=4, replica_groups=[2,4]<=[8], \
to_apply=%add
    %zero = s32[] constant(0)
    ROOT %mine = f32[32,16]{1,0} dynamic-slice(%reduced, %zero, %zero), \
dynamic_slice_sizes={32,16}
  }

  %body (s.0: (s32[], bf16[64,32], f32[128,16], s32[])) -> (s32[], bf16[64,32], \
f32[128,16], s32[]) {
    %s.0 = (s32[]{:T(128)}, bf16[64,32]{1,0}, f32[128,16]{1,0}, /*index=3*/s32[]) parameter(0)
    %i.0 = s32[]{:T(128)} get-tuple-element(%s.0), index=0
    %w.0 = bf16[64,32]{1,0} get-tuple-element(%s.0), index=1
    %g.0 = f32[128,16]{1,0} get-tuple-element(%s.0), index=2
    %n.0 = s32[] get-tuple-element(%s.0), index=3
    %by = s32[] constant(2)
    %next = s32[]{:T(128)} add(%i.0, %by)
    %fusion.0 = (bf16[64,128]{1,0}, u32[]{:S(2)}) fusion(%w.0), kind=kCustom, calls=%begin
    %x = bf16[8,64]{1,0} broadcast(%by), dimensions={}
    %y = bf16[64,16]{1,0} broadcast(%by), dimensions={}
    %fusion.1 = bf16[8,16]{1,0} fusion(%w.0, %x, %y), kind=kOutput, calls=%meanwhile
    %fusion.2 = f32[32,16]{1,0} fusion(%g.0), kind=kCustom, calls=%scatter
    ROOT %after = (s32[]{:T(128)}, bf16[64,32]{1,0}, f32[128,16]{1,0}, s32[]) \
tuple(%next, %w.0, %g.0, %n.0)
  }

  %condition (s.1: (s32[], bf16[64,32], f32[128,16], s32[])) -> pred[] {
    %s.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}, f32[128,16]{1,0}, /*index=3*/s32[]) parameter(0)
    %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
    %n.1 = s32[] get-tuple-element(%s.1), index=3
    ROOT %test = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
  }

  ENTRY %main (w: bf16[64,32], g: f32[128,16]) -> s32[] {
    %w = bf16[64,32]{1,0} parameter(0)
    %g = f32[128,16]{1,0} parameter(1)
    %first = s32[] constant(1)
    %last = s32[] constant(12)
    %before = (s32[], bf16[64,32]{1,0}, f32[128,16]{1,0}, s32[]) tuple(%first, %w, %g, %last)
    %loop = (s32[]{:T(128)}, bf16[64,32]{1,0}, f32[128,16]{1,0}, /*index=3*/s32[]) \
while(%before), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
    ROOT %out = s32[] get-tuple-element(%loop), index=0
  }
"""


def test_a_tpu_program():
  """As the TPU's compiler writes: loops that do not say how often they turn, a message laid over
  two fusions, a reduce-scatter as an all-reduce that is cut up at once."""
  found = costs.count(textwrap.dedent(LOOP))
  turns = 6  # 1, 3, 5, 7, 9, 11 are below 12
  assert found.flops == turns * 2 * 8 * 64 * 16
  gather, scatter = found.collectives
  assert (gather.kind, gather.group, gather.times) == ('all-gather', 4, turns)
  assert gather.bytes == turns * 64 * 128 * 2 and gather.wire == gather.bytes * 3 / 4
  assert (scatter.kind, scatter.group, scatter.times) == ('reduce-scatter', 4, turns)
  assert scatter.bytes == turns * 128 * 16 * 4
  assert found.by_kind() == {
    'all-gather': (turns, gather.bytes), 'reduce-scatter': (turns, scatter.bytes),
  }  # fmt: skip


KERNELS = """\
  HloModule jit_step

  ENTRY %main (q: bf16[2,4,2,64,16], k: bf16[2,4,1,64,16]) -> bf16[2,4,2,64,16] {
    %q = bf16[2,4,2,64,16]{4,3,2,1,0} parameter(0)
    %k = bf16[2,4,1,64,16]{4,3,2,1,0} parameter(1)
    %a = (bf16[2,4,2,64,16]{4,3,2,1,0}, f32[2,4,2,64]{3,2,1,0}) custom-call(%q, %k), CALL/attention_forward/pallas_call"}, SAYS
    %b = (bf16[2,4,1,64,16]{4,3,2,1,0}, bf16[2,4,1,64,16]{4,3,2,1,0}) custom-call(%q, %k), CALL/attention_to_keys/pallas_call"}, SAYS
    %c = bf16[8]{0} custom-call(%q), CALL/another/pallas_call"}, SAYS
    ROOT %d = bf16[2,4,2,64,16]{4,3,2,1,0} custom-call(%q, %k), CALL/attention_to_queries/pallas_call"}, SAYS
  }
"""  # noqa: E501
CALL = 'custom_call_target="tpu_custom_call", metadata={op_name="jit(step)'
SAYS = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"7"}}}'
LINES = """backend_config={"custom_call_config": {"cost_estimate": {
"bytes_accessed":9,
"flops":7
}, "needs_layout_passes": true}}"""  # as libtpu writes it within fusions


@pytest.mark.parametrize('said', [SAYS, LINES])
def test_a_kernel_costs_what_the_batch_asks_of_it_and_another_what_it_says(said):
  """2, 3 and 4 products of 2 * 4 * 2 * 64 queries with 10 keys each, in heads of 16."""
  text = textwrap.dedent(KERNELS).replace('CALL', CALL).replace('SAYS', said)
  assert costs.count(text).flops == 4 * 7
  price = attention_price(preset('tiny', num_heads=8, num_kv_heads=4), 10.0)
  found = costs.count(text, price=price)
  assert found.flops == (2 + 3 + 4) * 2 * (2 * 4 * 2 * 64) * 10 * 16 + 7
  assert found.kernels == {'pallas_call': (4, found.flops)}


def test_messages_between_devices():
  mesh = sharding.make_mesh({'fsdp': 8}, jax.devices())

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P('fsdp'), P('fsdp')), out_specs=P('fsdp'))
  def f(x, w):
    w = jax.lax.all_gather(w, 'fsdp', axis=0, tiled=True)  # [8, 16]
    y = jax.lax.psum_scatter(x @ w, 'fsdp', scatter_dimension=1, tiled=True)  # [8, 2]
    return y + jax.lax.pmax(x, 'fsdp')[:, :2]

  found = costs.count(text_of(f, (64, 8), (8, 16)))
  size = {one.kind: (one.bytes, one.group, one.times) for one in found.collectives}
  assert size == {
    'all-gather': (8 * 16 * 4, 8, 1),
    'reduce-scatter': (8 * 16 * 4, 8, 1),
    'all-reduce': (8 * 8 * 4, 8, 1),
  }


@pytest.mark.parametrize(
  ('groups', 'first', 'slices'),
  [
    ('replica_groups={{0,4},{1,5}}', (0, 4), 2),
    ('replica_groups=[2,4]<=[8]', (0, 1, 2, 3), 1),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', (0, 4), 2),
    ("replica_groups=mesh['x'=2,'y'=4] {'y'}", (0, 1, 2, 3), 1),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4), 2),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y':(1)2}", (0, 2, 4, 6), 2),  # halves of y
    ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", (0, 1), 1),  # within a half
    # Places 0, 1, 2 ... of these meshes are devices 0, 4, 1, 5, 2, ...
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", (0, 1, 2, 3), 1),
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", (0, 4), 2),
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=(0,4,1,5,2,6,3,7) {'y'}", (0, 4), 2),
  ],
)
def test_a_message_between_slices_is_told_by_its_group(groups, first, slices):
  """8 devices in slices of 4; an all-reduce of 64 bytes."""
  text = f"""\
HloModule by_hand

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %sum = f32[16]{{0}} all-reduce(%x), channel_id=1, {groups}, use_global_device_ids=true
}}
"""
  (instruction,) = (
    step.instruction for step in hlo.read(text).steps() if step.instruction.opcode == 'all-reduce'
  )
  assert messages.members(instruction) == first
  (found,) = costs.count(text, slice_size=4).collectives
  assert (found.group, found.slices) == (len(first), slices)
  near = len(first) // slices  # devices of one slice share what crosses
  assert found.wire == 2 * 64 * (near - 1) / near
  assert found.far == 2 * 64 / near * (slices - 1) / slices
  kind = 'all-reduce' if slices == 1 else 'all-reduce between slices'
  assert messages.by_kind([found]) == {kind: (1, 64)}


@pytest.mark.parametrize(('pairs', 'slices'), [('{0,1},{1,0}', 1), ('{0,1},{3,4}', 2)])
def test_a_permutation_crosses_where_one_of_its_pairs_does(pairs, slices):
  text = f"""\
HloModule by_hand

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %y = f32[16]{{0}} collective-permute(%x), channel_id=1, source_target_pairs={{{pairs}}}
}}
"""
  (found,) = costs.count(text, slice_size=4).collectives
  assert (found.group, found.slices) == (2, slices)
  assert (found.wire, found.far) == ((64, 0) if slices == 1 else (0, 64))


@pytest.mark.parametrize(
  ('kind', 'target', 'slices', 'sent'),
  [
    ('ALL_REDUCE', '{1,2}x{0:3}', 2, 64),  # half of it twice
    ('ALL_REDUCE', '{1:4}x{0:3}', 4, 2 * 64 * 3 / 4),
    ('ALL_GATHER', '{1,2,3}x{0:3}', 3, 64 * 2),  # its own part to both others
  ],
)
def test_on_tpus_slices_exchange_through_their_hosts(kind, target, slices, sent):
  """As the TPU's compiler writes: the parts of a slice are sums already, a shard a chip."""
  names = f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"'
  text = f"""\
HloModule by_hand

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  %begin = token[] after-all()
  %send = (f32[16]{{0}}, u32[], token[]) send(%x, %begin), channel_id=1, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",{names}}}
  %sent = token[] send-done(%send), channel_id=1, is_host_transfer=true
  ROOT %y = f32[16]{{0}} copy(%x)
}}
"""
  (found,) = costs.count(text, slice_size=4).collectives
  assert (found.slices, found.wire, found.far) == (slices, 0, pytest.approx(sent))
  (name,) = messages.by_kind([found])
  assert name == kind.lower().replace('_', '-') + ' between slices'


def test_memory_traffic_of_an_update_in_place_is_what_it_puts_in():
  """A scan writes one row of its output a turn, not all of it."""
  rows, width = 512, 1024

  def f(x):
    return jax.lax.scan(lambda x, _: (x * 1.5, x), x, None, length=rows)[1]

  found = costs.count(text_of(f, (width,)))
  row = 4 * width
  # Each turn reads and writes the state and writes a row; the copies of one turn stay small.
  assert 3 * rows * row <= found.hbm <= 8 * rows * row


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.read('HloModule empty')
