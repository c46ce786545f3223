"""Samples for people to read: on the terminal, and in a run's folder.

samples.jsonl   {"rollout": 20, "prompt": "...", "completion": "...", "reward": 0.5}
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import rich.console

from jaxpref.storage import Growing, before

FILE = 'samples.jsonl'
SHOWN = 3  # prompts of a rollout
EXCERPT = 400  # characters of a text on the terminal


class Tables:
  """Every so many rollouts some prompts with their samples: `tables(rollout, prompts, ...)`.

  Args:
    every: rollouts; 0 is never.
    console: gets the first sample of each prompt, shortened; the file gets them all, whole.
  """

  def __init__(self, every: int, console: rich.console.Console):
    self._every, self._console = every, console
    self._file: Growing | None = None

  def open(self, folder: Path, rollout: int) -> None:
    """Goes on in `folder` with `rollout`; what stands there of it and later ones was not kept."""
    if not self._every or jax.process_index() != 0:
      return
    self._file = Growing(folder / FILE, before('rollout', rollout))

  def __call__(
    self,
    rollout: int,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    scores: np.ndarray,
  ) -> None:
    """Shows B prompts' texts [B][K] and scores [B, K], or does not."""
    if not self._every or rollout % self._every:
      return
    shown = list(zip(prompts, texts, scores.tolist(), strict=True))[:SHOWN]
    for prompt, group, row in shown:
      said = f'{prompt[-EXCERPT:]!r} -> {group[0][:EXCERPT]!r}'
      line = f'rollout {rollout}, reward {row[0]:.3f}: {said}'
      self._console.print(line, soft_wrap=True, markup=False, highlight=False)
    if self._file is None:
      return
    for prompt, group, row in shown:
      for text, score in zip(group, row, strict=True):
        sample = {'rollout': rollout, 'prompt': prompt, 'completion': text, 'reward': score}
        self._file.write(json.dumps(sample, ensure_ascii=False) + '\n')
    self._file.flush()
