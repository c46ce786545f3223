"""Samples for people to read: on the terminal, and in a run's folder.

samples.jsonl   {"rollout": 20, "prompt": "...", "completion": "...", "reward": 0.5}
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import rich.console

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
    self._file: Path | None = None

  def open(self, folder: Path, rollout: int) -> None:
    """Goes on in `folder` with `rollout`; what stands there of it and later ones was not kept."""
    if not self._every or jax.process_index() != 0:
      return
    self._file = folder / FILE
    if self._file.is_file():
      lines = self._file.read_text(encoding='utf-8').splitlines(keepends=True)
      self._file.write_text(
        ''.join(line for line in lines if line.endswith('\n') and _rollout(line) < rollout),
        encoding='utf-8',
      )

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
    with self._file.open('a', encoding='utf-8') as file:
      for prompt, group, row in shown:
        for text, score in zip(group, row, strict=True):
          sample = {'rollout': rollout, 'prompt': prompt, 'completion': text, 'reward': score}
          file.write(json.dumps(sample, ensure_ascii=False) + '\n')


def _rollout(line: str) -> int:
  return json.loads(line)['rollout']
