"""Makes tests/testdata/hf/: tiny random models of every family, and transformers' logits for them.

    python3.11 tools/make_hf_fixtures.py [--venv .venv-fixtures]

Makes the virtual environment if it is not there (torch, then transformers: minutes, some GB), then
runs itself in it. Every switch of a config stands off its neutral value: norm weights off 1, biases
off 0, caps that bite, windows shorter than the rows, rope scaling that bites. Weights are float32;
expected.safetensors holds, for each padding side, tokens and mask [B, T] and float32 logits; then
prompts [B, P], padded on the left, their mask and what greedy generation adds, [B, 32]. A
classifier has the scores [B, num_labels] of whole rows instead.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / 'tests' / 'testdata' / 'hf'
VOCAB, LENGTHS, LENGTH = 96, (24, 17, 9), 24
PROMPTS, NEW_TOKENS, GAP = (8, 5), 32, 2e-3  # GAP: between the two largest logits, at every step

GATED = dict(
  vocab_size=VOCAB,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=56,
  max_position_embeddings=64,
  rms_norm_eps=1e-3,
  initializer_range=0.02,
)
LLAMA3 = dict(
  rope_type='llama3',
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
LINEAR = dict(rope_type='linear', factor=2.5)
LONG = dict(
  rope_type='longrope',
  short_factor=[1.1, 1.7, 2.9],
  long_factor=[1.5, 4.0, 8.0],
  original_max_position_embeddings=64,
)
DEFAULT = dict(rope_type='default')
WINDOW = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)

# name: (model_type, spelling of config.json, its fields)
MODELS = {
  'llama': (
    'llama',
    5,
    dict(
      **GATED,
      head_dim=12,
      attention_bias=True,
      mlp_bias=True,
      hidden_act='gelu',
      tie_word_embeddings=False,
      rope_parameters=dict(**LLAMA3, rope_theta=500.0),
    ),
  ),
  'llama_tied': (
    'llama',
    4,
    dict(**GATED, tie_word_embeddings=True, rope_parameters=dict(**LINEAR, rope_theta=700.0)),
  ),
  'llama3_tied': (
    'llama',
    4,
    dict(**GATED, tie_word_embeddings=True, rope_parameters=dict(**LLAMA3, rope_theta=300.0)),
  ),
  'qwen2': (
    'qwen2',
    5,
    dict(
      **GATED,
      **WINDOW,
      tie_word_embeddings=False,
      rope_parameters=dict(rope_type='default', rope_theta=900.0),
    ),
  ),
  'qwen2_tied': (
    'qwen2',
    4,
    dict(
      **GATED,
      tie_word_embeddings=True,
      rope_parameters=dict(rope_type='default', rope_theta=1e6),
    ),
  ),
  'qwen3': (
    'qwen3',
    5,
    dict(
      **GATED,
      **WINDOW,
      head_dim=16,
      attention_bias=True,
      tie_word_embeddings=False,
      rope_parameters=dict(rope_type='default', rope_theta=800.0),
    ),
  ),
  'qwen3_tied': (
    'qwen3',
    4,
    dict(
      **GATED,
      head_dim=16,
      tie_word_embeddings=True,
      rope_parameters=dict(rope_type='default', rope_theta=1e6),
    ),
  ),
  'gpt2': (
    'gpt2',
    5,
    dict(
      vocab_size=VOCAB,
      n_embd=32,
      n_layer=2,
      n_head=4,
      n_inner=72,
      n_positions=40,
      layer_norm_epsilon=1e-3,
      tie_word_embeddings=True,
    ),
  ),
  'gpt2_untied': (
    'gpt2',
    4,
    dict(
      vocab_size=VOCAB,
      n_embd=32,
      n_layer=2,
      n_head=4,
      n_positions=40,
      activation_function='relu',
      tie_word_embeddings=False,
    ),
  ),
  'mistral': (
    'mistral',
    5,
    dict(
      **GATED,
      head_dim=12,
      sliding_window=6,
      tie_word_embeddings=False,
      rope_parameters=dict(**DEFAULT, rope_theta=400.0),
    ),
  ),
  'mistral_tied': (
    'mistral',
    4,
    dict(
      **GATED,
      sliding_window=None,
      tie_word_embeddings=True,
      rope_parameters=dict(**LINEAR, rope_theta=700.0),
    ),
  ),
  'gemma': (
    'gemma',
    4,
    dict(
      **GATED | dict(num_key_value_heads=1),
      head_dim=12,
      attention_bias=True,
      rope_parameters=dict(**DEFAULT, rope_theta=600.0),
    ),
  ),
  'gemma2': (
    'gemma2',
    5,
    dict(
      **GATED,
      head_dim=12,
      attention_bias=True,
      hidden_activation='gelu',
      sliding_window=6,
      query_pre_attn_scalar=5,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
      rope_parameters=dict(**LINEAR, rope_theta=600.0),
    ),
  ),
  'gemma2_untied': (
    'gemma2',
    4,
    dict(
      **GATED,
      head_dim=8,
      sliding_window=5,
      query_pre_attn_scalar=12,
      attn_logit_softcapping=None,
      final_logit_softcapping=4.0,
      tie_word_embeddings=False,
      rope_parameters=dict(**DEFAULT, rope_theta=600.0),
    ),
  ),
  'gemma3': (
    'gemma3_text',
    5,
    dict(
      **GATED | dict(num_hidden_layers=3),
      head_dim=12,
      attention_bias=True,
      sliding_window=5,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      query_pre_attn_scalar=5,
      final_logit_softcapping=3.0,
      rope_parameters=dict(
        full_attention=dict(**LINEAR, rope_theta=900.0),
        sliding_attention=dict(**DEFAULT, rope_theta=50.0),
      ),
    ),
  ),
  'gemma3_pattern': (
    'gemma3_text',
    4,
    dict(
      **GATED | dict(num_hidden_layers=3),
      head_dim=8,
      sliding_window=5,
      sliding_window_pattern=2,
      query_pre_attn_scalar=8,
      rope_parameters=dict(
        full_attention=dict(**LINEAR, rope_theta=800.0),
        sliding_attention=dict(**DEFAULT, rope_theta=60.0),
      ),
    ),
  ),
  'phi3': (
    'phi3',
    5,
    dict(
      **GATED,
      sliding_window=6,
      hidden_act='gelu',
      rope_parameters=dict(**DEFAULT, rope_theta=500.0, partial_rotary_factor=0.5),
    ),
  ),
  'phi3_long': (
    'phi3',
    4,
    dict(
      **GATED | dict(max_position_embeddings=512),
      original_max_position_embeddings=64,
      tie_word_embeddings=True,
      rope_parameters=dict(**LONG, rope_theta=500.0, partial_rotary_factor=0.75),
    ),
  ),
  'olmo2': (
    'olmo2',
    5,
    dict(**GATED, attention_bias=True, rope_parameters=dict(**LLAMA3, rope_theta=500.0)),
  ),
  'olmo2_tied': (
    'olmo2',
    4,
    dict(
      **GATED,
      tie_word_embeddings=True,
      hidden_act='gelu',
      rope_parameters=dict(**DEFAULT, rope_theta=500.0),
    ),
  ),
  'qwen3_moe': (
    'qwen3_moe',
    5,
    dict(
      **GATED,
      head_dim=16,
      attention_bias=True,
      use_sliding_window=True,
      sliding_window=6,
      moe_intermediate_size=20,
      num_experts=5,
      num_experts_per_tok=2,
      norm_topk_prob=True,
      rope_parameters=dict(**DEFAULT, rope_theta=800.0),
    ),
  ),
  'qwen3_moe_tied': (
    'qwen3_moe',
    4,
    dict(
      **GATED,
      moe_intermediate_size=20,
      num_experts=4,
      num_experts_per_tok=3,
      norm_topk_prob=False,
      tie_word_embeddings=True,
      rope_parameters=dict(**DEFAULT, rope_theta=1e6),
    ),
  ),
  'mixtral': (
    'mixtral',
    5,
    dict(
      **GATED | dict(intermediate_size=20),
      head_dim=12,
      sliding_window=6,
      num_local_experts=5,
      num_experts_per_tok=2,
      rope_parameters=dict(**LINEAR, rope_theta=800.0),
    ),
  ),
  'qwen2_scores': (
    'qwen2',
    5,
    dict(**GATED, num_labels=1, rope_parameters=dict(**DEFAULT, rope_theta=900.0)),
  ),
  'gemma2_scores': (
    'gemma2',
    4,
    dict(
      **GATED,
      head_dim=12,
      num_labels=3,
      sliding_window=6,
      query_pre_attn_scalar=5,
      attn_logit_softcapping=2.0,
      rope_parameters=dict(**DEFAULT, rope_theta=600.0),
    ),
  ),
  'gpt2_scores': (
    'gpt2',
    4,
    dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=40, num_labels=2),
  ),
}


def make(name: str, seed: int):
  import torch
  import transformers
  from safetensors.torch import save_file

  model_type, spelling, fields = MODELS[name]
  generator = torch.Generator().manual_seed(seed)
  config = transformers.AutoConfig.for_model(model_type, **fields)
  config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
  scores = 'num_labels' in fields
  auto = transformers.AutoModelForCausalLM
  auto = transformers.AutoModelForSequenceClassification if scores else auto
  model = auto.from_config(config, attn_implementation='eager').float().eval()
  for path, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
      if parameter.ndim == 1:
        parameter.add_(0.3 * noise)  # off its neutral value: a norm's 1 or 0, a bias's 0
      else:
        parameter.copy_(noise * (0.5 if 'embed' in path else 0.2))
  folder = TARGET / name
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.iterdir():
    old.unlink()
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  if spelling == 4:
    _respell(folder / 'config.json')

  tokens = torch.randint(3, VOCAB, (len(LENGTHS), LENGTH), generator=generator)
  expected = {}
  for side in ('right', 'left'):
    padded, mask = _padded(tokens, LENGTHS, side)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
      output = model(input_ids=padded, attention_mask=mask.long(), position_ids=positions)
    expected[f'tokens_{side}'] = padded.int()
    expected[f'mask_{side}'] = mask
    expected[f'logits_{side}'] = output.logits.float().contiguous()
  if not scores:
    expected |= _generated(model, seed)
  save_file(expected, folder / 'expected.safetensors')
  size = sum(file.stat().st_size for file in folder.iterdir())
  largest = expected['logits_right'].abs().max().item()
  print(f'{name}: {size / 1000:.0f} kB, largest logit {largest:.1f}')
  if size > 300_000:
    raise SystemExit(f'{folder} has {size} bytes; at most 300000 are meant to be committed')


def _padded(tokens, lengths, side: str):
  import torch

  length = tokens.shape[1]
  steps, lengths = torch.arange(length)[None], torch.tensor(lengths)[:, None]
  mask = steps < lengths if side == 'right' else steps >= length - lengths
  return torch.where(mask, tokens, 0), mask


def _generated(model, seed: int) -> dict:
  """Prompts and their greedy continuations, drawn anew until no step is a close call."""
  import torch

  model.generation_config.eos_token_id = None
  for attempt in range(100):
    generator = torch.Generator().manual_seed(1000 * seed + attempt)
    drawn = torch.randint(3, VOCAB, (len(PROMPTS), max(PROMPTS)), generator=generator)
    prompts, mask = _padded(drawn, PROMPTS, 'left')
    output = model.generate(
      prompts,
      attention_mask=mask.long(),
      do_sample=False,
      max_new_tokens=NEW_TOKENS,
      output_logits=True,
      return_dict_in_generate=True,
    )
    top = torch.stack(output.logits).topk(2, dim=-1).values
    if (top[..., 0] - top[..., 1]).min() > GAP:
      new = output.sequences[:, prompts.shape[1] :].int().contiguous()
      return {'prompts': prompts.int(), 'mask_prompts': mask, 'generated': new}
  raise SystemExit('every prompt met a close call; draw other weights')


def _respell(path: pathlib.Path):
  """config.json as transformers 4 wrote it."""
  fields = json.loads(path.read_text())
  fields['torch_dtype'] = fields.pop('dtype')
  rope = fields.pop('rope_parameters', None)
  if rope is not None:
    if 'sliding_attention' in rope:
      fields['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
      rope = rope['full_attention']
    fields['rope_theta'] = rope.pop('rope_theta')
    if 'partial_rotary_factor' in rope:
      fields['partial_rotary_factor'] = rope.pop('partial_rotary_factor')
    if rope['rope_type'] == 'longrope':
      rope.pop('original_max_position_embeddings')
    fields['rope_scaling'] = None if rope == {'rope_type': 'default'} else rope
  fields.pop('layer_types', None)
  if fields.get('head_dim', 0) * fields.get('num_attention_heads', 0) == fields.get('hidden_size'):
    if not fields['model_type'].startswith('gemma'):  # whose own default is another
      fields.pop('head_dim')
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')


def main():
  parser = argparse.ArgumentParser(description='Makes tests/testdata/hf/.')
  parser.add_argument('--venv', type=pathlib.Path, default=ROOT / '.venv-fixtures')
  venv = parser.parse_args().venv.absolute()
  python = venv / 'bin' / 'python'
  if pathlib.Path(sys.prefix) != venv:
    if not python.exists():
      subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
      for package in ('torch==2.13.0', 'transformers==5.23.0'):
        subprocess.run([python, '-m', 'pip', 'install', package], check=True)
    raise SystemExit(subprocess.run([python, __file__, '--venv', venv]).returncode)
  for seed, name in enumerate(MODELS):
    make(name, seed)


if __name__ == '__main__':
  main()
