"""Holds the order of the layers: a module of jaxpref imports only from layers below its own.

  python -m tools.check_imports [root]

Prints every violation as file:line and exits with 1. A new module needs a place in LAYERS.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# Bottom to top; modules of one layer may import one another.
LAYERS = (
  ('typing', 'masked', 'storage'),
  ('objectives', 'advantages', 'oracle'),
  ('sharding',),
  ('models',),
  ('log_probs', 'hosts'),
  ('stops', 'sampling', 'decoding', 'generation', 'rewards'),
  ('data', 'rollout'),
  ('config',),
  ('train',),
  ('evals', 'sweeps'),
  ('limits', 'offline', 'online', 'program', 'roles', 'run'),
  ('plan', 'launch'),
  ('cli',),
)
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
ORDER = ' < '.join(' '.join(layer) for layer in LAYERS)

# Stricter than the order: a loss is mathematics, so all that it may import is named.
ONLY = {
  'objectives': {'jax', 'chex', 'numpy', 'jaxpref.typing', 'jaxpref.masked', 'jaxpref.objectives'},
  'advantages': {'jax', 'chex', 'numpy', 'jaxpref.typing', 'jaxpref.masked', 'jaxpref.advantages'},
}
ABOVE = {'experiments', 'configs', 'tools', 'tests'}


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
  """Yields (line, dotted name) of each import at any depth, relative ones resolved in `package`.

  For `from a import b` the name is `a.b`, as b may be a module.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      parts = [*base, *([node.module] if node.module else [])]
      yield from ((node.lineno, '.'.join([*parts, alias.name])) for alias in node.names)


def complaint(module: str, name: str) -> str | None:
  """What is wrong with top-level module `module` importing the dotted `name`; None if nothing."""
  first, *rest = name.split('.')
  if first in ABOVE:
    return f'{first}/ stands above the package, which imports nothing from it'
  if name.startswith('flax.nnx') and module != 'models':
    return 'only models/ imports flax.nnx; elsewhere a model is a pytree and pure functions'
  target = rest[0] if first == 'jaxpref' and rest else None
  if target in LEVEL and LEVEL[target] > LEVEL[module]:
    return f'jaxpref.{target} is above jaxpref.{module}; the order is {ORDER}'
  root = f'jaxpref.{target}' if target else first
  if module in ONLY and root not in ONLY[module] and root not in sys.stdlib_module_names:
    return f'{module} may import only {", ".join(sorted(ONLY[module]))} and the standard library'
  return None


def check(root: Path) -> list[str]:
  """Returns 'file:line: message' for each import below `root`/jaxpref that breaks a rule."""
  found = []
  for path in sorted((root / 'jaxpref').rglob('*.py')):
    where = path.relative_to(root)
    package = where.parts[:-1]
    module = where.parts[1] if len(where.parts) > 2 else where.stem
    if module == '__init__':
      module = 'typing'  # the package itself loads everything else lazily, by name
    if module not in LEVEL:
      found.append(
        f'{where}:1: {module} has no layer; give it one in LAYERS of {__name__}: {ORDER}'
      )
      continue
    for line, name in imported(ast.parse(path.read_text(), str(path)), package):
      if wrong := complaint(module, name):
        found.append(f'{where}:{line}: imports {name}: {wrong}')
  return found


def main() -> int:
  root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
  found = check(root)
  print('\n'.join(found), end='\n' if found else '')
  return bool(found)


if __name__ == '__main__':
  sys.exit(main())
