"""Rotary position embeddings.

Pairs are (i, i + n/2) of the n turned channels, as in Hugging Face's weights.

See RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al.:
https://arxiv.org/abs/2104.09864
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxpref.typing import Array


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Positions divided by `factor`: https://arxiv.org/abs/2306.15595."""

  factor: float

  def __call__(self, frequencies: np.ndarray) -> np.ndarray:
    return frequencies / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1's scaling: slow frequencies are divided by `factor`, fast ones kept, those between
  (wavelengths of original_max_positions over low_factor .. high_factor) interpolated."""

  factor: float
  low_factor: float = 1.0
  high_factor: float = 4.0
  original_max_positions: int = 8192

  def __call__(self, frequencies: np.ndarray) -> np.ndarray:
    turns = self.original_max_positions * frequencies / (2 * np.pi)  # over the trained length
    kept = (turns - self.low_factor) / (self.high_factor - self.low_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (kept * frequencies + (1 - kept) * frequencies / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LongScaling:
  """LongRoPE, https://arxiv.org/abs/2402.13753: every frequency is divided by its own factor, and
  queries and keys grow by `amplitude`.

  Up to original_max_positions the factors are `short`. For anything longer such a model turns all
  of a sequence by `long`, so that its first token would depend on its length: that is not supported
  here, and positions beyond give NaN.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]  # kept for export
  original_max_positions: int
  amplitude: float = 1.0

  def __call__(self, frequencies: np.ndarray) -> np.ndarray:
    return frequencies / np.asarray(self.short, np.float32)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotation of queries and keys by position; `scaling` stretches its wavelengths.

  The first `fraction` of a head's channels are turned, the others left alone.
  """

  theta: float = 10_000.0
  scaling: LinearScaling | Llama3Scaling | LongScaling | None = None
  fraction: float = 1.0

  @classmethod
  def llama3(cls, *, theta: float, **scaling) -> 'Rope':
    return cls(theta, Llama3Scaling(**scaling))

  @property
  def position_limit(self) -> int | None:
    """How many positions there are; None: no limit."""
    return self.scaling.original_max_positions if isinstance(self.scaling, LongScaling) else None

  def check(self, head_dim: int):
    """Raise ValueError unless heads of this size can be turned."""
    turned = int(head_dim * self.fraction)
    if not 2 <= turned <= head_dim or turned % 2:
      raise ValueError(
        f'rope needs an even head_dim, got {head_dim}'
        + (f', of which {self.fraction} are {turned} channels' if self.fraction != 1 else '')
      )
    if isinstance(self.scaling, LongScaling):
      for name in ('short', 'long'):
        if len(getattr(self.scaling, name)) != turned // 2:
          raise ValueError(
            f'rope turns {turned // 2} pairs of channels; it has '
            f'{len(getattr(self.scaling, name))} {name} factors'
          )

  def frequencies(self, head_dim: int) -> np.ndarray:
    """Radians per position of every turned pair, float32 [head_dim/2] if all are turned."""
    turned = int(head_dim * self.fraction)
    exponents = np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned)
    frequencies = np.float32(1.0) / np.float32(self.theta) ** exponents
    return frequencies if self.scaling is None else self.scaling(frequencies)

  def angles(self, positions: Array, head_dim: int) -> tuple[Array, Array]:
    """Cosines and sines, float32 [..., head_dim/2], of positions [...]."""
    frequencies = self.frequencies(head_dim)
    frequencies = frequencies.reshape((1,) * positions.ndim + frequencies.shape)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if isinstance(self.scaling, LongScaling):
      known = (positions < self.scaling.original_max_positions)[..., None]
      amplitude = jnp.where(known, jnp.float32(self.scaling.amplitude), jnp.nan)
      return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
  """x [..., H, head_dim] turned by angles [..., turned/2], in float32, returned in x's dtype."""
  cos, sin = (a[..., None, :] for a in angles)
  pairs = cos.shape[-1]
  first, second, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin, rest]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
