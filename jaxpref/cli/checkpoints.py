"""Which of a run's checkpoints a command reads: `--step=200`, `--step=best`, `--ema`."""

from typing import Any

from absl import flags

from jaxpref.data import Tokenizer
from jaxpref.models import Model
from jaxpref.run import parse_keep_best
from jaxpref.train import lora, policy
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.workdir import read_config
from jaxpref.typing import Params


def define_checkpoint_flags(own: flags.FlagValues) -> None:
  text: dict[str, Any] = {'flag_values': own}
  flags.DEFINE_string('step', '', "a run's checkpoint: a step or 'best'; default: newest", **text)
  flags.DEFINE_boolean('ema', False, "the running average of a run's parameters", **text)


def load_model(own: flags.FlagValues, tokenizer: Tokenizer) -> tuple[Model, Params]:
  """The model that --model, --step and --ema name; a run's computes in the run's dtype.

  Raises:
    ValueError, OSError: no such model or checkpoint.
    flags.Error: --step or --ema of something that is not a run.
  """
  if not policy.is_workdir(own.model):
    if own.step or own.ema:
      raise flags.Error(f'--step and --ema choose within a run; {own.model} is not a workdir')
    return policy.load(own.model, tokenizer)
  config = read_config(own.model)
  best = parse_keep_best(config.checkpoint.keep_best)
  checkpoints = Checkpoints(own.model, keep_best=best, read_only=True)
  params = lora.restored(checkpoints, config, find_step(checkpoints, own.step), ema=own.ema)
  checkpoints.close()
  return policy.describe(own.model, tokenizer), params


def chosen_step(own: flags.FlagValues) -> int | None:
  """The step of the checkpoint that `load_model` reads of a run."""
  best = parse_keep_best(read_config(own.model).checkpoint.keep_best)
  checkpoints = Checkpoints(own.model, keep_best=best, read_only=True)
  step = find_step(checkpoints, own.step) or checkpoints.latest_step()
  checkpoints.close()
  return step


def find_step(checkpoints: Checkpoints, text: str) -> int | None:
  """The step that --step means; None for the newest."""
  if text == 'best':
    best = checkpoints.best_step()
    if best is None:
      raise flags.Error(
        '--step=best: this run kept no best checkpoint; train with, for example, '
        f"--config.checkpoint.keep_best='eval/loss min'. It has {checkpoints.steps()}"
      )
    return best
  if text and not text.isdigit():
    raise flags.Error(f"--step: expected a number or 'best', got {text!r}")
  return int(text) if text else None
