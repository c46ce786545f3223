"""The Hugging Face families: config.json <-> `Config`, and what each calls our parameters.

A family is one entry of `FAMILIES`. Both spellings of config.json are read: that of transformers 4
(`rope_theta`, `rope_scaling`, `torch_dtype`) and that of 5 (`rope_parameters`, `dtype`); the older
one is written, which both read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpref.models.config import Config
from jaxpref.models.rope import LinearScaling, Llama3Scaling, Rope

Source = Mapping[str, Any]  # a parsed config.json


class Family(NamedTuple):
  """How one model_type maps to the decoder.

  Attributes:
    architecture: the class with a language-model head.
    read, write: config.json's fields to a `Config` and back; a decoder belongs to the family if it
      survives write and read.
    modules: our modules' paths to their names, '{i}' being the layer. Modules of one name are
      stored as one tensor, in this order along the output axis.
    conv1d: whether layers' projections are stored [in, out], as ours, not [out, in].
    buffers: a pattern of stored tensors that hold nothing learned.
  """

  architecture: str
  read: Callable[[Source], Config]
  write: Callable[[Config], dict[str, Any]]
  modules: Mapping[str, str]
  conv1d: bool = False
  buffers: str = r'.*\.rotary_emb\.inv_freq'


def family_of(config: Config, preferred: str | None = None) -> str:
  """The model_type that can hold `config`, `preferred` if that one can.

  Raises ValueError naming, for every family, the fields that it cannot hold.
  """
  differing = {}
  for name in sorted(FAMILIES, key=lambda name: name != preferred):
    family = FAMILIES[name]
    again = family.read(family.write(config))
    fields = [f.name for f in dataclasses.fields(Config) if f.compare]
    differing[name] = [f for f in fields if getattr(again, f) != getattr(config, f)]
    if not differing[name]:
      return name
  reasons = '; '.join(f'{name} cannot hold {", ".join(f)}' for name, f in differing.items())
  raise ValueError(f'no Hugging Face family holds this decoder: {reasons}')


_READ_ACTIVATION = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'relu': 'relu',
}
_WRITE_ACTIVATION = {
  'silu': 'silu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_pytorch_tanh',
  'relu': 'relu',
}
ROPE_KEYS = ('rope_theta', 'rope_scaling', 'rope_parameters')  # all spellings


def _read_gated(source: Source, *, eps: float = 1e-6, head_dim: int = 0) -> dict:
  """The fields that Llama and its kin spell alike."""
  _only(source, 'partial_rotary_factor', (1.0,))
  heads = _need(source, 'num_attention_heads')
  return dict(
    vocab_size=_need(source, 'vocab_size'),
    width=_need(source, 'hidden_size'),
    num_layers=_need(source, 'num_hidden_layers'),
    num_heads=heads,
    num_kv_heads=source.get('num_key_value_heads') or heads,
    head_dim=source.get('head_dim') or head_dim,
    mlp_width=_need(source, 'intermediate_size'),
    max_positions=_need(source, 'max_position_embeddings'),
    rope=_read_rope(source),
    norm_eps=source.get('rms_norm_eps', eps),
    activation=_choice(source, 'hidden_act', _READ_ACTIVATION, 'silu'),
    tied=bool(source.get('tie_word_embeddings', False)),
  )


def _write_gated(config: Config) -> dict[str, Any]:
  return dict(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    intermediate_size=config.mlp_width,
    max_position_embeddings=config.max_positions,
    rms_norm_eps=config.norm_eps,
    hidden_act=_WRITE_ACTIVATION[config.activation],
    tie_word_embeddings=config.tied,
    **_write_rope(config.rope),
  )


def _read_rope(source: Source) -> Rope:
  given = source.get('rope_parameters')
  scaling = dict(given if given is not None else source.get('rope_scaling') or {})
  theta = scaling.pop('rope_theta', source.get('rope_theta', 10_000.0))
  kind = scaling.pop('rope_type', scaling.pop('type', 'default'))
  _only(scaling, 'partial_rotary_factor', (1.0,))
  scaling.pop('partial_rotary_factor', None)
  kinds = {'default': (), 'linear': ('factor',), 'llama3': tuple(_LLAMA3)}
  if kind not in kinds:
    raise ValueError(f'config.json: rope type {kind!r} is not supported; known: {", ".join(kinds)}')
  if unknown := sorted(set(scaling) - set(kinds[kind])):
    raise ValueError(f'config.json: rope type {kind!r} has no {", ".join(unknown)}')
  if kind == 'default':
    return Rope(float(theta))
  if kind == 'linear':
    return Rope(float(theta), LinearScaling(float(_need(scaling, 'factor'))))
  return Rope(
    float(theta), Llama3Scaling(**{ours: _need(scaling, name) for name, ours in _LLAMA3.items()})
  )


_LLAMA3 = {
  'factor': 'factor',
  'low_freq_factor': 'low_factor',
  'high_freq_factor': 'high_factor',
  'original_max_position_embeddings': 'original_max_positions',
}


def _write_rope(rope: Rope | None) -> dict[str, Any]:
  if rope is None:
    return {}
  match rope.scaling:
    case None:
      scaling = None
    case LinearScaling(factor):
      scaling = {'rope_type': 'linear', 'factor': factor}
    case Llama3Scaling() as llama3:
      values = {name: getattr(llama3, ours) for name, ours in _LLAMA3.items()}
      scaling = {'rope_type': 'llama3', **values}
  return {'rope_theta': rope.theta, 'rope_scaling': scaling}


def _read_windows(source: Source) -> tuple[int | None, ...] | None:
  """Qwen's: full attention in the first layers, a window in those from max_window_layers on."""
  window, layers = source.get('sliding_window'), _need(source, 'num_hidden_layers')
  if not source.get('use_sliding_window') or window is None:
    return None
  kinds = source.get('layer_types')
  if kinds is None:
    first = source.get('max_window_layers', 28)
    kinds = ['full_attention' if i < first else 'sliding_attention' for i in range(layers)]
  known = {'full_attention': None, 'sliding_attention': window}
  return tuple(_choice({'layer_types': kind}, 'layer_types', known) for kind in kinds)


