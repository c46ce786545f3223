"""tools/check_imports.py passes on the tree, and sees each kind of violation."""

from pathlib import Path

import pytest

from tools.check_imports import check

ROOT = Path(__file__).parent.parent


def test_the_tree_keeps_the_order():
  assert check(ROOT) == []


@pytest.mark.parametrize(
  'path, line, complaint',
  [
    ('masked.py', 'import jaxpref.train.step', 'jaxpref.train is above jaxpref.masked'),
    ('masked.py', 'from jaxpref import train', 'jaxpref.train is above jaxpref.masked'),
    ('models/hf.py', 'from ..data import load', 'jaxpref.data is above jaxpref.models'),
    ('train/step.py', 'from flax import nnx', 'only models/ imports flax.nnx'),
    ('train/step.py', 'import flax.nnx as nnx', 'only models/ imports flax.nnx'),
    ('objectives/dpo.py', 'import optax', 'objectives may import only chex, jax'),
    ('objectives/dpo.py', 'from jaxpref.models import init', 'jaxpref.models is above'),
    ('cli/main.py', 'from experiments import quickstart', 'experiments/ stands above'),
    ('novelty.py', 'import jax', 'novelty has no layer'),
  ],
)
def test_a_violation_is_named_by_file_and_line(tmp_path, path, line, complaint):
  file = tmp_path / 'jaxpref' / path
  file.parent.mkdir(parents=True)
  file.write_text(f'{line}\n')
  (found,) = check(tmp_path)
  assert found.startswith(f'jaxpref/{path}:1: ')
  assert complaint in found


@pytest.mark.parametrize(
  'path, line',
  [
    ('masked.py', 'import jax.numpy as jnp'),
    ('models/transformer.py', 'from flax import nnx'),
    ('models/hf.py', 'from . import transformer'),
    ('objectives/dpo.py', 'from jaxpref import masked'),
    ('objectives/dpo.py', 'from jaxpref.objectives.base import objective'),
    ('objectives/dpo.py', 'import functools'),
    ('cli/main.py', 'from jaxpref.train import loop'),
  ],
)
def test_what_the_order_allows_passes(tmp_path, path, line):
  file = tmp_path / 'jaxpref' / path
  file.parent.mkdir(parents=True)
  file.write_text(f'{line}\n')
  assert check(tmp_path) == []
