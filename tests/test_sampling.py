"""The sampler against the plain forward pass, and its filters against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import models, sampling
from jaxpref.sampling import PLAIN, Sampling

V, P, T = 23, 5, 8
LENGTHS = (5, 1, 3, 4)
GREEDY = Sampling(temperature=0)
MIXED = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)


def make(rope):
  config = models.preset('tiny', vocab_size=V, width=16, mlp_width=32, rope=rope, max_positions=64)
  model, rng = models.Model(config), np.random.default_rng(0)
  # Larger weights than at the start of training: far from uniform, so that errors show.
  return model, jax.tree.map(
    lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), model.param_shapes()
  )


@pytest.fixture(scope='module')
def rotary():
  return make(models.Rope())


@pytest.fixture(scope='module')
def learned():
  return make(None)


@pytest.fixture(params=['rotary', 'learned'])
def decoder(request):
  return request.getfixturevalue(request.param)


def padded(side='left', lengths=LENGTHS, P=P):
  """Ragged random prompts, padded on one side with a real token: tokens and mask [B, P]."""
  tokens, mask = np.full((len(lengths), P), 7, np.int32), np.zeros((len(lengths), P), bool)
  for i, n in enumerate(lengths):
    where = slice(P - n, P) if side == 'left' else slice(0, n)
    tokens[i, where] = np.random.default_rng(i).integers(V, size=n)
    mask[i, where] = True
  return tokens, mask


def draw(decoder, prompts, mask, **changes):
  """Samples T tokens a row; the tests share shapes, so a few compiled samplers serve them all."""
  B = len(prompts)
  settings = dict(
    seed=0, ids=np.arange(B), k=np.zeros(B, int), rollout=0, max_new_tokens=T, sampling=PLAIN,
    stop_ids=(-1, -1),
  )  # fmt: skip
  return sampling.sample(*decoder, prompts, mask, **settings | changes)


def rows(samples):
  """Each row's sampled tokens, as lists."""
  return [t[m].tolist() for t, m in zip(*map(np.asarray, samples[:2]), strict=True)]