def _write_windows(config: Config) -> dict[str, Any]:
  windows = config.windows or (None,) * config.num_layers
  return dict(
    use_sliding_window=any(windows),
    sliding_window=max((w for w in windows if w), default=None),
    max_window_layers=next((i for i, w in enumerate(windows) if w), config.num_layers),
    layer_types=['sliding_attention' if w else 'full_attention' for w in windows],
  )


def _read_llama(source: Source) -> Config:
  bias = bool(source.get('attention_bias', False))
  mlp_bias = bool(source.get('mlp_bias', False))
  return Config(**_read_gated(source), qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _write_llama(config: Config) -> dict[str, Any]:
  return _write_gated(config) | dict(attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _read_qwen2(source: Source) -> Config:
  return Config(**_read_gated(source), qkv_bias=True, windows=_read_windows(source))


def _write_qwen2(config: Config) -> dict[str, Any]:
  return _write_gated(config) | _write_windows(config)


def _read_qwen3(source: Source) -> Config:
  bias = bool(source.get('attention_bias', False))
  fields = _read_gated(source, head_dim=128)
  windows = _read_windows(source)
  return Config(**fields, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=windows)


def _write_qwen3(config: Config) -> dict[str, Any]:
  return _write_gated(config) | _write_windows(config) | dict(attention_bias=config.qkv_bias)


def _read_gpt2(source: Source) -> Config:
  _only(source, 'scale_attn_weights', (True,))
  _only(source, 'scale_attn_by_inverse_layer_idx', (False,))
  _only(source, 'add_cross_attention', (False,))
  width = _need(source, 'n_embd')
  return Config(
    vocab_size=_need(source, 'vocab_size'),
    width=width,
    num_layers=_need(source, 'n_layer'),
    num_heads=_need(source, 'n_head'),
    mlp_width=source.get('n_inner') or 4 * width,
    max_positions=_need(source, 'n_positions'),
    rope=None,
    norm='layer',
    norm_eps=source.get('layer_norm_epsilon', 1e-5),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation=_choice(source, 'activation_function', _READ_ACTIVATION, 'gelu_new'),
    tied=bool(source.get('tie_word_embeddings', True)),
  )


def _write_gpt2(config: Config) -> dict[str, Any]:
  return dict(
    vocab_size=config.vocab_size,
    n_embd=config.width,
    n_layer=config.num_layers,
    n_head=config.num_heads,
    n_inner=config.mlp_width,
    n_positions=config.max_positions,
    layer_norm_epsilon=config.norm_eps,
    activation_function=_WRITE_ACTIVATION[config.activation].replace('pytorch_tanh', 'new'),
    tie_word_embeddings=config.tied,
  )


_LLAMA_MODULES = {
  'embed': 'model.embed_tokens',
  'layers/attention_norm': 'model.layers.{i}.input_layernorm',
  'layers/attention/q': 'model.layers.{i}.self_attn.q_proj',
  'layers/attention/k': 'model.layers.{i}.self_attn.k_proj',
  'layers/attention/v': 'model.layers.{i}.self_attn.v_proj',
  'layers/attention/q_norm': 'model.layers.{i}.self_attn.q_norm',
  'layers/attention/k_norm': 'model.layers.{i}.self_attn.k_norm',
  'layers/attention/out': 'model.layers.{i}.self_attn.o_proj',
  'layers/mlp_norm': 'model.layers.{i}.post_attention_layernorm',
  'layers/mlp/gate': 'model.layers.{i}.mlp.gate_proj',
  'layers/mlp/up': 'model.layers.{i}.mlp.up_proj',
  'layers/mlp/down': 'model.layers.{i}.mlp.down_proj',
  'norm': 'model.norm',
  'head': 'lm_head',
}
_GPT2_MODULES = {
  'embed': 'transformer.wte',
  'positions': 'transformer.wpe',
  'layers/attention_norm': 'transformer.h.{i}.ln_1',
  'layers/attention/q': 'transformer.h.{i}.attn.c_attn',
  'layers/attention/k': 'transformer.h.{i}.attn.c_attn',
  'layers/attention/v': 'transformer.h.{i}.attn.c_attn',
  'layers/attention/out': 'transformer.h.{i}.attn.c_proj',
  'layers/mlp_norm': 'transformer.h.{i}.ln_2',
  'layers/mlp/up': 'transformer.h.{i}.mlp.c_fc',
  'layers/mlp/down': 'transformer.h.{i}.mlp.c_proj',
  'norm': 'transformer.ln_f',
  'head': 'lm_head',
}

FAMILIES = {
  'llama': Family('LlamaForCausalLM', _read_llama, _write_llama, _LLAMA_MODULES),
  'qwen2': Family('Qwen2ForCausalLM', _read_qwen2, _write_qwen2, _LLAMA_MODULES),
  'qwen3': Family('Qwen3ForCausalLM', _read_qwen3, _write_qwen3, _LLAMA_MODULES),
  'gpt2': Family(
    'GPT2LMHeadModel',
    _read_gpt2,
    _write_gpt2,
    _GPT2_MODULES,
    conv1d=True,
    buffers=r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',  # the causal mask
  ),
}


def supported() -> str:
  return ', '.join(f'{name} ({family.architecture})' for name, family in FAMILIES.items())


def _need(source: Source, key: str) -> Any:
  if source.get(key) is None:
    raise ValueError(f'config.json: {key!r} is missing')
  return source[key]


def _choice(source: Source, key: str, known: Mapping, default=None) -> Any:
  value = source.get(key, default)
  if value not in known:
    raise ValueError(f'config.json: {key} = {value!r} is not supported; known: {", ".join(known)}')
  return known[value]


def _only(source: Source, key: str, values: tuple):
  if source.get(key, values[0]) not in values:
    raise ValueError(
      f'config.json: {key} = {source[key]!r} is not supported; it must be '
      f'{" or ".join(map(repr, values))}'
    )
