"""Rotary position embeddings.

Pairs are (i, i + head_dim/2), as in Hugging Face's weights.

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
class Rope:
  """Rotation of queries and keys by position; `scaling` stretches its wavelengths."""

  theta: float = 10_000.0
  scaling: LinearScaling | Llama3Scaling | None = None

  @classmethod
  def llama3(cls, *, theta: float, **scaling) -> 'Rope':
    return cls(theta, Llama3Scaling(**scaling))

  def frequencies(self, head_dim: int) -> np.ndarray:
    """Radians per position, float32 [head_dim/2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(self.theta) ** exponents
    return frequencies if self.scaling is None else self.scaling(frequencies)

  def angles(self, positions: Array, head_dim: int) -> tuple[Array, Array]:
    """Cosines and sines, float32 [..., head_dim/2], of positions [...]."""
    frequencies = self.frequencies(head_dim)
    frequencies = frequencies.reshape((1,) * positions.ndim + frequencies.shape)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
  """x [..., H, head_dim] turned by angles [..., head_dim/2], in float32, returned in x's dtype."""
  cos, sin = (a[..., None, :] for a in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)
