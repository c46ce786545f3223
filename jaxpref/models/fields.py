"""The fields of config.json: read so that none is overlooked, and those that families share.

Both spellings are read: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
that of 5 (`rope_parameters`, `dtype`); the older one is written, which both read.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpref.models.config import Config
from jaxpref.models.rope import LinearScaling, Llama3Scaling, LongScaling, Rope

# Fields that change nothing that we compute, family by family or in all of them.
HARMLESS = frozenset(
  # Who wrote it, and the names of things.
  'architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype '
  'auto_map _commit_hash tokenizer_class license finetuning_task task_specific_params '
  'unsloth_fixed unsloth_version vocab_file is_llama_config transformers.js_config '
  '_attn_implementation _attn_implementation_autoset '
  'attn_implementation _attn_implementation_internal _experts_implementation cache_implementation '
  # Special tokens: the tokenizer's.
  'bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id '
  'decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens '
  'begin_suppress_tokens bad_words_ids prefix '
  # Initial weights, and dropout and noise while training, which is set by the run that trains.
  'initializer_range initializer_factor attention_dropout hidden_dropout resid_dropout '
  'embd_pdrop resid_pdrop attn_pdrop summary_first_dropout classifier_dropout '
  'router_jitter_noise '
  # Which outputs a call returns, how they are cached, and losses that are not in them.
  'use_cache return_dict output_hidden_states output_attentions output_router_logits torchscript '
  'output_past gradient_checkpointing _flash_attn_2_enabled use_flash_attn '
  'router_aux_loss_coef keys_to_ignore_at_inference problem_type use_bfloat16 tf_legacy_loss '
  # Labels' names and heads that other classes have.
  'id2label label2id num_labels _num_labels summary_type summary_use_proj summary_activation '
  'summary_proj_to_labels '
  # The order of equal sums, memory layout and sizes said twice.
  'pretraining_tp reorder_and_upcast_attn chunk_size_feed_forward n_ctx '
  # How text is generated: the run's, or the sampler's.
  'max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups '
  'diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty '
  'no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores '
  'return_dict_in_generate remove_invalid_values exponential_decay_length_penalty'.split()
)
# Switches of other families: off, they change nothing.
_OFF = (
  'attention_bias mlp_bias qkv_bias use_bias lm_head_bias use_qk_norm use_sliding_window '
  'rope_interleaved use_mrope '
  'is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size '
  'tie_encoder_decoder pruned_heads use_bidirectional_attention'
).split()

LAYERS = 10_000  # more is no model, and would take memory before any tensor is looked at

READ_ACTIVATION = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'relu': 'relu',
}
WRITE_ACTIVATION = {
  'silu': 'silu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_pytorch_tanh',
  'relu': 'relu',
}
ROPE_KEYS = (
  'rope_theta',
  'rope_scaling',
  'rope_parameters',
  'rope_local_base_freq',
  'partial_rotary_factor',
  'original_max_position_embeddings',
)  # all spellings


class Fields(Mapping):
  """A parsed config.json that remembers which of its fields were looked at."""

  def __init__(self, source: Mapping[str, Any]):
    self.source = source
    self.seen: set[str] = set()

  def __getitem__(self, key: str) -> Any:
    self.seen.add(key)
    return self.source[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self.source)

  def __len__(self) -> int:
    return len(self.source)

  def need(self, key: str) -> Any:
    if self.get(key) is None:
      raise ValueError(f'config.json: {key!r} is missing')
    return self[key]

  def size(self, key: str, most: int = 2**40) -> int:
    value = self.need(key)
    if type(value) is not int or not 1 <= value <= most:
      raise ValueError(f'config.json: {key} = {value!r} is not a whole number of 1 to {most}')
    return value

  def choice(self, key: str, known: Mapping, default=None) -> Any:
    value = self.get(key, default)
    if value not in known:
      listed = ', '.join(map(str, known))
      raise ValueError(f'config.json: {key} = {value!r} is not supported; known: {listed}')
    return known[value]

  def only(self, key: str, *values):
    if self.get(key, values[0]) not in values:
      raise ValueError(
        f'config.json: {key} = {self[key]!r} is not supported; it must be '
        f'{" or ".join(map(repr, values))}'
      )

  def finish(self):
    """Raise ValueError if a field that may matter was not looked at."""
    for key in set(_OFF) - self.seen:
      if self.get(key):
        raise ValueError(f'config.json: {key} = {self[key]!r} is not supported here; only off is')
    unread = sorted(
      key
      for key, value in self.source.items()
      if key not in self.seen and key not in HARMLESS and value is not None
    )
    if unread:
      listed = ', '.join(f'{key} = {self.source[key]!r}'[:80] for key in unread)
      raise ValueError(
        f'config.json: unknown to this family: {listed}; if that changes nothing that the model '
        'computes, remove it from config.json'
      )


def read_gated(
  fields: Fields,
  *,
  eps: float = 1e-6,
  head_dim: int = 0,
  tied: bool = False,
  activation: str | None = None,
  mlp_width: str = 'intermediate_size',
) -> dict[str, Any]:
  """What Llama and its kin spell alike, except for positions; keywords are the family's own."""
  heads = fields.size('num_attention_heads')
  return dict(
    vocab_size=fields.size('vocab_size'),
    width=fields.size('hidden_size'),
    num_layers=fields.size('num_hidden_layers', most=LAYERS),
    num_heads=heads,
    num_kv_heads=fields.get('num_key_value_heads') or heads,
    head_dim=fields.get('head_dim') or head_dim,
    mlp_width=fields.size(mlp_width),
    max_positions=fields.size('max_position_embeddings'),
    norm_eps=fields.get('rms_norm_eps', eps),
    activation=activation or fields.choice('hidden_act', READ_ACTIVATION, 'silu'),
    tied=bool(fields.get('tie_word_embeddings', tied)),
  )


