"""Hugging Face data set folders: splits by name, by README, as saved to disk, and from the hub."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxpref.data import folders
from jaxpref.data.sources import DataError, open_source


def write(root, name, *texts):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.Table.from_pylist([{'text': text} for text in texts])
  if path.suffix == '.parquet':
    pa.parquet.write_table(table, path)
  elif path.suffix == '.arrow':
    with pa.ipc.new_stream(path, table.schema) as out:
      out.write_table(table)
  else:
    path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))


def texts(spec):
  return [record['text'] for _, record in open_source(spec).records()]


def test_splits_by_file_name(tmp_path):
  write(tmp_path, 'data/train_prefs-00001-of-00002.parquet', 'b')
  write(tmp_path, 'data/train_prefs-00000-of-00002.parquet', 'a')
  write(tmp_path, 'data/test_prefs-00000-of-00001.parquet', 'c')
  assert texts(f'hf:{tmp_path}:train_prefs') == ['a', 'b']
  assert texts(f'hf:{tmp_path}:train_prefs[:50%]') == ['a']
  assert texts(f'hf:{tmp_path}:test_prefs') == ['c']
  with pytest.raises(DataError, match=r"no split 'train'; it has \['test_prefs', 'train_prefs'\]"):
    open_source(f'hf:{tmp_path}')
  with pytest.raises(DataError, match=r"did you mean 'test_prefs'"):
    open_source(f'hf:{tmp_path}:test_pref')


def test_splits_by_words_in_names_and_folders(tmp_path):
  write(tmp_path, 'my-train.jsonl', 'a')
  write(tmp_path, 'dev/part.jsonl', 'b')
  write(tmp_path, 'contest.jsonl', 'c')  # not a test split
  assert texts(f'hf:{tmp_path}') == ['c', 'a']
  assert texts(f'hf:{tmp_path}:validation') == ['b']


def test_saved_to_disk(tmp_path):
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["prefs", "rest"]}')
  for split in ('prefs', 'rest'):
    write(tmp_path, f'{split}/data-00000-of-00001.arrow', split)
    write(tmp_path, f'{split}/cache-17.arrow', 'of an earlier map')
    state = {'_data_files': [{'filename': 'data-00000-of-00001.arrow'}]}
    (tmp_path / split / 'state.json').write_text(json.dumps(state))
    (tmp_path / split / 'dataset_info.json').write_text('{}')
  assert texts(f'hf:{tmp_path}:prefs') == ['prefs']


README = """---
license: mit
configs:
- config_name: plain
  data_files:
  - split: train
    path: plain/*.jsonl
- config_name: hard
  data_files:
  - split: train
    path: [hard/a.jsonl, hard/b.jsonl]
  - split: test
    path: hard/c.jsonl
---
# A set
"""


def test_configurations_of_the_readme(tmp_path):
  (tmp_path / 'README.md').write_text(README)
  for name in ('plain/x', 'hard/a', 'hard/b', 'hard/c'):
    write(tmp_path, f'{name}.jsonl', name)
  assert texts(f'hf:{tmp_path}:plain') == ['plain/x']
  assert texts(f'hf:{tmp_path}:hard:train') == ['hard/a', 'hard/b']
  assert texts(f'hf:{tmp_path}:test') == ['hard/c']  # only one configuration has it
  with pytest.raises(DataError, match=r"configurations \['hard', 'plain'\]; give hf:FOLDER:CONFIG"):
    open_source(f'hf:{tmp_path}')
  with pytest.raises(DataError, match=r"no configuration 'hart'.*did you mean 'hard'"):
    open_source(f'hf:{tmp_path}:hart:train')
  (tmp_path / 'README.md').write_text('---\nconfigs: [}\n---\n')
  with pytest.raises(DataError, match=r'README.md: its header is not YAML'):
    open_source(f'hf:{tmp_path}')


def test_a_folder_without_data(tmp_path):
  (tmp_path / 'notes.txt').write_text('nothing')
  with pytest.raises(DataError, match=r"holds no .parquet.*it holds \['notes.txt'\]"):
    open_source(f'hf:{tmp_path}')
  with pytest.raises(DataError, match='no such folder'):
    open_source('hf:/no/such/folder')


def test_the_hub_is_asked_for_what_is_not_here(tmp_path, monkeypatch):
  import huggingface_hub

  write(tmp_path, 'train.jsonl', 'a')
  asked = []

  def download(name, **options):
    asked.append((name, options))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert texts('hf:some/pairs:train?revision=v2') == ['a']
  assert asked == [('some/pairs', {'repo_type': 'dataset', 'revision': 'v2'})]
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *_, **__: 1 / 0)
  with pytest.raises(DataError, match=r"no folder 'some/pairs' here, and the hub does not give it"):
    open_source('hf:some/pairs')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(DataError, match=r'pip install jaxpref\[hub\]'):
    folders.find('some/pairs')
