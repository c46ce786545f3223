"""The Hugging Face folders of testdata/hf (tools/make_hf_fixtures.py), and changed copies."""

import json
import pathlib

from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).parent
FOLDERS = sorted((ROOT / 'testdata' / 'hf').iterdir())
FIXTURES = {folder.name: folder for folder in FOLDERS}


def weights(folder):
  return {
    name: tensor
    for file in sorted(folder.glob('model*.safetensors'))
    for name, tensor in load_file(file).items()
  }


def fields(folder):
  return json.loads((folder / 'config.json').read_text())


def copy(folder, target, *, tensors=None, **changes):
  """A copy of a fixture, its tensors replaced, its config.json's fields changed (None: removed)."""
  target.mkdir(exist_ok=True)
  config = {k: v for k, v in (fields(folder) | changes).items() if v is not None}
  (target / 'config.json').write_text(json.dumps(config))
  save_file(weights(folder) if tensors is None else tensors, target / 'model.safetensors')
  return target