def next_logits(decoder, prompts, mask, samples):
  """The plain forward's float32 logits [B, T, V] for each sampled token, all read at once.

  The gap that right-padding leaves between a prompt and its completion is masked like padding.
  """
  model, params = decoder
  tokens = jnp.concatenate([prompts, samples.tokens], 1)
  logits = jax.jit(model.logits)(params, tokens, jnp.concatenate([mask, samples.mask], 1))
  last = P - 1 - mask[:, ::-1].argmax(1)
  before = np.concatenate([last[:, None], np.tile(np.arange(P, P + T - 1), (len(mask), 1))], 1)
  return jnp.take_along_axis(logits, jnp.asarray(before)[..., None], 1)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_greedy_decoding_is_the_full_forward_argmax_at_every_step(decoder, side):
  prompts, mask = padded(side)
  samples = draw(decoder, prompts, mask, sampling=GREEDY)
  assert np.asarray(samples.mask).all() and not np.asarray(samples.finished).any()
  want = next_logits(decoder, prompts, mask, samples).argmax(-1)
  np.testing.assert_array_equal(samples.tokens, want)
  assert len(np.unique(want)) > 4
  np.testing.assert_array_equal(samples.sampling_logps, 0)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_log_probs_are_those_of_the_model_and_of_the_sampler(decoder, side):
  prompts, mask = padded(side)
  samples = draw(decoder, prompts, mask, sampling=MIXED)
  logits = next_logits(decoder, prompts, mask, samples)
  for got, z in ((samples.logps, logits), (samples.sampling_logps, sampling.warp(logits, MIXED))):
    want = jnp.take_along_axis(jax.nn.log_softmax(z), samples.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_vanishing_temperature_is_greedy(rotary):
  prompts, mask = padded()
  cold = draw(rotary, prompts, mask, sampling=Sampling(temperature=1e-6))
  assert rows(cold) == rows(draw(rotary, prompts, mask, sampling=GREEDY))


def test_the_policys_temperature_is_the_samplers_and_is_in_its_true_log_probs(rotary):
  model, params = rotary
  prompts, mask = padded()
  warm = draw((model.replace(temperature=1.7), params), prompts, mask)
  asked = draw(rotary, prompts, mask, sampling=Sampling(temperature=1.7))
  assert rows(warm) == rows(asked)
  np.testing.assert_allclose(warm.logps, asked.sampling_logps, atol=1e-6)
  assert abs(np.asarray(asked.logps - asked.sampling_logps)).max() > 0.01


def test_a_prompt_alone_in_a_batch_and_padded_elsewhere_gives_the_same(rotary):
  ids, k = np.array([11, 5, 5, 900]), np.array([0, 0, 1, 0])

  def run(order, *padding):
    prompts, mask = padded(*padding)
    keys = dict(ids=ids[order], k=k[order], seed=1, rollout=2)
    samples = draw(rotary, prompts[order], mask[order], stop_ids=(2, 9), **keys)
    return dict(zip(order, zip(rows(samples), samples.logps, strict=True), strict=True))

  want = run([0, 1, 2, 3])
  wide = ('left', LENGTHS, 9)
  alone = run([0], *wide) | run([1], *wide) | run([2], *wide) | run([3], *wide)
  for other in (run([2, 0, 3, 1]), run([0, 1, 2, 3], 'right'), alone):
    for i, (tokens, logps) in other.items():
      assert tokens == want[i][0]
      np.testing.assert_allclose(logps, want[i][1], atol=1e-5)


def test_every_part_of_the_key_matters_and_the_whole_key_decides(rotary):
  prompts, mask = padded()
  first = draw(rotary, prompts, mask).tokens
  assert (first == draw(rotary, prompts, mask).tokens).all()
  for change in ({'seed': 1}, {'rollout': 1}, {'ids': np.arange(4) + 4}, {'k': np.ones(4, int)}):
    assert (first != draw(rotary, prompts, mask, **change).tokens).mean() > 0.4, change


def test_a_stop_token_ends_its_row_and_stays_in_it(rotary):
  prompts, mask = padded()
  free = rows(draw(rotary, prompts, mask))
  stops = (free[0][3], free[2][5])
  samples = draw(rotary, prompts, mask, stop_ids=stops)
  for full, row, finished in zip(free, rows(samples), samples.finished, strict=True):
    at = [i for i, token in enumerate(full) if token in stops][:1]
    assert row == (full[: at[0] + 1] if at else full)
    assert bool(finished) == bool(at)
  beyond = ~np.asarray(samples.mask)
  assert beyond.any()
  for array in (samples.tokens, samples.logps, samples.sampling_logps):
    assert not np.asarray(array)[beyond].any()


def test_rows_without_a_prompt_are_idle(rotary):
  prompts, mask = padded()
  full = rows(draw(rotary, prompts, mask))
  mask[1:3] = False
  samples = draw(rotary, prompts, mask)
  assert rows(samples) == [full[0], [], [], full[3]]
  np.testing.assert_array_equal(samples.finished, [False, True, True, False])


def test_settings_are_traced(rotary):
  prompts, mask = padded()
  draw(rotary, prompts, mask)
  compiled = sampling.sample._cache_size()
  for i, chosen in enumerate((GREEDY, Sampling(1, 3), Sampling(top_p=0.5), Sampling(0.3, min_p=1))):
    draw(rotary, prompts, mask, sampling=chosen, seed=i, rollout=i, stop_ids=(i, 3))
  assert sampling.sample._cache_size() == compiled


def test_frequencies_follow_the_distribution(rotary):
  model, params = rotary
  n = 3000
  prompts, mask = padded('left', (4,))
  logits = jax.jit(model.logits)(params, prompts, mask)[0, -1]
  # One row a draw, by prompt id or by sample index: each must be independent of the others.
  for chosen, name in ((PLAIN, 'ids'), (Sampling(temperature=1.7, top_k=12, top_p=0.9), 'k')):
    keys = {'ids': np.zeros(n, int), 'k': np.zeros(n, int), name: np.arange(n)}
    many = prompts.repeat(n, 0), mask.repeat(n, 0)
    samples = draw(rotary, *many, seed=7, max_new_tokens=1, sampling=chosen, **keys)
    counts = np.bincount(np.asarray(samples.tokens)[:, 0], minlength=V)
    want = n * np.asarray(jax.nn.softmax(sampling.warp(logits, chosen)))
    assert counts[want == 0].sum() == 0
    cells = want >= 5
    assert cells.sum() > 5
    chi2 = ((counts - want)[cells] ** 2 / want[cells]).sum()
    assert chi2 < cells.sum() + 4 * np.sqrt(2 * cells.sum())


# Filters, against definitions written out in numpy.


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def numpy_top_k(z, k):
  k = int(k)
  return z >= sorted(z, reverse=True)[min(k, len(z)) - 1] if k else np.ones_like(z, bool)


def numpy_top_p(z, p):
  probs = softmax(z)
  return np.array([p >= 1 or probs[probs > own].sum() < p for own in probs])


def numpy_min_p(z, p):
  return softmax(z) >= p * softmax(z).max() * (1 - 1e-6)


FILTERS = {
  'top_k': (jax.jit(sampling.keep_top_k), numpy_top_k, (0, 1, 2, 3, 7, 100)),
  'top_p': (jax.jit(sampling.keep_top_p), numpy_top_p, (1e-6, 0.2, 0.55, 0.93, 0.999999, 1.0)),
  'min_p': (jax.jit(sampling.keep_min_p), numpy_min_p, (0.0, 0.01, 0.3, 1.0)),
}
LOGITS = {
  'random': np.random.default_rng(0).normal(size=9) * 2,
  'ties': np.array([1.0, 3.0, 2.0, 2.0, 3.0, 2.0, -1.0, 1.0, 2.0]),
  'flat': np.zeros(9),
  'filtered': np.array([-np.inf, 0.0, 1.0, -np.inf, 1.0, -2.0, *[-np.inf] * 3]),
  'far apart': np.array([1e4, -1e4, 0.0, 9999.0, -0.0, *[1.0] * 4]),
}


@pytest.mark.parametrize('name', FILTERS)
@pytest.mark.parametrize('kind', LOGITS)
def test_filter_keeps_what_its_formula_says_and_changes_nothing_it_keeps(name, kind):
  keep, reference, settings = FILTERS[name]
  z = LOGITS[kind].astype(np.float32)
  for setting in settings:
    got = np.asarray(keep(z, float(setting)))
    want = np.where(reference(z.astype(np.float64), setting), z, -np.inf)
    np.testing.assert_array_equal(got, want, err_msg=f'{setting}')
    batch = np.stack([z, z[::-1]])
    want = np.stack([want, want[::-1]])
    np.testing.assert_array_equal(keep(batch, float(setting)), want)


def test_temperature_scales_and_zero_is_its_limit():
  z = jnp.asarray([0.5, 2.0, 1.9, -3.0])
  np.testing.assert_allclose(
    jax.nn.softmax(sampling.temper(z, 0.5)), softmax(np.asarray(z) / 0.5), rtol=1e-6
  )
  greedy = [-np.inf, 0.0, -np.inf, -np.inf]
  np.testing.assert_array_equal(sampling.temper(z, 0.0), greedy)
  np.testing.assert_array_equal(jax.nn.softmax(sampling.temper(z, 1e-6)), [0, 1, 0, 0])
  np.testing.assert_array_equal(jax.nn.softmax(sampling.temper(z, 1e-38)), [0, 1, 0, 0])
  # A tie goes to the first, as argmax has it.
  np.testing.assert_array_equal(sampling.temper(jnp.zeros(3), 0.0), [0.0, -np.inf, -np.inf])


def test_filters_apply_in_order_each_to_what_is_left():
  # Top-k 3 leaves 4/9, 3/9, 2/9, where two reach .75; before top-k they would not: .4 + .3 < .75.
  z = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
  kept = np.isfinite(sampling.warp(z, Sampling(top_k=3, top_p=0.75)))
  np.testing.assert_array_equal(kept, [True, True, False, False])
  # Temperature comes first: a high one flattens until min-p keeps all.
  assert np.isfinite(sampling.warp(z, Sampling(min_p=0.6))).sum() == 2
  assert np.isfinite(sampling.warp(z, Sampling(temperature=10.0, min_p=0.6))).all()


WRONG = (
  ('temperature', -1),
  ('top_k', -1),
  ('top_k', 2.5),
  ('top_p', 0),
  ('top_p', 2),
  ('min_p', 2),
)


@pytest.mark.parametrize(('name', 'value'), WRONG)
def test_settings_out_of_range_are_refused(name, value):
  with pytest.raises(ValueError, match=f'Sampling.{name} must be .*, got {value}'):
    Sampling(**{name: value})
