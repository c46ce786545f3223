"""Reward models from workdirs and Hugging Face folders, as rewards of online training."""

import logging
from collections.abc import Callable

import jax
import numpy as np

from jaxpref import sharding
from jaxpref.data.records import STEP
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import Model
from jaxpref.objectives import parse
from jaxpref.rollout.reward_models import RewardModel
from jaxpref.rollout.steps import REDUCTIONS, Steps
from jaxpref.storage import open_path
from jaxpref.train import normalisation, policy
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.normalisation import Normalisation
from jaxpref.train.workdir import read_config
from jaxpref.typing import Params

# What a run learnt to judge, and what reads that: without labels of steps, and with them.
READERS = (('whole completions', 'reward_model'), ('steps', 'process_reward_model'))

log = logging.getLogger(__name__)


def reward_model(
  path: str, *, spread: float | None = None, mesh: jax.sharding.Mesh | None = None
) -> RewardModel:
  """The reward model of a run (its newest checkpoint) or of a Hugging Face folder.

    r = score - mean,   or with a spread   r = (score - mean) · spread / std

  Mean and std are of the reference completions (`normalisation`), 0 and 1 where none are known.

  Args:
    path: a workdir, or a folder of a `*ForSequenceClassification` with a label for each head.
    spread: std that the rewards of the reference completions shall have; None: the model's own.
    mesh: where it lives; by default all devices of this machine.

  Raises:
    FileNotFoundError, ValueError: no such model, one without scores, or a run that learnt to judge
      steps; a spread where no std is known.
  """
  text = f'reward_model({path!r}{"" if spread is None else f", spread={spread!r}"})'
  if spread is not None and not (isinstance(spread, int | float) and 0 < spread < float('inf')):
    raise ValueError(f'reward_model(spread) must be a positive number, got {spread!r}')
  model, tokenizer = described(path, text)
  _check_learnt(path, text, 'whole completions')
  mesh = mesh or sharding.make_mesh()
  known = _known(path)
  if known is None:
    log.warning('%s has no %s, so its scores are not centred', path, normalisation.FILE)
  if spread is not None and not (known and np.min(known.std) > 0):
    raise ValueError(f'{text}: no std of its scores is known to bring to {spread}')
  mean = np.asarray(known.mean) if known else 0.0
  scale = spread / np.asarray(known.std) if spread is not None and known else 1.0
  params = _loaded(path, model, tokenizer, mesh)
  return RewardModel(model, params, tokenizer, mesh, mean, scale, text=text)


def process_reward_model(
  path: str,
  *,
  reduce: str = 'min',
  step: str = STEP,
  mesh: jax.sharding.Mesh | None = None,
) -> RewardModel:
  """The process reward model of a run or a folder: what it makes of the steps of a completion.

    r = reduce(σ(score at the end of step 1), σ(... step 2), ...)

  so a reward is a probability; scores are not centred. A completion without any step has no score.

  Args:
    path, mesh: as for `reward_model`; trained with `process_reward`.
    reduce: 'min', 'product' or 'last'; see `rollout.steps`.
    step: what stands between steps.

  Raises:
    FileNotFoundError, ValueError: no such model, one without scores, or a run that learnt to judge
      whole completions; another `reduce`.
  """
  given = {'reduce': (reduce, 'min'), 'step': (step, STEP)}
  changed = ''.join(f', {key}={now!r}' for key, (now, usual) in given.items() if now != usual)
  text = f'process_reward_model({path!r}{changed})'
  if reduce not in REDUCTIONS:
    raise ValueError(f'{text}: reduce is one of {", ".join(REDUCTIONS)}, not {reduce!r}')
  steps = Steps(REDUCTIONS[reduce], step)
  model, tokenizer = described(path, text)
  _check_learnt(path, text, 'steps')
  mesh = mesh or sharding.make_mesh()
  params = _loaded(path, model, tokenizer, mesh)
  return RewardModel(model, params, tokenizer, mesh, steps=steps, text=text)


def described(path: str, text: str) -> tuple[Model, Tokenizer]:
  """The reward model in `path`, without its parameters; `text`: what it is called."""
  if not isinstance(path, str):
    raise ValueError(f"{text}: a model is a folder, as reward_model('runs/rm'), got {path!r}")
  tokenizer = policy.find_tokenizer(path)
  model = policy.describe(path, tokenizer)
  if path.startswith(policy.PRESET) or not model.config.num_labels:
    raise ValueError(
      f'{text}: it has no scores; train a reward model with jaxpref train --config=reward'
    )
  return model, tokenizer


def _check_learnt(path: str, text: str, what: str) -> None:
  """Raises ValueError where a run learnt to judge steps or completions, and not `what` is read.

  Its scores at other tokens than it was trained on mean nothing. A folder does not say.
  """
  if not policy.is_workdir(path):
    return
  objective = read_config(path).objective
  try:
    fields = parse(objective).fields
  except ValueError:  # a loss of the user's own, of which nothing is known here
    return
  judged, maker = READERS['step_labels' in fields]
  if judged != what:
    raise ValueError(
      f'{text}: the run learnt to judge {judged}, by {objective}; use {maker}({path!r})'
    )


def _loaded(path: str, model: Model, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Params:
  where = sharding.params_sharding(mesh, model.param_shapes())
  with jax.set_mesh(mesh):  # what is merged or drawn is computed there
    return policy.load(path, tokenizer, shardings=where)[1]


def makers(mesh: jax.sharding.Mesh, tokenizer: Tokenizer) -> dict[str, Callable]:
  """What `rewards.parse` may make besides its rules, for a policy with this tokenizer."""

  def checked(found: RewardModel) -> RewardModel:
    if found.tokenizer.fingerprint != tokenizer.fingerprint:
      log.warning(
        '%s has the tokenizer %r, the policy %r: completions are tokenised anew from their text',
        found,
        found.tokenizer.name,
        tokenizer.name,
      )
    return found

  def make(path: str, *, spread: float | None = None) -> RewardModel:
    return checked(reward_model(path, spread=spread, mesh=mesh))

  def make_process(path: str, *, reduce: str = 'min', step: str = STEP) -> RewardModel:
    return checked(process_reward_model(path, reduce=reduce, step=step, mesh=mesh))

  return {'reward_model': make, 'process_reward_model': make_process}


def _known(path: str) -> Normalisation | None:
  folder = open_path(path)
  if not policy.is_workdir(path):
    return normalisation.read(folder)
  checkpoints = Checkpoints(path, read_only=True)
  step = checkpoints.latest_step()
  checkpoints.close()
  return normalisation.of_step(folder, step)
