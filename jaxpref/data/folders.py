"""Hugging Face data set folders: which files make up a configuration and a split.

As the datasets library finds them, from what there is: `configs` in the README's header;
dataset_dict.json and state.json of `save_to_disk`; else the files' names, where
'train_prefs-00000-of-00002.parquet', 'valid.jsonl' and 'test/part.csv' name their split.
(https://huggingface.co/docs/hub/datasets-data-files-configuration)
"""

import difflib
import fnmatch
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jaxpref.data import files
from jaxpref.data.files import DataError

_ALIASES = {'valid': 'validation', 'val': 'validation', 'dev': 'validation'}
_WORDS = ('train', 'test', 'validation', 'valid', 'val', 'dev')
_WORD = re.compile(rf'(?:^|[-._ /])({"|".join(_WORDS)})(?=$|[-._ /0-9])', re.IGNORECASE)
_SHARD = re.compile(r'(?:^|/)(\w[\w.-]*?)-\d{5}-of-\d{5}(?:[-.]|$)')
Splits = dict[str, tuple[str, ...]]


def find(spec: str, revision: str | None = None) -> tuple[str, ...]:
  """The files of 'FOLDER[:CONFIG][:SPLIT]'; the split may be left out where there is 'train'.

  A FOLDER that is not there but looks like NAME or ORG/NAME is fetched from the hub.
  """
  name, *choice = spec.split(':')
  if len(choice) > 2 or not name:
    raise DataError(f"expected 'hf:FOLDER[:CONFIG][:SPLIT]', got 'hf:{spec}'")
  root = pathlib.Path(name).expanduser()
  if not root.is_dir():
    root = _download(name, revision)
  configs = _configs(root)
  return _choose(f'hf:{spec}', configs, choice)


def _choose(spec: str, configs: Mapping[str, Splits], choice: list[str]) -> tuple[str, ...]:
  names = [name for name in choice if name]
  config = names.pop(0) if names and (len(names) == 2 or names[0] in configs) else None
  if config is None:
    fits = [c for c, splits in configs.items() if not names or names[0] in splits]
    fits = [c for c in fits if c == 'default'] or fits
    if len(fits) > 1:
      raise DataError(f'{spec!r} has the configurations {sorted(configs)}; give hf:FOLDER:CONFIG')
    config = fits[0] if fits else next(iter(configs))
  split = names[0] if names else 'train'
  splits = configs.get(config)
  if splits is None or (split not in splits and (names or len(splits) > 1)):
    known = configs if splits is None else splits
    wanted = config if splits is None else split
    near = difflib.get_close_matches(wanted, known, 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    kind = 'configuration' if splits is None else 'split'
    raise DataError(f'{spec!r} has no {kind} {wanted!r}; it has {sorted(known)}{hint}')
  return splits[split] if split in splits else next(iter(splits.values()))


def _configs(root: pathlib.Path) -> dict[str, Splits]:
  """Configuration -> split -> paths; DataError where the folder holds no data."""
  there = sorted(
    path.relative_to(root).as_posix()
    for path in root.rglob('*')
    if path.is_file() and not any(part.startswith('.') for part in path.relative_to(root).parts)
  )
  data = [p for p in there if files.form_of(p) and files.form_of(p) != 'text' and not _meta(p)]
  if not data:
    raise DataError(
      f'{str(root)!r} holds no .parquet, .arrow, .jsonl, .json, .csv or .tsv file; it holds '
      f'{files.short(there)}'
    )
  configs = _declared(root, data) or {'default': _by_name(root, data)}
  return {
    config: {split: tuple(str(root / p) for p in paths) for split, paths in splits.items()}
    for config, splits in configs.items()
  }


def _meta(path: str) -> bool:
  name = path.rpartition('/')[2]
  return name in ('dataset_dict.json', 'dataset_info.json', 'dataset_infos.json', 'state.json')


def _declared(root: pathlib.Path, data: Sequence[str]) -> dict[str, Splits]:
  """What the YAML header of README.md declares."""
  readme = root / 'README.md'
  text = readme.read_text(errors='replace') if readme.is_file() else ''
  header = re.match(r'---\s*\n(.*?)\n---', text, re.DOTALL)
  try:
    declared = (yaml.safe_load(header[1]) or {}).get('configs') if header else None
  except (yaml.YAMLError, AttributeError) as error:
    raise DataError(f'{readme}: its header is not YAML: {files.short(str(error))}') from error
  configs: dict[str, Splits] = {}
  for entry in declared if isinstance(declared, list) else []:
    if not isinstance(entry, dict) or 'config_name' not in entry:
      raise DataError(f'{readme}: configs should hold config_name and data_files, got {entry!r}')
    base = str(entry.get('data_dir', '')).strip('/')
    inside = [p for p in data if not base or p.startswith(f'{base}/')]
    splits = {split: _matching(inside, pattern, base) for split, pattern in _patterns(entry)}
    splits = {split: paths for split, paths in splits.items() if paths}
    configs[str(entry['config_name'])] = splits or _by_name(root, inside)
  return {name: splits for name, splits in configs.items() if splits}


def _patterns(entry: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
  given = entry.get('data_files') or []
  given = given if isinstance(given, list) else [given]
  if all(isinstance(one, str) for one in given):
    return [('train', given)] if given else []
  found = []
  for one in given:
    path = one.get('path', []) if isinstance(one, dict) else one
    split = str(one.get('split', 'train')) if isinstance(one, dict) else 'train'
    found.append((split, path if isinstance(path, list) else [str(path)]))
  return found


def _matching(data: Sequence[str], patterns: Sequence[str], base: str) -> tuple[str, ...]:
  whole = [f'{base}/{p}' if base else p for p in patterns]
  return tuple(p for p in data if any(fnmatch.fnmatch(p, pattern) for pattern in whole))


def _by_name(root: pathlib.Path, data: Sequence[str]) -> Splits:
  saved = (root / 'dataset_dict.json').is_file()
  splits: dict[str, list[str]] = {}
  for path in data:
    splits.setdefault(path.partition('/')[0] if saved else _split_of(path), []).append(path)
  return {split: _in_order(root, paths) for split, paths in splits.items()}


def _split_of(path: str) -> str:
  shard = _SHARD.search(path)
  if shard and shard[1] != 'data':
    return shard[1]
  words = _WORD.findall(path)
  word = words[-1].lower() if words else 'train'
  return _ALIASES.get(word, word)


def _in_order(root: pathlib.Path, paths: Sequence[str]) -> tuple[str, ...]:
  """As state.json of `save_to_disk` lists them; it leaves out files of an earlier save."""
  state = (root / paths[0]).parent / 'state.json'
  if not state.is_file():
    return tuple(paths)
  try:
    named = [entry['filename'] for entry in json.loads(state.read_bytes())['_data_files']]
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f'{state}: expected _data_files with a filename each: {error!r}') from error
  folder = (root / paths[0]).parent.relative_to(root)
  return tuple((folder / name).as_posix() for name in named)


def _download(name: str, revision: str | None) -> pathlib.Path:
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
    raise DataError(f'no such folder: {name!r} (in {pathlib.Path.cwd()})')
  try:
    import huggingface_hub
  except ImportError as error:
    raise DataError(
      f'no folder {name!r} here, and reading it from the hub needs `pip install jaxpref[hub]`'
    ) from error
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, repo_type='dataset', revision=revision)
    )
  except Exception as error:  # offline, not found, gated: its kinds change between versions
    raise DataError(
      f'no folder {name!r} here, and the hub does not give it: {type(error).__name__}: '
      f'{files.short(str(error))}'
    ) from error
