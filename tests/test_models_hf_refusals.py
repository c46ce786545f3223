"""What cannot be loaded or saved as a Hugging Face folder is refused by name."""

import numpy as np
import pytest

from jaxpref.models import Model, load_hf, preset, save_hf
from tests.hf_folders import FIXTURES, copy, weights


def test_a_decoder_of_no_family_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no Hugging Face family .*llama cannot hold norm_pl'):
    save_hf(tmp_path, Model(preset('tiny', norm_placement='both')), {})


def change_tensor(name, change):
  def tensors():
    found = weights(FIXTURES['llama'])
    found[name] = change(found.get(name))
    return {n: x for n, x in found.items() if x is not None}

  return dict(tensors=tensors)


Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (change_tensor(Q, lambda x: None), rf'missing {Q} \(48, 32\)$'),
    (change_tensor(Q, lambda x: x[:, :5]), rf'{Q} has shape \(48, 5\); .* asks for \(48, 32\)'),
    (change_tensor(Q, lambda x: x.astype(np.int8)), f'{Q} is stored as I8; known: F32, BF16, F16'),
    (
      change_tensor(Q, lambda x: x.astype(np.float16)),
      f'layers differ in dtype .*{Q} as F16.*give the dtype',
    ),
    (
      change_tensor('model.layers.2.foo', lambda x: np.ones(3, np.float32)),
      r'2 layers of LlamaForCausalLM have no model.layers.2.foo \(3,\); supported: llama',
    ),
    (dict(num_hidden_layers=1), r'1 layers of .* have no model.layers.1.* and 13 more'),
    (dict(num_hidden_layers=3), r'missing model.layers.2.* and 13 more'),
    (
      dict(model_type='mamba'),
      r"model_type 'mamba' .* supported: llama \(LlamaForCausalLM\), mistral",
    ),
    (dict(architectures=['LlamaForTokenClassification']), 'LlamaForTokenClassification.*supported'),
    (dict(hidden_act='xielu'), "hidden_act = 'xielu' is not supported; known: silu"),
    (dict(rope_parameters={'rope_type': 'yarn'}), "rope type 'yarn' is not supported; known: def"),
    (
      dict(rope_parameters={'rope_type': 'linear', 'rope_theta': 1.0}),
      "'factor' is missing",
    ),
    (
      dict(rope_parameters={'full_attention': {'rope_theta': 1.0}}),
      "rope type 'default' has no full_attention",
    ),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor = 0.5 is not supported'),
    (dict(quantization_config={'bits': 4}), 'quantised weights are not supported'),
    (dict(hidden_size=None), "'hidden_size' is missing"),
    (dict(num_key_value_heads=3), 'num_heads 4 is not a multiple of num_kv_heads 3'),
    (dict(vocab_size=97), r'embed_tokens.weight has shape \(96, 32\); .* asks for \(97, 32\)'),
    (dict(hidden_size='32'), 'config.json|not supported'),
  ],
)
def test_a_wrong_folder_is_refused_by_name(changes, message, tmp_path):
  if 'tensors' in changes:
    changes = dict(tensors=changes['tensors']())
  with pytest.raises(ValueError, match=message) as error:
    load_hf(copy(FIXTURES['llama'], tmp_path, **changes))
  assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx = True'),
    (dict(scale_attn_weights=False), 'scale_attn_weights = False'),
    (dict(add_cross_attention=True), 'add_cross_attention = True'),
  ],
)
def test_gpt2s_switches_are_refused(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    load_hf(copy(FIXTURES['gpt2'], tmp_path, **changes))


def test_broken_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'config.json: no such file'):
    load_hf(tmp_path)
  folder = copy(FIXTURES['llama'], tmp_path)
  whole = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r'model.safetensors: not a whole safetensors file'):
    load_hf(folder)
  (folder / 'model.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match=r'model.safetensors: no such file; weights are read'):
    load_hf(folder)
  index = folder / 'model.safetensors.index.json'
  for text, message in (
    ('{}', 'no weight_map'),
    ('[', 'no weight_map'),
    ('{"weight_map": {"x": "../x.safetensors"}}', 'is not a file name'),
  ):
    index.write_text(text)
    with pytest.raises(ValueError, match=message):
      load_hf(folder)
  (folder / 'part.safetensors').write_bytes(whole)
  index.write_text('{"weight_map": {"x": "part.safetensors"}}')
  with pytest.raises(ValueError, match=r'part.safetensors: lm_head.weight.* not where .*index'):
    load_hf(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(ValueError, match=r'config.json: not JSON'):
    load_hf(folder)


def test_parameters_of_another_model_are_not_saved(tmp_path):
  model, params = load_hf(FIXTURES['llama'])
  with pytest.raises(ValueError, match=r"not this model's: missing head/w"):
    save_hf(tmp_path, model, {k: v for k, v in params.items() if k != 'head'})
  with pytest.raises(ValueError, match=r'norm/scale has shape \(3,\); the model asks for \(32,\)'):
    save_hf(tmp_path, model, params | {'norm': {'scale': np.ones(3, np.float32)}})
  assert not list(tmp_path.iterdir())
