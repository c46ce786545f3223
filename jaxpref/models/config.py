"""What a decoder is: one frozen, hashable description that every family maps to."""

import dataclasses
import difflib
from typing import Any

from jaxpref.models.rope import Rope

NORMS = ('rms', 'layer')
PLACEMENTS = ('pre', 'post', 'both')
ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu')


@dataclasses.dataclass(frozen=True)
class Config:
  """A decoder-only language model. Equal configs mean equal programs and equal parameter shapes."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  mlp_width: int
  num_kv_heads: int = 0  # fewer than num_heads: grouped queries; 0: num_heads
  head_dim: int = 0  # 0: width // num_heads
  max_positions: int = 2048  # trained length; the size of the table of learned positions
  rope: Rope | None = dataclasses.field(default=Rope())  # None: learned positions
  windows: tuple[int | None, ...] | None = None  # one per layer: sees positions nearer than this
  norm: str = 'rms'  # 'rms' or 'layer' (centred, with bias)
  norm_eps: float = 1e-5
  norm_placement: str = 'pre'  # around each sub-layer: 'pre' (input), 'post' (output) or 'both'
  qk_norm: bool = False  # rms norm of every query and key head
  qkv_bias: bool = False
  out_bias: bool = False  # of attention's output projection
  mlp_bias: bool = False
  gated: bool = True  # down(activation(gate(x)) * up(x)), else down(activation(up(x)))
  activation: str = 'silu'
  tied: bool = False  # the head is the embedding's transpose
  source: str = dataclasses.field(default='', compare=False, repr=False)  # imported config.json

  def __post_init__(self):
    if self.num_kv_heads == 0:
      object.__setattr__(self, 'num_kv_heads', self.num_heads)
    if self.head_dim == 0:
      if self.width % self.num_heads:
        raise ValueError(
          f'width {self.width} is not a multiple of num_heads {self.num_heads}; give head_dim'
        )
      object.__setattr__(self, 'head_dim', self.width // self.num_heads)
    for name in ('vocab_size', 'width', 'num_layers', 'num_heads', 'mlp_width', 'num_kv_heads'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}'
      )
    if self.rope is not None and self.head_dim % 2:
      raise ValueError(f'rope needs an even head_dim, got {self.head_dim}')
    if self.windows is not None and not any(self.windows):
      object.__setattr__(self, 'windows', None)
    if self.windows is not None and len(self.windows) != self.num_layers:
      raise ValueError(
        f'windows must have one entry per layer ({self.num_layers}), got {len(self.windows)}'
      )
    for name, known in (
      ('norm', NORMS),
      ('norm_placement', PLACEMENTS),
      ('activation', ACTIVATIONS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'{name} must be one of {known}, got {getattr(self, name)!r}')


_LLAMA3 = dict(vocab_size=128256, num_heads=32, num_kv_heads=8)
_QWEN = dict(vocab_size=151936, norm_eps=1e-6, rope=Rope(theta=1e6))

PRESETS: dict[str, dict[str, Any]] = {
  # From scratch, for a CPU; 259 = the bytes and three special tokens.
  'tiny': dict(
    vocab_size=259, width=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=176, tied=True
  ),
  'small': dict(
    vocab_size=6400, width=256, num_layers=6, num_heads=8, num_kv_heads=4, mlp_width=704, tied=True
  ),
  'gpt2': dict(
    vocab_size=50257,
    width=768,
    num_layers=12,
    num_heads=12,
    mlp_width=3072,
    max_positions=1024,
    rope=None,
    norm='layer',
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation='gelu_tanh',
    tied=True,
  ),
  'llama3-8b': dict(
    **_LLAMA3,
    width=4096,
    num_layers=32,
    mlp_width=14336,
    max_positions=8192,
    rope=Rope(theta=5e5),
  ),
  'llama3.2-1b': dict(
    **_LLAMA3,
    width=2048,
    num_layers=16,
    mlp_width=8192,
    max_positions=131072,
    rope=Rope.llama3(theta=5e5, factor=32.0),
    tied=True,
  ),
  'qwen2.5-0.5b': dict(
    **_QWEN,
    width=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    mlp_width=4864,
    max_positions=32768,
    qkv_bias=True,
    tied=True,
  ),
  'qwen3-0.6b': dict(
    **_QWEN,
    width=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=3072,
    max_positions=40960,
    qk_norm=True,
    tied=True,
  ),
  'qwen3-8b': dict(
    **_QWEN,
    width=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=12288,
    max_positions=40960,
    qk_norm=True,
  ),
}


def preset(name: str, **overrides) -> Config:
  """The config called `name`, some fields replaced: `preset('tiny', vocab_size=300)`.

  Raises ValueError naming the nearest known preset or field.
  """
  if name not in PRESETS:
    raise ValueError(f'no preset {name!r}{_nearest(name, PRESETS)}; known: {", ".join(PRESETS)}')
  fields = [field.name for field in dataclasses.fields(Config)]
  for key in overrides:
    if key not in fields:
      raise ValueError(
        f'a model config has no field {key!r}{_nearest(key, fields)}; known: {", ".join(fields)}'
      )
  return Config(**{**PRESETS[name], **overrides})


def _nearest(name, known) -> str:
  match = difflib.get_close_matches(name, list(known), n=1)
  return f', did you mean {match[0]!r}?' if match else ''
