"""Finds what a config calls a model: a preset, a Hugging Face folder or a run's workdir."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxpref import hosts, models
from jaxpref.data.tokenizer import Tokenizer, load_tokenizer
from jaxpref.models import Model
from jaxpref.storage import is_url, open_path, write_atomically
from jaxpref.train import lora
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.workdir import read_config
from jaxpref.typing import Params

PRESET = 'preset:'
SCORES = 'scores'  # a file in BASE: how many scores the model has in place of its head
BASE = 'base'  # of a workdir: config.json of a Hugging Face model or a preset's name; tokenizer/


def load_policy(spec: str, tokenizer: str = '') -> tuple[Model, Params, Tokenizer]:
  """The model, its parameters and its tokenizer.

  Args:
    spec: 'preset:tiny' (random parameters), a Hugging Face folder, or the workdir of a training
      run, whose newest checkpoint is read.
    tokenizer: 'byte', or a folder with a tokenizer.json. By default that of the run or of the
      model's folder, and for a preset the bytes.

  Raises:
    ValueError, FileNotFoundError: `spec` is none of these, or cannot be read.
  """
  tokens = find_tokenizer(spec, tokenizer)
  return *load(spec, tokens), tokens


def describe(spec: str, tokenizer: Tokenizer) -> Model:
  """The model called `spec`, without its parameters."""
  model = Model(architecture(spec, tokenizer))
  dtype = read_config(spec).get('dtype', 'auto') if is_workdir(spec) else 'auto'
  return model if dtype == 'auto' else model.replace(dtype=dtype)


def load(
  spec: str, tokenizer: Tokenizer, seed: int = 0, shardings: Params | None = None
) -> tuple[Model, Params]:
  """The model called `spec`; a preset is drawn from `seed`.

  `shardings`, a tree like the parameters, says where they go; weights are then read part by part.
  """
  if spec.startswith(PRESET):
    model, params = models.init(architecture(spec, tokenizer), jax.random.key(seed))
    return model, params if shardings is None else hosts.place(params, shardings)
  if not is_workdir(spec):
    return models.load_hf(Path(spec).expanduser(), shardings=shardings)
  checkpoints = Checkpoints(spec, read_only=True)
  params = lora.restored(checkpoints, read_config(spec), shardings=shardings)
  checkpoints.close()
  return describe(spec, tokenizer), params


def scored(model: Model, heads: int = 1) -> Model:
  """The model with `heads` scores in place of its head, for rewards or values."""
  if model.config.num_labels == heads:
    return model
  return model.replace(config=dataclasses.replace(model.config, num_labels=heads))


def check_writes(spec: str, model: Model) -> None:
  """Raises ValueError where the model called `spec` has scores in place of a head."""
  if model.config.num_labels:
    raise ValueError(
      f'{spec} is a reward model: it scores completions and cannot write any; give a policy'
    )


def load_scored(
  spec: str,
  tokenizer: Tokenizer,
  seed: int = 0,
  place: Callable[[Params], Params] | None = None,
  heads: int = 1,
) -> tuple[Model, Params]:
  """The model called `spec` with `heads` scores, new ones unless it has so many already.

  `place`: shapes of parameters -> where they go.
  """
  model = describe(spec, tokenizer)
  _, params = load(spec, tokenizer, seed, place and place(model.param_shapes()))
  target = scored(model, heads)
  if target == model:
    return model, params
  kept = {name: params[name] for name in target.param_shapes() if name != 'score'}
  return target, kept | new_scores(target, seed, place)


def new_scores(
  model: Model, seed: int = 0, place: Callable[[Params], Params] | None = None
) -> Params:
  """{'score': ...} of a model with scores: one is 0 everywhere, several are drawn from `seed`.

    w ~ N(0, 1/(D + 1))

  as in "Learning to summarize from human feedback", Stiennon et al., appendix B.1:
  https://arxiv.org/abs/2009.01325. Heads of one decoder that begin apart are the linear-layer
  ensemble of "Improving Reinforcement Learning from Human Feedback with Efficient Reward Model
  Ensemble", Zhang et al.: https://arxiv.org/abs/2401.16635. `place` as in `load_scored`.
  """
  shapes = {'score': model.param_shapes()['score']}
  std = (model.config.width + 1) ** -0.5 * (model.config.num_labels > 1)
  key = jax.random.fold_in(jax.random.key(seed), model.config.num_labels)
  score = jax.tree.map(lambda x: (std * jax.random.normal(key, x.shape)).astype(x.dtype), shapes)
  return score if place is None else hosts.place(score, place(shapes))


def architecture(spec: str, tokenizer: Tokenizer) -> models.Config:
  """The decoder that `spec` describes; no weights are read.

  A preset gets the tokenizer's vocabulary: it has no trained rows to keep.
  """
  if is_workdir(spec):
    base = open_path(spec) / BASE
    if (base / 'config.json').is_file():
      config = models.hf.read_config(base)[0]
    else:
      config = architecture(_origin(spec), tokenizer)
    written = (base / SCORES).read_text() if (base / SCORES).is_file() else ''
    return dataclasses.replace(config, num_labels=int(written)) if written else config
  if spec.startswith(PRESET):
    return models.preset(spec.removeprefix(PRESET), vocab_size=tokenizer.vocab_size)
  return models.hf.read_config(Path(spec).expanduser())[0]


def find_tokenizer(spec: str, tokenizer: str = '') -> Tokenizer:
  """The tokenizer called `tokenizer`, or by default the one that goes with the model `spec`."""
  if is_workdir(spec):
    kept = open_path(spec) / BASE / 'tokenizer'
    if kept.is_dir() and not tokenizer:
      return load_tokenizer(kept)
    config = read_config(spec)
    return find_tokenizer(config.model, tokenizer or config.tokenizer)
  local = not is_url(spec) and (Path(spec).expanduser() / 'config.json').is_file()
  if not spec.startswith(PRESET) and not local:
    raise FileNotFoundError(
      f'no model at {spec!r}: expected preset:<name> ({", ".join(models.PRESETS)}), a Hugging Face '
      "folder on a disk (with config.json) or a training run's workdir (with checkpoints/)"
    )
  return load_tokenizer(tokenizer or ('byte' if spec.startswith(PRESET) else spec))


def remember(workdir: Any, spec: str, tokenizer: Tokenizer, *, heads: int = 0) -> None:
  """Keeps what describes the model in the workdir, so that it outlives the folder it came from.

  `heads`: how many scores the run gives it in place of its head.
  """
  base = workdir / BASE
  if (base / 'config.json').is_file() or (base / 'preset').is_file():
    return
  config = architecture(spec, tokenizer)
  tokenizer.save(base / 'tokenizer')
  if heads:
    write_atomically(base / SCORES, f'{heads}\n')
  if config.source:  # one of these two comes last, for it says that the others are whole
    write_atomically(base / 'config.json', config.source)
  else:
    while is_workdir(spec):
      spec = _origin(spec)
    write_atomically(base / 'preset', spec)


def _origin(workdir: str) -> str:
  """What a run started from: the preset that its workdir keeps, else what its config names."""
  kept = open_path(workdir) / BASE / 'preset'
  return kept.read_text(encoding='utf-8') if kept.is_file() else read_config(workdir).model


def is_workdir(spec: str) -> bool:
  return (open_path(spec) / 'checkpoints').is_dir()
