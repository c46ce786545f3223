"""Decoders by name: small ones for a CPU and the published sizes of every family."""

import dataclasses
import difflib
from typing import Any

from jaxpref.models.config import Config
from jaxpref.models.rope import Rope

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
