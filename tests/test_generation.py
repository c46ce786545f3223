"""Text generation: batching, stop strings, broken characters, prompts."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxpref import generation, models
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.sampling import Sampling

BYTES = load_tokenizer('byte')
TINY = models.preset('tiny')


@dataclasses.dataclass(frozen=True)
class Scripted:
  """A model that says `params`, token by token: after the token at position p comes params[p]."""

  config: models.Config = TINY

  def init_cache(self, batch, length):
    return jnp.zeros(())

  def hidden(self, params, tokens, layout, cache):
    return layout.positions[..., None], cache

  def unembed(self, params, states):
    return 50.0 * jax.nn.one_hot(params[states[..., 0]], BYTES.vocab_size)


def script(text, end=()):
  """Parameters for `Scripted` after a prompt of <bos> and one byte, of one shape for all texts."""
  tokens = [0, *BYTES.encode(text), *end]
  return jnp.asarray(tokens + [ord('~')] * (200 - len(tokens)))


def say(text, *, end=(), prompt='>', max_new_tokens=40, **options):
  (completion,) = generation.generate(
    Scripted(), script(text, end), BYTES, [prompt], max_new_tokens=max_new_tokens, **options
  )
  return completion


@pytest.mark.parametrize(
  ('stop', 'text', 'sampled'),
  [
    (['END'], 'one. two. ', 'one. two. END'),
    (['END', '. t'], 'one', 'one. t'),
    ([' ', '. '], 'one', 'one. '),  # one byte completes both; the earliest beginning counts
    (['one'], '', 'one'),
    (['. two. END', 'ND'], 'one', 'one. two. END'),
  ],
)
def test_a_stop_string_ends_tokens_with_it_and_text_before_it(stop, text, sampled):
  completion = say('one. two. END three', stop=stop)
  assert completion.text == text
  assert BYTES.decode(completion.tokens) == sampled
  assert len(completion.logps) == len(completion.tokens)
  assert completion.finish_reason == 'stop'


def test_stop_tokens_are_sampled_but_not_text():
  completion = say('bye', end=(BYTES.eos_id,))
  assert (completion.text, completion.finish_reason) == ('bye', 'stop')
  assert completion.tokens == (*BYTES.encode('bye'), BYTES.eos_id)
  completion = say('bye!', stop_ids=[ord('!')])
  assert (completion.text, completion.finish_reason) == ('bye', 'stop')
  # A stop string before the stop token counts first.
  completion = say('bye', end=(BYTES.eos_id,), stop=['e'])
  assert (completion.text, BYTES.decode(completion.tokens)) == ('by', 'bye')


def test_the_length_limit_does_not_leave_broken_characters():
  for shift in range(7):
    raw = ('x' * shift + 'né € 𝛃' * 2).encode()[:6]
    completion = say('x' * shift + 'né € 𝛃' * 2, max_new_tokens=6)
    assert completion.text == raw.decode(errors='ignore')
    assert completion.tokens == tuple(raw)
    assert completion.finish_reason == 'length'


def test_a_stop_string_of_several_bytes_is_found_once_whole():
  completion = say('a€b', stop=['€'])
  assert (completion.text, len(completion.tokens)) == ('a', 4)


def test_a_completion_keeps_the_space_that_it_begins_with():
  vocab = {'▁one': 0, '▁two': 1, '▁': 2}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='▁'))
  backend.decoder = tokenizers.decoders.Metaspace()
  assert backend.decode([1, 0]) == 'two one'
  assert generation.decode_after(backend, 0, [1, 0]) == ' two one'


def test_completions_do_not_depend_on_batches_and_come_in_order():
  model = models.Model(models.preset('tiny', width=16, mlp_width=32, num_layers=1))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4'), model.param_shapes())
  prompts = ['a longer prompt', 'b', '', 'a longer prompt']
  settings = dict(max_new_tokens=6, num_samples=2, seed=4, sampling=Sampling(top_k=200))

  def run(batch_size):
    return generation.generate(model, params, BYTES, prompts, batch_size=batch_size, **settings)

  want = run(3)
  assert [(c.prompt, c.k) for c in want] == [(i, k) for i in range(4) for k in range(2)]
  assert len({c.tokens for c in want}) == 8
  for a, b in zip(want, run(16), strict=True):
    assert a.tokens == b.tokens
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)
  assert generation.generate(model, params, BYTES, [], **settings) == []


def test_bos_once():
  bos, hi = BYTES.bos_id, BYTES.encode('hi')
  assert generation.encode(BYTES, 'hi', 0) == [bos, *hi]
  assert generation.encode(BYTES, '<|bos|>hi', 0) == [bos, *hi]
  assert generation.encode(BYTES, '', 0) == [bos]
  plain = dataclasses.replace(BYTES, adds_bos=False)
  assert generation.encode(plain, 'hi', 0) == hi
  messages = [{'role': 'user', 'content': 'hi'}]
  chat = generation.encode(BYTES, messages, 0)
  assert BYTES.decode(chat) == '<|bos|><user>hi<|eos|><assistant>'


def test_prompts_are_padded_on_the_left_to_few_lengths():
  tokens, mask = generation.pad_left([[5, 6, 7], [8]], 3)
  np.testing.assert_array_equal(tokens[:, -4:], [[0, 5, 6, 7], [0, 0, 0, 8], [0, 0, 0, 0]])
  np.testing.assert_array_equal(mask[:, -4:], [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
  lengths = {n: generation.pad_left([[1] * n], 1)[0].shape[1] for n in range(1, 513)}
  assert all(P >= n for n, P in lengths.items())
  assert sorted(set(lengths.values())) == [16, 32, 64, 128, 256, 512]


def test_mistakes_are_named():
  no_bos = dataclasses.replace(BYTES, adds_bos=False, bos_id=None)
  model = types.SimpleNamespace(config=models.preset('tiny', rope=None, max_positions=10))

  def run(*args, **options):
    return generation.generate(model, None, *args, **options)

  with pytest.raises(ValueError, match='prompt 1 is empty and the tokenizer has no BOS'):
    run(no_bos, ['a', ''], max_new_tokens=4)
  with pytest.raises(
    ValueError, match=r'prompt 1 has 8 tokens and 4 new ones .* knows 10 positions'
  ):
    run(BYTES, ['abcdef', 'abcdefg'], max_new_tokens=4)
  with pytest.raises(ValueError, match='stop strings are a list of texts that are not empty'):
    run(BYTES, ['a'], max_new_tokens=4, stop=['x', ''])
