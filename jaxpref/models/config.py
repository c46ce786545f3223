"""What a decoder is: one frozen, hashable description that every family maps to."""

import dataclasses

from jaxpref.models.rope import Rope

NORMS = ('rms', 'layer')
PLACEMENTS = ('pre', 'post', 'both')
ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu')
SPANS = ('head', 'all')


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
  local_rope: Rope | None = None  # of the layers with a window; None: `rope` there too
  windows: tuple[int | None, ...] | None = None  # one per layer: sees positions nearer than this
  norm: str = 'rms'  # 'rms' or 'layer' (centred, with bias)
  norm_eps: float = 1e-5
  norm_offset: float = 0.0  # added to every norm's scale
  norm_placement: str = 'pre'  # around each sub-layer: 'pre' (input), 'post' (output) or 'both'
  qk_norm: bool = False  # rms norm of queries and keys
  qk_norm_span: str = 'head'  # each 'head' by itself, or 'all' of them as one vector
  query_scalar: float | None = None  # scores are divided by its square root; None: head_dim
  attention_cap: float | None = None  # scores become cap * tanh(scores / cap)
  logit_cap: float | None = None  # likewise of the head's logits
  embed_scale: float = 1.0  # of the embedded tokens, not of the tied head
  qkv_bias: bool = False
  out_bias: bool = False  # of attention's output projection
  mlp_bias: bool = False
  gated: bool = True  # down(activation(gate(x)) * up(x)), else down(activation(up(x)))
  activation: str = 'silu'
  num_experts: int = 0  # gated MLPs of mlp_width that a router picks from; 0: one dense MLP
  experts_per_token: int = 0
  normalize_experts: bool = False  # the picked experts' weights sum to 1
  tied: bool = False  # the head is the embedding's transpose
  num_labels: int = 0  # scores in place of the head: a sequence classifier or reward model
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
    for rope in (self.rope, self.local_rope):
      if rope is not None:
        rope.check(self.head_dim)
    if self.local_rope is not None and (
      self.rope is None or self.local_rope.fraction != self.rope.fraction
    ):
      raise ValueError('local_rope needs a rope that turns the same fraction of channels')
    if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
      raise ValueError(
        f'experts_per_token must be 1 to {self.num_experts} (num_experts), '
        f'got {self.experts_per_token}'
      )
    if self.num_experts and (self.mlp_bias or not self.gated):
      raise ValueError('experts are gated and without bias; set gated=True, mlp_bias=False')
    if self.windows is not None and not any(self.windows):
      object.__setattr__(self, 'windows', None)
    if self.windows is None:
      object.__setattr__(self, 'local_rope', None)  # there is no layer to use it
    elif len(self.windows) != self.num_layers:
      raise ValueError(
        f'windows must have one entry per layer ({self.num_layers}), got {len(self.windows)}'
      )
    for name, known in (
      ('norm', NORMS),
      ('norm_placement', PLACEMENTS),
      ('qk_norm_span', SPANS),
      ('activation', ACTIVATIONS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'{name} must be one of {known}, got {getattr(self, name)!r}')

  @property
  def position_limit(self) -> int | None:
    """How many positions a sequence may have; beyond, states are NaN. None: no limit."""
    return self.max_positions if self.rope is None else self.rope.position_limit
