"""Per-token fields: the same whatever the packing, and never the logits of all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.data.batches import Batches, Packing
from jaxpref.log_probs import head, log_probs
from jaxpref.models import init, preset
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


def direct(model, params, data):
  """log softmax and entropy of the plain model, each sequence padded to one row: [n, K, L] both."""
  length = 32
  tokens = np.zeros((len(data), 2, length), np.int32)
  for i in range(len(data)):
    for k, candidate in enumerate(data[i].candidates):
      sequence = np.concatenate([data[i].prompt, candidate])
      tokens[i, k, : len(sequence)] = sequence

  @jax.jit
  def fields(params, tokens):
    logps = jax.nn.log_softmax(model.logits(params, tokens, tokens > 0))
    next_token = jnp.roll(tokens, -1, axis=1)[..., None]
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    return jnp.take_along_axis(logps, next_token, axis=-1)[..., 0], entropy

  found = fields(params, tokens.reshape(-1, length))
  return [np.asarray(x).reshape(tokens.shape) for x in found]


@pytest.mark.parametrize('packing', PACKINGS.values(), ids=PACKINGS)
def test_fields_equal_the_plain_model_under_every_packing(tiny, packing):
  model, params = tiny
  data = random_pairs(6, seed=1)
  batch = Batches(data, 6, seed=0, groups=2, packing=packing)[0]
  micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
  found = jax.jit(lambda p, b: log_probs(model, p, b, ('logps', 'entropy'), chunk=16))(
    params, micro
  )
  logps, entropy = direct(model, params, data)
  for g in range(2):
    for b, i in enumerate(batch.fields['ids'][0, g]):
      for k in range(2):
        n, start = len(data[i].candidates[k]), len(data[i].prompt) - 1
        span = (i, k, slice(start, start + n))
        np.testing.assert_allclose(found['logps'][g, b, k, :n], logps[span], atol=2e-5)
        np.testing.assert_allclose(found['entropy'][g, b, k, :n], entropy[span], atol=2e-5)
        assert not found['logps'][g, b, k, n:].any()


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


def test_logits_of_all_tokens_are_never_held():
  model, params = init(preset('tiny', vocab_size=8192, num_layers=1), jax.random.key(0))
  slots, chunk = 4096, 128
  states = jnp.zeros((1, slots, 64))
  targets = jnp.zeros((1, slots), jnp.int32)

  def loss(params, states):
    return jnp.sum(head(model, params, states, targets, ('logps', 'entropy'), chunk=chunk)['logps'])

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, states).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 0.25 * slots * 8192 * 4, f'{temporary / 2**20:.0f} MiB of temporaries'


def test_unknown_field(tiny):
  model, params = tiny
  batch = jax.tree.map(lambda x: jnp.asarray(x[0]), Batches(random_pairs(2, seed=0), 2)[0])
  with pytest.raises(ValueError, match=r"cannot compute \['entropie'\]; it knows .*entropy"):
    log_probs(model, params, batch, ('entropie',))
