"""SentencePiece `.model` files as `tokenizers` backends, without the sentencepiece package.

The file is a protobuf: pieces with scores, what trained them, how text is normalised. BPE and
unigram models are read; the ids of a text are those that SentencePiece gives it, but for this,
which transformers does too:
- control symbols written out in a text ('</s>') are read as such;
- a text that begins with a user-defined symbol gets no dummy prefix before it;
- a model that normalises text (not 'identity') loses combining marks that nothing composes with;
- a unigram model with byte pieces reads the text '<0x0A>' as that piece.

Fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_TYPES = {1: 'unigram', 2: 'bpe', 3: 'word', 4: 'char'}
_SPACE = '▁'


class Piece(NamedTuple):
  text: str
  score: float
  type: int


class Model(NamedTuple):
  """What of a model file decides about ids."""

  pieces: tuple[Piece, ...]  # a piece's place is its id
  type: str  # 'bpe' or 'unigram'
  byte_fallback: bool
  unk_id: int
  special: Mapping[str, str]  # 'bos_token' -> '<s>'
  charsmap: bytes  # a compiled normalisation, empty for none
  dummy_prefix: bool  # a text gets a space before it
  collapse_spaces: bool  # runs of spaces become one, those at the ends none


def parse(content: bytes) -> Model:
  """Reads the protobuf; raises ValueError where it is none or of a type that is not supported."""
  try:
    model = dict(_repeated(content))
    pieces = tuple(_piece(dict(_fields(piece))) for piece in model.get(1, []))
    trainer = dict(_fields(b''.join(model.get(2, []))))
    normalizer = dict(_fields(b''.join(model.get(3, []))))
    if not pieces:
      raise ValueError('it has no pieces')
    kind = _TYPES.get(trainer.get(3, 1), 'unknown')
    if kind not in ('unigram', 'bpe'):
      raise ValueError(f'it is a {kind} model; expected bpe or unigram')
    if trainer.get(24) or not normalizer.get(5, 1):
      raise ValueError('it marks spaces after words or not at all; expected a mark before words')
    if any(piece.type == _UNUSED for piece in pieces):
      raise ValueError('it has unused pieces, whose text is split again; none are supported')
    ids = {'bos': trainer.get(41, 1), 'eos': trainer.get(42, 2), 'pad': trainer.get(43, -1)}
    ids['unk'] = trainer.get(40, 0)
    special = {
      f'{role}_token': pieces[i].text
      for role, i in ids.items()
      if 0 <= i < len(pieces) and pieces[i].type in (_UNKNOWN, _CONTROL)
    }
    return Model(
      pieces=pieces,
      type=kind,
      byte_fallback=bool(trainer.get(35, 0)),
      unk_id=ids['unk'],
      special=special,
      charsmap=normalizer.get(2, b''),
      dummy_prefix=bool(normalizer.get(3, 1)),
      collapse_spaces=bool(normalizer.get(4, 1)),
    )
  except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
    raise ValueError(f'not a SentencePiece model that can be read: {error}') from error


def convert(model: Model, *, prefix_every_part: bool = False) -> tokenizers.Tokenizer:
  """The same model in the `tokenizers` library.

  `prefix_every_part` puts the dummy prefix after every special token too, not only at the start of
  the text: the 'legacy' behaviour of transformers' Llama tokenizers.
  """
  if model.type == 'bpe':
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    core: models.Model = models.BPE(
      vocab,
      _merges(model.pieces, vocab),
      unk_token=model.pieces[model.unk_id].text,
      fuse_unk=True,
      byte_fallback=model.byte_fallback,
    )
  else:
    core = models.Unigram(
      [(piece.text, piece.score) for piece in model.pieces], model.unk_id, model.byte_fallback
    )
  backend = tokenizers.Tokenizer(core)
  prefix = model.dummy_prefix
  once = prefix and not prefix_every_part
  steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
  if model.collapse_spaces:
    steps.append(normalizers.Replace(tokenizers.Regex(' {2,}'), ' '))
    steps.append(normalizers.Replace(tokenizers.Regex(rf'[ {_SPACE}]+\z'), ''))
    if not once:
      steps.append(normalizers.Replace(tokenizers.Regex(r'\A '), ''))
  else:
    steps.append(normalizers.Replace(' ', _SPACE))
  if prefix and not once:
    steps.append(normalizers.Prepend(_SPACE))
  backend.normalizer = normalizers.Sequence(steps)
  # Metaspace adds no mark to a text that starts with it. That is right where spaces are collapsed:
  # one stays in front, and is the prefix. Elsewhere spaces are '▁' by now, and every text gets one.
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Metaspace(' ', 'first' if once else 'never', split=False),
      pre_tokenizers.Metaspace(_SPACE, 'never', split=False),
    ]
  )
  spaces: list[Any] = [decoders.Replace(_SPACE, ' ')]
  bytes_: list[Any] = [decoders.ByteFallback()] if model.byte_fallback else []
  strip: list[Any] = [decoders.Strip(' ', 1, 0)] if prefix else []
  backend.decoder = decoders.Sequence([*spaces, *bytes_, decoders.Fuse(), *strip])
  backend.add_tokens(
    [
      tokenizers.AddedToken(piece.text, normalized=False, special=piece.type != _USER_DEFINED)
      for piece in model.pieces
      if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
  )
  return backend


def _merges(pieces: tuple[Piece, ...], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
  """Every way to make a piece of two, best score first.

  SentencePiece merges the leftmost of equal scores. Runs of spaces all share one score, so it grows
  the run on the left: the longer left part comes first.
  """
  normal = {piece.text for piece in pieces if piece.type == _NORMAL}
  found = []
  for piece in pieces:
    if piece.type == _NORMAL:
      for i in range(1, len(piece.text)):
        left, right = piece.text[:i], piece.text[i:]
        if left in normal and right in normal:
          found.append((-piece.score, -i, -len(right), vocab[piece.text], left, right))
  return [(left, right) for *_, left, right in sorted(found)]


def _piece(fields: Mapping[int, Any]) -> Piece:
  (score,) = struct.unpack('<f', fields.get(2, bytes(4)))
  return Piece(fields[1].decode(), score, fields.get(3, _NORMAL))


def _repeated(content: bytes) -> Iterator[tuple[int, list[Any]]]:
  values: dict[int, list[Any]] = {}
  for number, value in _fields(content):
    values.setdefault(number, []).append(value)
  yield from values.items()


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
  """Field number and value (int, or bytes: nested messages, strings and floats) in file order."""
  at = 0
  while at < len(content):
    tag, at = _varint(content, at)
    number, wire = tag >> 3, tag & 7
    if wire == 0:
      value, at = _varint(content, at)
      yield number, value - 2**64 if value >= 2**63 else value
      continue
    if wire == 2:
      size, at = _varint(content, at)
    elif wire in (1, 5):
      size = 8 if wire == 1 else 4
    else:
      raise ValueError(f'byte {at}: no field begins here')
    if at + size > len(content):
      raise ValueError(f'byte {at}: a field of {size} bytes, but {len(content) - at} are left')
    yield number, content[at : at + size]
    at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(content):
      raise ValueError('it ends within a number')
    byte = content[at]
    at += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at
  raise ValueError(f'byte {at}: a number of more than ten bytes')
