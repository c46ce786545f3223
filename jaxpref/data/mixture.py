"""Mixtures of data sets: '0.7*jsonl:a.jsonl + 0.3*jsonl:b.jsonl', with ' + ' between the sources.

The weights are shares of what training sees, whatever the sizes of the sources. No example comes
twice in a pass: a pass is as long as the source that runs out first allows, and takes of every
other source as many examples as its share is, chosen by the seed alone. Without weights ('a + b')
a pass holds all of every source.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxpref.data.files import DataError

_PLUS = re.compile(r'\s+\+\s+')
_WEIGHT = re.compile(r'\s*([0-9.]+(?:e-?\d+)?)\s*\*\s*(?=.)')


class Term(NamedTuple):
  """One source of a mixture."""

  weight: float | None  # None: all of it
  source: str


def parse(text: str) -> tuple[Term, ...]:
  """The terms of a mixture; one without weight is a plain source."""
  terms = []
  for part in _PLUS.split(text.strip()):
    weight = _WEIGHT.match(part)
    if weight:
      terms.append(Term(_weight(text, weight[1]), part[weight.end() :]))
    else:
      terms.append(Term(None, part))
  weighted = [term.weight is not None for term in terms]
  if any(weighted) and not all(weighted):
    raise DataError(f'{text!r}: give every source of a mixture a weight, or none')
  if len(terms) == 1:
    return (Term(None, terms[0].source),)  # all of a mixture of one
  return tuple(terms)


def choose(sizes: Sequence[int], terms: Sequence[Term], seed: int) -> list[np.ndarray]:
  """For every source the indices of its examples that are in the mixture, ascending."""
  if terms[0].weight is None:
    return [np.arange(size) for size in sizes]
  length = min(size / term.weight for size, term in zip(sizes, terms, strict=True) if term.weight)
  chosen = []
  for number, (size, term) in enumerate(zip(sizes, terms, strict=True)):
    count = min(size, max(1, round(length * (term.weight or 0))))
    order = np.random.Generator(np.random.Philox(key=[seed, number])).permutation(size)
    chosen.append(np.sort(order[:count]))
  return chosen


def check_alike(terms: Sequence[Term], found: Sequence[tuple[str, Sequence[str]]]) -> None:
  """DataError unless all sources were read as one kind and with the same numbers (extras)."""
  for term, (kind, extras) in zip(terms, found, strict=True):
    if kind != found[0][0]:
      raise DataError(
        f'a mixture holds one kind of data: {terms[0].source!r} is {found[0][0]}, '
        f"{term.source!r} is {kind}; config.data.kind='sft', say, reads both alike"
      )
    if odd := sorted(set(extras) ^ set(found[0][1])):
      has, lacks = (term, terms[0]) if odd[0] in extras else (terms[0], term)
      raise DataError(
        f'a mixture holds the same numbers everywhere: {has.source!r} has {odd[0]!r}, '
        f'{lacks.source!r} has not; leave it out with {has.source}?{odd[0]}='
      )


def _weight(text: str, number: str) -> float:
  try:
    weight = float(number)
  except ValueError:
    weight = 0.0
  if not weight > 0:
    raise DataError(f'{text!r}: a weight should be a positive number, got {number!r}')
  return weight
