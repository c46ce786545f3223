"""Decoders by name: small ones for a CPU and the published sizes of every family."""

import dataclasses
import difflib
from typing import Any

from jaxpref.models.config import Config
from jaxpref.models.rope import Rope

_LLAMA3 = dict(vocab_size=128256, num_kv_heads=8)
_LLAMA3_8B = dict(**_LLAMA3, num_heads=32, width=4096, num_layers=32, mlp_width=14336)
_QWEN = dict(vocab_size=151936, norm_eps=1e-6, rope=Rope(theta=1e6))
_MISTRAL = dict(
  vocab_size=32000,
  width=4096,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  mlp_width=14336,
  max_positions=32768,
)
_GEMMA = dict(
  vocab_size=256000,
  head_dim=256,
  max_positions=8192,
  norm_eps=1e-6,
  norm_offset=1.0,
  activation='gelu_tanh',
  tied=True,
)

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
  'llama2-7b': dict(
    vocab_size=32000,
    width=4096,
    num_layers=32,
    num_heads=32,
    mlp_width=11008,
    max_positions=4096,
  ),
  'llama3-8b': dict(
    **_LLAMA3_8B,
    max_positions=8192,
    rope=Rope(theta=5e5),
  ),
  'llama3.1-8b': dict(
    **_LLAMA3_8B,
    max_positions=131072,
    rope=Rope.llama3(theta=5e5, factor=8.0),
  ),
  'llama3.1-70b': dict(
    **_LLAMA3,
    num_heads=64,
    width=8192,
    num_layers=80,
    mlp_width=28672,
    max_positions=131072,
    rope=Rope.llama3(theta=5e5, factor=8.0),
  ),
  'llama3.2-1b': dict(
    **_LLAMA3,
    num_heads=32,
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
  'qwen3-30b-a3b': dict(
    **_QWEN,
    width=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    mlp_width=768,
    max_positions=40960,
    qk_norm=True,
    num_experts=128,
    experts_per_token=8,
    normalize_experts=True,
  ),
  'mistral-7b': dict(**_MISTRAL, windows=(4096,) * 32),
  'mixtral-8x7b': dict(
    **_MISTRAL,
    rope=Rope(theta=1e6),
    num_experts=8,
    experts_per_token=2,
    normalize_experts=True,
  ),
  'gemma-2b': dict(
    **_GEMMA,
    width=2048,
    embed_scale=2048.0**0.5,
    num_layers=18,
    num_heads=8,
    num_kv_heads=1,
    mlp_width=16384,
  ),
  'gemma2-2b': dict(
    **_GEMMA,
    width=2304,
    embed_scale=2304.0**0.5,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    mlp_width=9216,
    norm_placement='both',
    windows=(4096, None) * 13,
    attention_cap=50.0,
    logit_cap=30.0,
  ),
  'gemma3-1b': dict(
    **_GEMMA | dict(vocab_size=262144, max_positions=32768),
    width=1152,
    embed_scale=1152.0**0.5,
    num_layers=26,
    num_heads=4,
    num_kv_heads=1,
    mlp_width=6912,
    norm_placement='both',
    qk_norm=True,
    windows=((512,) * 5 + (None,)) * 4 + (512, 512),
    rope=Rope(theta=1e6),
    local_rope=Rope(),
  ),
  'phi3-mini': dict(
    vocab_size=32064,
    width=3072,
    num_layers=32,
    num_heads=32,
    mlp_width=8192,
    max_positions=4096,
    windows=(2047,) * 32,
  ),
  'olmo2-7b': dict(
    vocab_size=100352,
    width=4096,
    num_layers=32,
    num_heads=32,
    mlp_width=11008,
    max_positions=4096,
    norm_eps=1e-6,
    rope=Rope(theta=5e5),
    norm_placement='post',
    qk_norm=True,
    qk_norm_span='all',
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
