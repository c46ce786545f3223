"""Per-token fields: the same whatever the packing, and never the logits of all tokens at once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref.data.batches import Batches, Packing
from jaxpref.log_probs import DIVERGENCES, FIELDS, head, log_probs
from jaxpref.models import init, preset
from jaxpref.models.model import mask_layout
from jaxpref.sharding import make_mesh, params_sharding
from tests.worlds import random_pairs

PACKINGS = {
  'padded': Packing(alone=True, share_prompts=False),
  'packed': Packing(share_prompts=False),
  'shared': Packing(),
  'short and long rows': Packing(row_lengths=(32, 48, 96)),
}


@pytest.fixture(scope='module')
def tiny():
  return init(preset('tiny', vocab_size=50), jax.random.key(0))


@pytest.fixture(scope='module')
def reference(tiny):
  """Parameters of the same model, elsewhere."""
  return init(tiny[0].config, jax.random.key(1))[1]


@pytest.fixture(scope='module')
def data():
  return random_pairs(6, seed=1)


def padded(data):
  """Each sequence padded to one row: tokens int32 [n, K, L]."""
  tokens = np.zeros((len(data), 2, 32), np.int32)
  for i in range(len(data)):
    for k, candidate in enumerate(data[i].candidates):
      sequence = np.concatenate([data[i].prompt, candidate])
      tokens[i, k, : len(sequence)] = sequence
  return tokens


def plain(apply, params, tokens):
  """`apply(params, tokens, mask)` of the padded rows [n, K, L], float64 [n, K, L, ...]."""
  rows = tokens.reshape(-1, tokens.shape[-1])
  found = np.asarray(jax.jit(apply)(params, rows, rows > 0), np.float64)
  return found.reshape(*tokens.shape, *found.shape[2:])


def first_micro(batch):
  return jax.tree.map(lambda x: jnp.asarray(x[0]), batch)


def log_softmax(logits):
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.fixture(scope='module')
def expected(tiny, reference, data):
  """Every field in float64 from all logits, [n, K, L]; at t that of the token after t."""
  model, params = tiny
  tokens = padded(data)
  logits = plain(model.logits, params, tokens)
  ours, theirs = log_softmax(logits), log_softmax(plain(model.logits, reference, tokens))
  p, q = np.exp(ours), np.exp(theirs)
  following = np.roll(tokens, -1, axis=-1)[..., None]
  logps = np.take_along_axis(ours, following, -1)[..., 0]
  return {
    'logps': logps,
    'old_logps': logps,
    'entropy': -(p * ours).sum(-1),
    'logsumexp': (logits - ours)[..., 0],
    'log_sum_sq_probs': np.log((p * p).sum(-1)),
    'reverse_kl': (p * (ours - theirs)).sum(-1),
    'forward_kl': (q * (theirs - ours)).sum(-1),
  }


def assert_fields_are(found, expected, batch, data, back=1):
  """At every scored token what stands `back` before it in `expected`, and 0 elsewhere."""
  for g, b in np.ndindex(*batch.fields['ids'].shape[1:]):
    i = batch.fields['ids'][0, g, b]
    for k in range(2):
      n, start = len(data[i].candidates[k]), len(data[i].prompt) - back
      for name, values in found.items():
        right = expected[name][i, k, start : start + n]
        np.testing.assert_allclose(values[g, b, k, :n], right, atol=2e-5, err_msg=name)
        assert not values[g, b, k, n:].any()


@pytest.mark.parametrize('packing', PACKINGS.values(), ids=PACKINGS)
def test_fields_equal_the_plain_model_under_every_packing(tiny, reference, data, expected, packing):
  model, params = tiny
  batch = Batches(data, 6, seed=0, groups=2, packing=packing)[0]

  @jax.jit
  def fields(params, reference, micro):
    return log_probs(model, params, micro, tuple(FIELDS), chunk=16, reference=reference)

  found = fields(params, reference, first_micro(batch))
  assert found.keys() == expected.keys()
  assert_fields_are(found, expected, batch, data)


@pytest.mark.parametrize('name', ['logps', 'reverse_kl'])
def test_a_field_can_be_had_alone(tiny, reference, data, expected, name):
  model, params = tiny
  batch = Batches(data, 6, seed=0)[0]

  @jax.jit
  def fields(params, reference, micro):
    return log_probs(model, params, micro, (name,), chunk=13, reference=reference)

  found = fields(params, reference, first_micro(batch))
  assert found.keys() == {name}
  assert_fields_are(found, expected, batch, data)


def test_divergences_pass_gradients_to_the_policy_alone(tiny, reference, data):
  """To the policy those of the plain model, none where both are one; to the reference none."""
  model, params = tiny
  micro, tokens = first_micro(Batches(data, 6, seed=0)[0]), padded(data)
  rows = tokens.reshape(-1, tokens.shape[-1])
  spans = np.zeros(tokens.shape, bool)
  for i in range(len(data)):
    for k, candidate in enumerate(data[i].candidates):
      start = len(data[i].prompt) - 1
      spans[i, k, start : start + len(candidate)] = True

  def total(params, reference):
    found = log_probs(model, params, micro, tuple(DIVERGENCES), chunk=7, reference=reference)
    return jnp.sum(found['reverse_kl']) + 2 * jnp.sum(found['forward_kl'])

  def plainly(params, reference):
    ours, theirs = (
      jax.nn.log_softmax(model.logits(p, rows, rows > 0)) for p in (params, reference)
    )
    each = jnp.exp(ours) * (ours - theirs) + 2 * jnp.exp(theirs) * (theirs - ours)
    return jnp.sum(jnp.where(spans.reshape(rows.shape), jnp.sum(each, axis=-1), 0))

  gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
  ours, theirs = gradients(params, reference)
  right = jax.jit(jax.grad(plainly))(params, reference)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), ours, right)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(theirs))
  for leaf in jax.tree.leaves(gradients(params, params)[0]):
    np.testing.assert_allclose(leaf, 0, atol=1e-4)


def test_rewards_are_the_scores_of_the_tokens_themselves_and_values_those_before(data):
  config = preset('tiny', vocab_size=50, num_labels=1, tied=False)
  model, params = init(config, jax.random.key(2))
  batch = Batches(data, 6, seed=0)[0]
  fields = jax.jit(lambda p, b: log_probs(model, p, b, ('rewards', 'values')))
  found = fields(params, first_micro(batch))

  def scores(params, rows, mask):
    return model.scores(params, model.hidden(params, rows, mask_layout(mask)))[..., 0]

  right = plain(scores, params, padded(data))
  assert_fields_are({'rewards': found['rewards']}, {'rewards': right}, batch, data, back=0)
  assert_fields_are({'values': found['values']}, {'values': right}, batch, data)


def test_chunks_do_not_matter_for_value_or_gradient(tiny):
  model, params = tiny
  states = jax.random.normal(jax.random.key(1), (2, 40, 64))
  targets = jax.random.randint(jax.random.key(2), (2, 40), 0, 50)

  def total(params, chunk):
    fields = head(model, params, states, targets, ('logps', 'entropy', 'logsumexp'), chunk=chunk)
    return sum(jnp.sum(jnp.sin(x)) for x in fields.values())

  value, grads = jax.value_and_grad(total)(params, 1000)
  for chunk in (7, 8, 40):
    other, other_grads = jax.value_and_grad(total)(params, chunk)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, other_grads)


def test_a_tempered_policy_is_the_softmax_of_divided_logits(tiny):
  model, params = tiny
  states = jax.random.normal(jax.random.key(1), (1, 40, 64))
  targets = jax.random.randint(jax.random.key(2), (1, 40), 0, 50)
  found = head(model.replace(temperature=0.4), params, states, targets, ('logps', 'entropy'))
  log_p = log_softmax(np.asarray(model.unembed(params, states), np.float64) / 0.4)
  logps = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
  np.testing.assert_allclose(found['logps'], logps, atol=1e-5)
  np.testing.assert_allclose(found['entropy'], -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)
  with pytest.raises(ValueError, match='temperature must be positive and finite, got 0'):
    model.replace(temperature=0.0)


@pytest.mark.parametrize('fields', [('logps', 'entropy'), ('logps', 'forward_kl')])
def test_logits_of_all_tokens_are_never_held(fields):
  model, params = init(preset('tiny', vocab_size=8192, num_layers=1), jax.random.key(0))
  slots, chunk = 4096, 128
  states = jnp.zeros((1, slots, 64))
  targets = jnp.zeros((1, slots), jnp.int32)
  reference = (params, states) if fields[-1] in DIVERGENCES else None

  def loss(params, states):
    found = head(model, params, states, targets, fields, chunk=chunk, reference=reference)
    return sum(jnp.sum(x) for x in found.values())

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, states).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 0.25 * slots * 8192 * 4, f'{temporary / 2**20:.0f} MiB of temporaries'


@pytest.mark.parametrize('tied', [False, True])
def test_a_vocabulary_in_shards_keeps_its_logits_in_shards(tied):
  """Each of 4 devices has its quarter of a chunk's logits, and sums are what they exchange."""
  mesh = make_mesh({'fsdp': 2, 'tensor': 4})
  config = preset('tiny', vocab_size=1024, num_layers=1, tied=tied, logit_cap=30.0)
  model, params = init(config, jax.random.key(0))
  states = jax.random.normal(jax.random.key(1), (2, 48, 64))
  targets = jax.random.randint(jax.random.key(2), (2, 48), 0, 1024)
  fields = ('logps', 'entropy', 'logsumexp', 'log_sum_sq_probs')

  def loss(params, states):
    found = head(model, params, states, targets, fields, chunk=24)
    return sum(jnp.sum(jnp.sin(x)) for x in found.values())

  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  alone = gradient(params, states)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, params_sharding(mesh, params))
    own = jax.device_put(states, NamedSharding(mesh, P(('data', 'fsdp'))))
    text = gradient.lower(placed, own).compile().as_text()
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone, gradient(placed, own)
    )
  chunks = set(re.findall(r'f32\[(?:\d+,)?24,(\d+)\]', text))
  assert '256' in chunks and '1024' not in chunks


def test_unknown_field(tiny):
  model, params = tiny
  batch = first_micro(Batches(random_pairs(2, seed=0), 2)[0])
  with pytest.raises(ValueError, match=r"cannot compute \['entropie'\]; it knows .*entropy"):
    log_probs(model, params, batch, ('entropie',))


def test_what_cannot_be_had_is_said_before_anything_runs(tiny):
  model, params = tiny
  batch = first_micro(Batches(random_pairs(2, seed=0), 2)[0])
  with pytest.raises(ValueError, match=r"\['forward_kl'\] are divergences from a live reference"):
    log_probs(model, params, batch, ('logps', 'forward_kl'))
  with pytest.raises(ValueError, match=r'with one score .* none, but a language-model head'):
    log_probs(model, params, batch, ('rewards',))
  two = init(preset('tiny', vocab_size=50, num_labels=2, tied=False), jax.random.key(0))
  with pytest.raises(ValueError, match=r'this one has 2'):
    log_probs(*two, batch, ('values',))
