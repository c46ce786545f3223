"""What numbers an online run takes: mistakes are named by their key before anything runs."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from jaxpref.sampling import Sampling

# What numbers of a config are at least; those in ABOVE are more.
LEAST = {
  'rollout.prompts': 1,
  'rollout.samples': 1,
  'rollout.max_new_tokens': 1,
  'rollout.slots': 0,
  'rollout.epochs': 1,
  'rollout.minibatches': 1,
  'rollout.tries': 1,
  'rollout.kl': 0,
  'rollout.kl_target': 0,
  'rollout.kl_horizon': 0,
  'rollout.importance_cap': 0,
  'rollout.target_kl': 0,
  'rollout.missing_eos': 0,
  'rollout.timeout': 0,
  'rollout.show': 0,
  'batch.microbatches': 1,
  'eval.samples': 1,
}
ABOVE = ('rollout.kl_horizon', 'rollout.timeout')


def check_numbers(config: ConfigDict) -> None:
  """Raises ValueError for a number of `config.rollout` or of the evaluation that cannot be."""
  for key, least in LEAST.items():
    section, name = key.split('.')
    value = config[section][name]
    if not least <= value < np.inf or (key in ABOVE and value == least):
      bound = 'above' if key in ABOVE else 'at least'
      raise ValueError(f'{key} must be a number {bound} {least}, got {value}')
  for section in ('rollout', 'eval'):
    sampling_of(config, section)


def sampling_of(config: ConfigDict, section: str) -> Sampling:
  """How the next token is picked in 'rollout' or 'eval'."""
  names = {field.name for field in dataclasses.fields(Sampling)} & set(config[section])
  try:
    return Sampling(**{name: config[section][name] for name in names})
  except ValueError as error:
    raise ValueError(str(error).replace('Sampling.', f'{section}.')) from error
