"""One decoder for every family, and its way in from and out to Hugging Face folders."""

from jaxpref.models.adapted import Adapted, adapt
from jaxpref.models.attention import Branches, Cache
from jaxpref.models.config import Config
from jaxpref.models.context import States, fold, unfold
from jaxpref.models.experts import Routing
from jaxpref.models.hf import load_hf, save_hf
from jaxpref.models.layers import linear
from jaxpref.models.lora import Lora, LoraWeight, merged, without
from jaxpref.models.model import (
  Model,
  default_dtype,
  init,
  mask_layout,
  row_attention,
)
from jaxpref.models.placement import brought_in, grouped, held
from jaxpref.models.presets import PRESETS, preset
from jaxpref.models.rope import LinearScaling, Llama3Scaling, LongScaling, Rope

__all__ = [
  'PRESETS',
  'Adapted',
  'Branches',
  'Cache',
  'Config',
  'LinearScaling',
  'Llama3Scaling',
  'LongScaling',
  'Lora',
  'LoraWeight',
  'Model',
  'Rope',
  'Routing',
  'States',
  'adapt',
  'brought_in',
  'default_dtype',
  'fold',
  'grouped',
  'held',
  'init',
  'linear',
  'load_hf',
  'mask_layout',
  'merged',
  'preset',
  'row_attention',
  'save_hf',
  'unfold',
  'without',
]
