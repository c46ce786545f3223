"""How each family spells our config in its config.json: a function to read and one to write."""

from typing import Any

from jaxpref.models.config import Config
from jaxpref.models.fields import (
  LAYERS,
  READ_ACTIVATION,
  WRITE_ACTIVATION,
  Fields,
  parse_rope,
  read_gated,
  read_rope,
  read_windows,
  write_gated,
  write_windows,
)
from jaxpref.models.rope import Rope

_GEMMA_WINDOW = 4096


def read_llama(fields: Fields) -> Config:
  bias = bool(fields.get('attention_bias', False))
  mlp_bias = bool(fields.get('mlp_bias', False))
  rope = read_rope(fields)
  return Config(**read_gated(fields), rope=rope, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def write_llama(config: Config) -> dict[str, Any]:
  return write_gated(config) | dict(attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _same_window(fields: Fields, default: int | None) -> tuple[int | None, ...]:
  """Mistral's: one window for all layers, or none."""
  return (fields.get('sliding_window', default),) * fields.size('num_hidden_layers', most=LAYERS)


def write_same_window(config: Config) -> dict[str, Any]:
  return write_gated(config) | dict(
    sliding_window=max(filter(None, config.windows or ()), default=None)
  )


def read_mistral(fields: Fields) -> Config:
  return Config(**read_gated(fields), rope=read_rope(fields), windows=_same_window(fields, 4096))


def read_mixtral(fields: Fields) -> Config:
  return Config(
    **read_gated(fields, eps=1e-5),
    rope=read_rope(fields, theta=1e6),
    windows=_same_window(fields, None),
    num_experts=fields.get('num_local_experts') or fields.get('num_experts', 8),
    experts_per_token=fields.get('num_experts_per_tok', 2),
    normalize_experts=True,
  )


def write_mixtral(config: Config) -> dict[str, Any]:
  return write_same_window(config) | dict(
    num_local_experts=config.num_experts, num_experts_per_tok=config.experts_per_token
  )


def read_phi3(fields: Fields) -> Config:
  for switch in ('attention_bias', 'mlp_bias', 'lm_head_bias'):
    fields.only(switch, False)
  for factor in ('full_attn_mod', 'interpolate_factor'):
    fields.only(factor, 1)
  rope = read_rope(fields, partial=True)
  return Config(**read_gated(fields, eps=1e-5), rope=rope, windows=_same_window(fields, None))


def write_phi3(config: Config) -> dict[str, Any]:
  fraction = 1.0 if config.rope is None else config.rope.fraction
  return write_same_window(config) | dict(partial_rotary_factor=fraction)


def read_olmo2(fields: Fields) -> Config:
  bias = bool(fields.get('attention_bias', False))
  return Config(
    **read_gated(fields, eps=1e-5),
    rope=read_rope(fields),
    qkv_bias=bias,
    out_bias=bias,
    norm_placement='post',
    qk_norm=True,
    qk_norm_span='all',
  )


def write_olmo2(config: Config) -> dict[str, Any]:
  return write_gated(config) | dict(attention_bias=config.qkv_bias)


def _read_qwen_windows(fields: Fields) -> tuple[int | None, ...] | None:
  """Full attention in the first layers, a window in those from max_window_layers on."""
  window, layers = fields.get('sliding_window'), fields.size('num_hidden_layers', most=LAYERS)
  first = fields.get('max_window_layers', 28)
  kinds = ['full_attention' if i < first else 'sliding_attention' for i in range(layers)]
  used = fields.get('use_sliding_window') and window is not None
  return read_windows(fields, window if used else None, kinds)


def _write_qwen_windows(config: Config) -> dict[str, Any]:
  windows = config.windows or (None,)
  first = next((i for i, w in enumerate(windows) if w), config.num_layers)
  return write_windows(config) | dict(use_sliding_window=any(windows), max_window_layers=first)


def read_qwen2(fields: Fields) -> Config:
  rope, windows = read_rope(fields), _read_qwen_windows(fields)
  return Config(**read_gated(fields), rope=rope, qkv_bias=True, windows=windows)


def write_qwen2(config: Config) -> dict[str, Any]:
  return write_gated(config) | _write_qwen_windows(config)


def read_qwen3(fields: Fields) -> Config:
  bias = bool(fields.get('attention_bias', False))
  return Config(
    **read_gated(fields, head_dim=128),
    rope=read_rope(fields),
    windows=_read_qwen_windows(fields),
    qk_norm=True,
    qkv_bias=bias,
    out_bias=bias,
  )


def write_qwen3(config: Config) -> dict[str, Any]:
  return write_qwen2(config) | dict(attention_bias=config.qkv_bias)


def read_qwen3_moe(fields: Fields) -> Config:
  fields.only('decoder_sparse_step', 1)
  fields.only('mlp_only_layers', None, [])
  fields.get('intermediate_size')  # of layers without experts, which there are none of
  bias = bool(fields.get('attention_bias', False))
  windows = None
  window, first = fields.get('sliding_window'), fields.get('max_window_layers')
  if fields.get('use_sliding_window') and window is not None:
    if first:
      raise ValueError(f'config.json: max_window_layers = {first!r} is not supported with experts')
    windows = (window,) * fields.size('num_hidden_layers', most=LAYERS)
  return Config(
    **read_gated(fields, mlp_width='moe_intermediate_size'),
    rope=read_rope(fields),
    windows=windows,
    qk_norm=True,
    qkv_bias=bias,
    out_bias=bias,
    num_experts=fields.get('num_experts') or fields.get('num_local_experts', 128),
    experts_per_token=fields.get('num_experts_per_tok', 8),
    normalize_experts=bool(fields.get('norm_topk_prob', False)),
  )


def write_qwen3_moe(config: Config) -> dict[str, Any]:
  return write_same_window(config) | dict(
    use_sliding_window=config.windows is not None,
    attention_bias=config.qkv_bias,
    moe_intermediate_size=config.mlp_width,
    num_experts=config.num_experts,
    num_experts_per_tok=config.experts_per_token,
    norm_topk_prob=config.normalize_experts,
    decoder_sparse_step=1,
    mlp_only_layers=[],
  )


def _read_gemma_kin(fields: Fields) -> dict[str, Any]:
  """What all Gemmas share: scaled embeddings, norms of 1 + scale, biases of attention."""
  # Gemma 1's files may have both names; the newer one, where it is set, is what was trained.
  newer = fields.get('hidden_activation')
  older = fields.choice('hidden_act', READ_ACTIVATION, 'gelu_pytorch_tanh')
  activation = fields.choice('hidden_activation', READ_ACTIVATION) if newer else older
  gated = read_gated(fields, head_dim=256, tied=True, activation=activation)
  bias = bool(fields.get('attention_bias', False))
  scale = float(gated['width']) ** 0.5
  return gated | dict(norm_offset=1.0, embed_scale=scale, qkv_bias=bias, out_bias=bias)


def write_gemma(config: Config) -> dict[str, Any]:
  return write_gated(config) | dict(attention_bias=config.qkv_bias)


def read_gemma(fields: Fields) -> Config:
  return Config(**_read_gemma_kin(fields), rope=read_rope(fields))


def read_capped_gemma(fields: Fields, pattern: int) -> dict[str, Any]:
  """What Gemma 2 and 3 add: norms on both sides, windows, a query scalar, a cap of the logits."""
  shared = _read_gemma_kin(fields)
  layers = range(shared['num_layers'])
  kinds = ['full_attention' if (i + 1) % pattern == 0 else 'sliding_attention' for i in layers]
  scalar = fields.get('query_pre_attn_scalar', 256)
  window = fields.get('sliding_window', _GEMMA_WINDOW)
  fields.only('sliding_window_size', window)  # the first files say it twice
  return shared | dict(
    norm_placement='both',
    windows=read_windows(fields, window, kinds),
    query_scalar=None if scalar == shared['head_dim'] else float(scalar),
  )


def write_capped_gemma(config: Config) -> dict[str, Any]:
  scalar = config.query_scalar or config.head_dim
  windows = write_windows(config)
  written = write_gated(config) | windows
  return written | dict(
    hidden_activation=written['hidden_act'],
    attention_bias=config.qkv_bias,
    sliding_window=windows['sliding_window'] or _GEMMA_WINDOW,
    query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar,
    final_logit_softcapping=config.logit_cap,
    attn_logit_softcapping=config.attention_cap,
  )


def read_gemma2(fields: Fields) -> Config:
  return Config(
    **read_capped_gemma(fields, pattern=2),
    rope=read_rope(fields),
    attention_cap=fields.get('attn_logit_softcapping', 50.0),
    logit_cap=fields.get('final_logit_softcapping', 30.0),
  )


def read_gemma3(fields: Fields) -> Config:
  fields.only('attn_logit_softcapping', None)  # the field exists, transformers does not apply it
  names = 'sliding_window_pattern', '_sliding_window_pattern'
  pattern = next(filter(None, [fields.get(name) for name in names]), 6)
  given = fields.get('rope_parameters') or {}
  theta, local_theta = fields.get('rope_theta', 1e6), fields.get('rope_local_base_freq', 1e4)
  full = dict(given.get('full_attention') or fields.get('rope_scaling') or {})
  local = dict(given.get('sliding_attention') or {})
  if unknown := sorted(set(given) - {'full_attention', 'sliding_attention'}):
    raise ValueError(f'config.json: rope_parameters has no {", ".join(unknown)}')
  return Config(
    **read_capped_gemma(fields, pattern),
    rope=parse_rope(fields, full, float(full.pop('rope_theta', theta))),
    local_rope=parse_rope(fields, local, float(local.pop('rope_theta', local_theta))),
    qk_norm=True,
    logit_cap=fields.get('final_logit_softcapping'),
  )


def write_gemma3(config: Config) -> dict[str, Any]:
  local = config.local_rope or Rope()
  return write_capped_gemma(config) | dict(rope_local_base_freq=local.theta)


def read_gpt2(fields: Fields) -> Config:
  fields.only('scale_attn_weights', True)
  fields.only('scale_attn_by_inverse_layer_idx', False)
  width = fields.size('n_embd')
  return Config(
    vocab_size=fields.size('vocab_size'),
    width=width,
    num_layers=fields.size('n_layer', most=LAYERS),
    num_heads=fields.size('n_head'),
    mlp_width=fields.get('n_inner') or 4 * width,
    max_positions=fields.size('n_positions'),
    rope=None,
    norm='layer',
    norm_eps=fields.get('layer_norm_epsilon', 1e-5),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation=fields.choice('activation_function', READ_ACTIVATION, 'gelu_new'),
    tied=bool(fields.get('tie_word_embeddings', True)),
  )


def write_gpt2(config: Config) -> dict[str, Any]:
  return dict(
    vocab_size=config.vocab_size,
    n_embd=config.width,
    n_layer=config.num_layers,
    n_head=config.num_heads,
    n_inner=config.mlp_width,
    n_positions=config.max_positions,
    layer_norm_epsilon=config.norm_eps,
    activation_function=WRITE_ACTIVATION[config.activation].replace('pytorch_tanh', 'new'),
    tie_word_embeddings=config.tied,
  )
