"""Stop strings for samplers of tokens: what ends a completion wherever token borders fall.

A stop string may span tokens, and begin and end in the middle of one. `automaton` reads tokens as
the bytes that they add to a text, so the sampler finds it on the device, token by token.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxpref.typing import AnyArray, Array


def automaton(stop: Sequence[str], pieces: Sequence[bytes]) -> np.ndarray:
  """The moves of the automaton that looks for `stop` in a text's bytes: int32 [S, V].

  A state is the longest end of the text so far with which a stop string begins; 0 is none, S - 1
  that a stop string has come, and it stays. After token v in state s comes state [s, v].

  See "Efficient String Matching: An Aid to Bibliographic Search", Aho and Corasick:
  https://doi.org/10.1145/360825.360855.

  Args:
    stop: strings, none of them empty.
    pieces: V, what each token adds to a text.

  Raises:
    ValueError: an empty stop string.
  """
  check(stop)
  words = [text.encode() for text in stop]
  begun = sorted({word[:n] for word in words for n in range(len(word))}, key=len)
  number = {prefix: state for state, prefix in enumerate(begun)}
  found = len(begun)

  def after(text: bytes) -> int:
    if text.endswith(tuple(words)):
      return found
    return next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)

  read = np.full((found + 1, 256), found, np.int32)
  for prefix, state in number.items():
    read[state] = [after(prefix + bytes([byte])) for byte in range(256)]
  states = np.repeat(np.arange(found + 1, dtype=np.int32)[:, None], len(pieces), axis=1)
  lengths = np.array([len(piece) for piece in pieces], int)
  for n in range(max(lengths, default=0)):
    longer = np.flatnonzero(lengths > n)
    states[:, longer] = read[states[:, longer], [pieces[v][n] for v in longer.tolist()]]
  return states


def check(stop: Sequence[str]) -> None:
  """Raises ValueError unless `stop` is a list of strings of at least one character."""
  if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
    raise ValueError(f'stop strings are a list of texts that are not empty, got {stop!r:.200}')


def follow(moves: AnyArray | None, states: Array, tokens: Array) -> tuple[Array, Array]:
  """(states [B] after `tokens` int32 [B], which of them hold a stop string, bool [B]).

  `moves` are an automaton's; None looks for nothing. Tokens beyond it add nothing to a text.
  """
  if moves is None:
    return states, jnp.zeros(states.shape, bool)
  S, V = moves.shape
  moved = jnp.asarray(moves)[states, jnp.minimum(tokens, V - 1)]
  states = jnp.where(tokens < V, moved, states)
  return states, states == S - 1


def find(text: str, stop: Sequence[str]) -> int | None:
  """Where the earliest stop string begins, or None."""
  return min((at for at in map(text.find, stop) if at >= 0), default=None)
