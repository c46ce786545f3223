"""A policy of a few parameters, prompts and rewards, for tests of online training."""

import zlib

import jax
import numpy as np

from jaxpref import models
from jaxpref.data import load_tokenizer
from jaxpref.objectives import parse
from jaxpref.rewards import Term
from jaxpref.rollout import estimators
from jaxpref.rollout.prompts import Prompts
from jaxpref.rollout.rounds import Rounds
from jaxpref.rollout.samples import Sampler, Scorer
from jaxpref.rollout.source import Online

T = 6  # new tokens at most
STOP = tuple(range(60))  # of 259 tokens, so that completions end at all lengths
TOKENIZER = load_tokenizer('byte')
CONFIG = models.preset('tiny', width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=24)
MODEL, PARAMS = models.init(CONFIG, jax.random.key(0))


def moved(scale=0.1, seed=1):
  """PARAMS, and a step away from them."""
  keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(PARAMS))))
  return jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape), PARAMS)


def prompts(count=8):
  texts = [chr(ord('a') + i) * (1 + i % 3) for i in range(count)]
  tokens = [np.array(TOKENIZER.encode(text), np.int32) for text in texts]
  return Prompts(tokens, texts, [{'number': i} for i in range(count)], texts)


def digest(prompts, completions, records):
  """Any number, so that samples differ."""
  return [zlib.crc32(text.encode()) % 7 for text in completions]


def online(
  objective='grpo()',
  *,
  model=MODEL,
  reward=digest,
  advantages='group_baseline()',
  samples=4,
  count=8,
  missing_eos=0.0,
  rounds=None,
  **options,
):
  rounds = Rounds(**{'prompts': 4, **(rounds or {})})
  sampler = Sampler(MODEL, prompts(count), samples, T, stop_ids=STOP)
  scorer = Scorer([Term(reward)], TOKENIZER, 10.0, missing_eos)
  estimator = estimators.parse(advantages)
  return Online(model, parse(objective), sampler, scorer, estimator, rounds, **options)


def flat(batch, name):
  """A field of a batch, [M*G*B, ...], in the order of ids."""
  ids = np.asarray(batch.fields['ids']).reshape(-1)
  values = np.asarray(batch.fields[name])
  return values.reshape(-1, *values.shape[3:])[np.argsort(ids)]
