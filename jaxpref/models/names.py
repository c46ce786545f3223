"""What Hugging Face calls our modules.

'{i}' is the layer, '{e}' the expert. Modules of one name are stored as one tensor, in this order
along the output axis.
"""

LLAMA = {
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
  'score': 'score',
}
GPT2 = {
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
  'score': 'score',
}

_LAYER = 'model.layers.{i}.'
GEMMA = LLAMA | {
  'layers/attention_post_norm': _LAYER + 'post_attention_layernorm',
  'layers/mlp_norm': _LAYER + 'pre_feedforward_layernorm',
  'layers/mlp_post_norm': _LAYER + 'post_feedforward_layernorm',
}
OLMO2 = LLAMA | {
  'layers/attention_post_norm': _LAYER + 'post_attention_layernorm',
  'layers/mlp_post_norm': _LAYER + 'post_feedforward_layernorm',
}
PHI3 = LLAMA | {
  **{f'layers/attention/{x}': _LAYER + 'self_attn.qkv_proj' for x in 'qkv'},
  **{f'layers/mlp/{x}': _LAYER + 'mlp.gate_up_proj' for x in ('gate', 'up')},
}
QWEN3_MOE = LLAMA | {
  'layers/mlp/router': _LAYER + 'mlp.gate',
  'layers/mlp/experts/gate': _LAYER + 'mlp.experts.{e}.gate_proj',
  'layers/mlp/experts/up': _LAYER + 'mlp.experts.{e}.up_proj',
  'layers/mlp/experts/down': _LAYER + 'mlp.experts.{e}.down_proj',
}
MIXTRAL = LLAMA | {
  'layers/mlp/router': _LAYER + 'block_sparse_moe.gate',
  'layers/mlp/experts/gate': _LAYER + 'block_sparse_moe.experts.{e}.w1',
  'layers/mlp/experts/up': _LAYER + 'block_sparse_moe.experts.{e}.w3',
  'layers/mlp/experts/down': _LAYER + 'block_sparse_moe.experts.{e}.w2',
}
