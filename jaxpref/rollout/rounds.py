"""How a rollout is cut into optimizer steps, and which prompts it is made of."""

import dataclasses

import numpy as np

from jaxpref.data.order import shuffled


@dataclasses.dataclass(frozen=True)
class Rounds:
  """What a rollout is and how often it is learnt from.

  Attributes:
    prompts: B, prompts a rollout.
    epochs: passes over a rollout.
    minibatches: optimizer steps a pass; B is a multiple of it.
    ahead: 0: every rollout is sampled with the newest parameters; 1: with those of a rollout ago,
      while that one is being learnt from.
    tries: rounds of sampling to fill a rollout with groups whose rewards differ (DAPO's dynamic
      sampling, https://arxiv.org/abs/2503.14476); 1 takes groups as they come.
    mask_truncated: leave samples that the length limit cut off unscored (DAPO's filtering).
    importance_cap: C of truncated importance sampling: advantages are multiplied by
      min(π_old / μ, C), μ being the distribution that was sampled from; 0: they are not.
    target_kl: a pass is left out, and those after it, where the policy is on average more than this
      many nats a token away from the one that sampled; 0 is no limit.
    seed: of the order of prompts and minibatches.
    microbatches, shards: M and G of the batches.
    row_length: tokens of a packed row; 0: a prompt with all its samples, 2048 at most if they fit.
  """

  prompts: int
  epochs: int = 1
  minibatches: int = 1
  ahead: int = 0
  tries: int = 1
  mask_truncated: bool = False
  importance_cap: float = 0.0
  target_kl: float = 0.0
  seed: int = 0
  microbatches: int = 1
  shards: int = 1
  row_length: int = 0

  def __post_init__(self):
    cells = self.minibatches * self.microbatches * self.shards
    if self.prompts < 1 or self.prompts % cells:
      raise ValueError(
        f'rollout.prompts={self.prompts} must be a positive multiple of minibatches * '
        f'microbatches * data groups = {self.minibatches} * {self.microbatches} * {self.shards}'
      )
    if self.epochs < 1 or self.tries < 1 or self.ahead not in (0, 1):
      raise ValueError(
        'a rollout needs epochs >= 1, tries >= 1 and ahead 0 or 1, got '
        f'{self.epochs}, {self.tries} and {self.ahead}'
      )
    if self.importance_cap and self.importance_cap < 1:
      raise ValueError(
        f'rollout.importance_cap={self.importance_cap} would shrink samples that are exactly on '
        'policy: give 1 or more, 2 being usual, or 0 for none'
      )
    if self.ahead and self.tries > 1:
      raise ValueError('rollout.ahead=1 samples before rewards are known, so rollout.tries is 1')

  @property
  def steps(self) -> int:
    """Optimizer steps a rollout."""
    return self.epochs * self.minibatches

  def draw(self, count: int, at: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of a rollout's prompts among `count`, their random ids), each int32 [B].

    `at` prompts were drawn before. A pass over the prompts ends inside a rollout, not before it. A
    prompt that comes again has another random id, hence other samples.
    """
    places = np.arange(at, at + self.prompts)
    orders = {epoch: shuffled(count, self.seed, epoch) for epoch in set((places // count).tolist())}
    indices = [orders[place // count][place % count] for place in places.tolist()]
    return np.array(indices, np.int32), places.astype(np.int32)

  def rows(self, rollout: int, cursor: int) -> np.ndarray:
    """The rows of a rollout that its optimizer step number `cursor` learns from, ascending."""
    epoch, part = divmod(cursor, self.minibatches)
    order = shuffled(self.prompts, self.seed + rollout, epoch)
    return np.sort(np.array_split(order, self.minibatches)[part])