def write_gated(config: Config) -> dict[str, Any]:
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
    hidden_act=WRITE_ACTIVATION[config.activation],
    tie_word_embeddings=config.tied,
    **write_rope(config.rope),
  )


_LLAMA3 = {
  'factor': 'factor',
  'low_freq_factor': 'low_factor',
  'high_freq_factor': 'high_factor',
  'original_max_position_embeddings': 'original_max_positions',
}
_LONG = ('short_factor', 'long_factor', 'factor', 'attention_factor')
_KINDS = {'default': (), 'linear': ('factor',), 'llama3': tuple(_LLAMA3), 'longrope': _LONG}


def read_rope(fields: Fields, *, theta: float = 1e4, partial: bool = False) -> Rope:
  """The rotation of all layers; `partial`: whether the family may turn a part of a head."""
  given = fields.get('rope_parameters')
  scaling = fields.get('rope_scaling')
  scaling = dict(given if given is not None else scaling or {})
  theta = scaling.pop('rope_theta', fields.get('rope_theta', theta))
  fraction = scaling.pop('partial_rotary_factor', fields.get('partial_rotary_factor', 1.0))
  if fraction != 1.0 and not partial:
    raise ValueError(f'config.json: partial_rotary_factor = {fraction!r} is not supported here')
  return parse_rope(fields, scaling, float(theta), float(fraction))


def parse_rope(fields: Fields, scaling: dict, theta: float, fraction: float = 1.0) -> Rope:
  """A rope of `scaling`, the dict that config.json gives under one of its names."""
  scaling = dict(scaling)
  kind = scaling.pop('rope_type', scaling.pop('type', 'default'))
  scaling.pop('type', None)
  kind = 'longrope' if kind == 'su' else kind  # its first name
  if kind not in _KINDS:
    known = ', '.join(_KINDS)
    raise ValueError(f'config.json: rope type {kind!r} is not supported; known: {known}')
  original = fields.get('original_max_position_embeddings')
  if kind in ('default', 'longrope'):
    original = original or scaling.pop('original_max_position_embeddings', None)
    scaling.pop('original_max_position_embeddings', None)
  given = Fields(scaling)
  if unknown := sorted(set(given) - set(_KINDS[kind])):
    raise ValueError(f'config.json: rope type {kind!r} has no {", ".join(unknown)}')
  match kind:
    case 'linear':
      return Rope(theta, LinearScaling(float(given.need('factor'))), fraction)
    case 'llama3':
      values = {ours: given.need(name) for name, ours in _LLAMA3.items()}
      return Rope(theta, Llama3Scaling(**values), fraction)
    case 'longrope':
      return Rope(theta, _read_long(given, fields, original), fraction)
  return Rope(theta, None, fraction)


def _read_long(scaling: Fields, fields: Fields, original: int | None) -> LongScaling:
  positions = fields.size('max_position_embeddings')
  original = original or positions
  factor = scaling.get('factor') or positions / original
  amplitude = scaling.get('attention_factor')
  if amplitude is None:  # LongRoPE's: the longer the window, the sharper the softmax
    amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
  short, long = (tuple(map(float, scaling.need(x))) for x in ('short_factor', 'long_factor'))
  return LongScaling(short, long, original, float(amplitude))


def write_rope(rope: Rope | None) -> dict[str, Any]:
  if rope is None:
    return {}
  more = {}
  match rope.scaling:
    case None:
      scaling = None
    case LinearScaling(factor):
      scaling = {'rope_type': 'linear', 'factor': factor}
    case Llama3Scaling() as llama3:
      values = {name: getattr(llama3, ours) for name, ours in _LLAMA3.items()}
      scaling = {'rope_type': 'llama3', **values}
    case LongScaling(short, long, original, amplitude):
      scaling = {
        'rope_type': 'longrope',
        'short_factor': list(short),
        'long_factor': list(long),
        'attention_factor': amplitude,
      }
      more = {'original_max_position_embeddings': original}
  return {'rope_theta': rope.theta, 'rope_scaling': scaling, **more}


def read_windows(
  fields: Fields, window: int | None, kinds: list[str]
) -> tuple[int | None, ...] | None:
  """The window of every layer: layer_types, or by default `kinds`, say which layers have it."""
  kinds = fields.get('layer_types') or kinds
  known = {'full_attention': None, 'sliding_attention': window}
  return tuple(Fields({'layer_types': kind}).choice('layer_types', known) for kind in kinds)


def write_windows(config: Config) -> dict[str, Any]:
  windows = config.windows or (None,) * config.num_layers
  return dict(
    sliding_window=max((w for w in windows if w), default=None),
    layer_types=['sliding_attention' if w else 'full_attention' for w in windows],
  )
