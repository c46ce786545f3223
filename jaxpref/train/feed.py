"""What tells one kind of run from another: the model, and where its batches come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref.log_probs import ActorCritic
from jaxpref.models import Model
from jaxpref.train.loop import Source
from jaxpref.train.state import TrainState
from jaxpref.typing import Params

Evaluate = Callable[[TrainState], dict[str, float]]


class Opened(NamedTuple):
  """A feed that is ready: the state to begin with, batches, and the held-out evaluation.

  `finish(state, workdir)` comes after the last step and adds to the workdir what is to be known of
  the trained model.
  """

  state: TrainState
  source: Source
  evaluate: Evaluate | None
  finish: Callable[[TrainState, Path], None] | None = None


class Feed(NamedTuple):
  """Known before anything is computed.

  Attributes:
    model: what is trained.
    load: () -> its parameters at the beginning of the run, on the devices.
    steps: optimizer steps.
    fingerprint: of the data; a run resumes on the same only.
    summary: lines that say what it is.
    origin: names an example by its id, for error messages.
    needs_reference: whether a reference is read.
    live: the state holds a reference that stands still, and the step reads it.
    carry: of the source before the first step.
    open: (state, parameters of a reference that stands still or None, workdir) -> `Opened`.
  """

  model: Model | ActorCritic
  load: Callable[[], Params]
  steps: int
  fingerprint: str
  summary: tuple[str, ...]
  origin: Callable[[int], str]
  needs_reference: bool
  live: bool
  carry: Any
  open: Callable[[TrainState, Params | None, Path], Opened]
