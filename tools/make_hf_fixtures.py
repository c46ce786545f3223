"""Makes tests/testdata/hf/: tiny random models of every family, and transformers' logits for them.

    python3.11 tools/make_hf_fixtures.py [--venv .venv-fixtures]

Makes the virtual environment if it is not there (torch, then transformers: minutes, some GB), then
runs itself in it. Every switch of a config stands off its neutral value: norm weights off 1, biases
off 0, windows shorter than the rows, rope scaling that bites. Weights are float32;
expected.safetensors holds, for each padding side, tokens and mask [B, T] and float32 logits.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / 'tests' / 'testdata' / 'hf'
VOCAB, LENGTHS, LENGTH = 96, (24, 17, 9), 24

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
      n_positions=32,
      activation_function='relu',
      tie_word_embeddings=False,
    ),
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
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
  model = model.float().eval()
  for path, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
      if parameter.ndim == 1:
        parameter.copy_(0.3 * noise + (1.0 if path.endswith('weight') else 0.0))
      else:
        parameter.copy_(noise * (0.5 if 'embed' in path else 0.2))
  folder = TARGET / name
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.iterdir():
    old.unlink()
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink()
  if spelling == 4:
    _respell(folder / 'config.json')

  tokens = torch.randint(3, VOCAB, (len(LENGTHS), LENGTH), generator=generator)
  expected = {}
  for side in ('right', 'left'):
    steps, lengths = torch.arange(LENGTH)[None], torch.tensor(LENGTHS)[:, None]
    mask = steps < lengths if side == 'right' else steps >= LENGTH - lengths
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    padded = torch.where(mask, tokens, 0)
    with torch.no_grad():
      output = model(input_ids=padded, attention_mask=mask.long(), position_ids=positions)
    expected[f'tokens_{side}'] = padded.int()
    expected[f'mask_{side}'] = mask
    expected[f'logits_{side}'] = output.logits.float().contiguous()
  save_file(expected, folder / 'expected.safetensors')
  size = sum(file.stat().st_size for file in folder.iterdir())
  largest = expected['logits_right'].abs().max().item()
  print(f'{name}: {size / 1000:.0f} kB, largest logit {largest:.1f}')
  if size > 300_000:
    raise SystemExit(f'{folder} has {size} bytes; at most 300000 are meant to be committed')


def _respell(path: pathlib.Path):
  """config.json as transformers 4 wrote it."""
  fields = json.loads(path.read_text())
  fields['torch_dtype'] = fields.pop('dtype')
  rope = fields.pop('rope_parameters', None)
  if rope is not None:
    fields['rope_theta'] = rope.pop('rope_theta')
    fields['rope_scaling'] = None if rope == {'rope_type': 'default'} else rope
  fields.pop('layer_types', None)
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
