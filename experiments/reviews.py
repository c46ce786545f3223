"""A small world of film reviews in which the truth is known.

The controlled-sentiment setting of Direct Preference Optimization (https://arxiv.org/abs/2305.18290,
section 6) needs a reward that can be evaluated on every text. Here a grammar writes the reviews and
the same grammar reads them back, so the sentiment of a text is a fact and not a classifier's guess:

  review    = statement '.' [ ' ' remark '.' ]            (read back: any sentences in any order)
  statement = opening verb predicate [ ',' ('and' | 'but') 'the' aspect verb predicate ]
  predicate = [ negation ] [ degree ] adjective | neutral phrase

A prompt is an opening, with its verb or without. Adjectives and remarks are graded in [-1, 1],
degrees scale an adjective and negation turns it half round ("not great" is milder than "bad").
Every draw is a pure function of (seed, stream, index), so nothing is downloaded or stored.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

ASPECTS = (
  *('acting', 'plot', 'script', 'cast', 'music', 'ending', 'dialogue', 'pacing'),
  *('story', 'humour', 'villain', 'sound', 'romance', 'setting', 'hero', 'camera work'),
)
OPENINGS = (
  'The {}',
  'The {} of this film',
  'In this film the {}',
  'I thought the {}',
  'To me the {}',
  'My friends said the {}',
  'This time the {}',
  'For most of it the {}',
)
VERBS = ('is', 'was', 'felt', 'seemed')
ADJECTIVES = {
  **dict.fromkeys(('superb', 'brilliant', 'wonderful'), 0.8),
  **dict.fromkeys(('great', 'charming', 'clever'), 0.6),
  **dict.fromkeys(('good', 'warm', 'sharp'), 0.4),
  **dict.fromkeys(('fine', 'decent', 'neat'), 0.2),
  **dict.fromkeys(('plain', 'odd', 'thin'), -0.2),
  **dict.fromkeys(('weak', 'flat', 'slow'), -0.4),
  **dict.fromkeys(('bad', 'dull', 'clumsy'), -0.6),
  **dict.fromkeys(('awful', 'dreadful', 'horrible'), -0.8),
}
DEGREES = {'fairly': 0.6, 'rather': 0.8, '': 1.0, 'really': 1.1, 'truly': 1.25}
NEGATIONS = {'': 1.0, 'not': -0.5, 'hardly': -0.6}
NEUTRAL = ('what I expected', 'a matter of taste', 'much like the book', 'neither good nor bad')
REMARKS = {
  **{'We all loved it': 0.8, 'I want my money back': -0.8},
  **{'I would see it again': 0.6, 'I left early': -0.6},
  **{'It made me smile': 0.4, 'I fell asleep': -0.4},
  **{'It is worth a look': 0.2, 'My mind wandered': -0.2},
  **{'It runs for two hours': 0.0, 'I saw it on a plane': 0.0, 'It was made in Spain': 0.0},
}
GARBLED = -1.0  # a text outside the world scores as the worst review, so gibberish cannot pay

SPLIT, CORPUS, LABELS = range(3)  # streams of random numbers


@dataclasses.dataclass(frozen=True)
class Review:
  """A review cut after its opening; `prompt + completion` is the text."""

  prompt: str
  completion: str


def draws(seed: int, stream: int, index: int = 0) -> np.random.Generator:
  """Random numbers of one item, whatever else was drawn: a counter-based generator, keyed."""
  return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


def prompts(seed: int = 0, held_out: float = 0.25) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """All openings of the world in two disjoint parts, (train, held out), each shuffled.

  The parts share no (opening, aspect): a held-out prompt is a new combination of known words, not
  a known combination with another verb.
  """
  heads = [opening.format(aspect) for opening in OPENINGS for aspect in ASPECTS]
  rng = draws(seed, SPLIT)
  rng.shuffle(heads)
  border = round(len(heads) * held_out)
  parts = [
    [f'{head} {verb}'.strip() for head in part for verb in ('', *VERBS)]
    for part in (heads[border:], heads[:border])
  ]
  for part in parts:
    rng.shuffle(part)
  return tuple(parts[0]), tuple(parts[1])


def corpus(openings: Sequence[str], size: int, seed: int = 0) -> list[Review]:
  """`size` reviews over the given prompts, neutral on average; the i-th depends on (seed, i)."""
  return [_review(draws(seed, CORPUS, i), openings) for i in range(size)]


def score(text: str) -> float:
  """The true sentiment of a text in [-1, 1]: the mean over its different opinions.

  A mean, and each opinion counted once, so neither length nor repetition pays. A text that the
  grammar does not read to its end (unknown words, broken order, no full stop) gets `GARBLED`.
  """
  opinions = _opinions(text)
  return GARBLED if opinions is None else sum(opinions.values()) / len(opinions)


def in_world(text: str) -> bool:
  """Whether the grammar reads every sentence of the text."""
  return _opinions(text) is not None


def prefer(scores_a, scores_b, temperature: float, seed: int = 0) -> np.ndarray:
  """Bradley-Terry labels: True where a is preferred, P = σ((score_a - score_b) / temperature)."""
  margin = (np.asarray(scores_a, np.float64) - np.asarray(scores_b, np.float64)) / temperature
  chance = 0.5 * (1 + np.tanh(margin / 2))  # the sigmoid, without overflow
  return draws(seed, LABELS).random(margin.shape) < chance


def _review(rng: np.random.Generator, openings: Sequence[str]) -> Review:
  """One review in a mood of its own, so that reviews differ more than the opinions inside one."""
  mood = rng.uniform(-0.9, 0.9)
  prompt = _pick(rng, openings)
  words = [] if prompt.endswith(VERBS) else [_pick(rng, VERBS)]
  first = _predicate(rng, mood)
  text = ' '.join((*words, first))
  if rng.random() < 0.3:
    second = _predicate(rng, mood if rng.random() < 0.5 else -mood)
    joint = 'but' if _grade(first) * _grade(second) < 0 else 'and'
    text += f', {joint} the {_pick(rng, ASPECTS)} {_pick(rng, VERBS)} {second}'
  text += '.'
  if rng.random() < 0.4:
    text += f' {_near(rng, REMARKS, mood)}.'
  return Review(prompt, f' {text}')


def _predicate(rng: np.random.Generator, mood: float) -> str:
  if rng.random() < 0.15:
    return _pick(rng, NEUTRAL)
  negation = rng.choice(list(NEGATIONS), p=(0.8, 0.1, 0.1))
  degree = rng.choice(list(DEGREES), p=(0.1, 0.1, 0.6, 0.1, 0.1))
  adjective = _near(rng, ADJECTIVES, mood * np.sign(NEGATIONS[negation]))
  return ' '.join(word for word in (negation, degree, adjective) if word)


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
  return items[rng.integers(len(items))]


def _near(rng: np.random.Generator, graded: dict[str, float], mood: float) -> str:
  """A phrase whose grade is near the mood, with some spread."""
  weights = np.exp(-0.5 * ((np.array(list(graded.values())) - mood) / 0.35) ** 2)
  return str(rng.choice(list(graded), p=weights / weights.sum()))


def _either(phrases) -> str:
  return '|'.join(re.escape(phrase) for phrase in phrases if phrase)


_PREDICATE = re.compile(
  f'(?:(?P<negation>{_either(NEGATIONS)}) )?(?:(?P<degree>{_either(DEGREES)}) )?'
  f'(?P<adjective>{_either(ADJECTIVES)})'
)
_SUBJECT = f'(?:{_either(ASPECTS)})'
_OPENING = '|'.join(opening.format(_SUBJECT) for opening in OPENINGS)
_PHRASE = f'(?:{_either(NEUTRAL)}|{re.sub("[?]P<[a-z]+>", "?:", _PREDICATE.pattern)})'
_VERB = f'(?:{_either(VERBS)})'
_STATEMENT = re.compile(
  f'(?P<opening>{_OPENING}) {_VERB} (?P<first>{_PHRASE})'
  f'(?:, (?:and|but) the (?P<other>{_SUBJECT}) {_VERB} (?P<second>{_PHRASE}))?'
)


def _grade(predicate: str) -> float:
  if predicate in NEUTRAL:
    return 0.0
  words = _PREDICATE.fullmatch(predicate).groupdict('')
  return NEGATIONS[words['negation']] * DEGREES[words['degree']] * ADJECTIVES[words['adjective']]


def _opinions(text: str) -> dict[str, float] | None:
  """Every different opinion of a text with its grade; None for a text outside the world.

  Opinions differ when they are about another aspect or say something else of it.
  """
  *sentences, rest = re.split(r'\.(?: (?=.)|$)', text)
  found: dict[str, float] = {}
  for sentence in sentences:
    statement = _STATEMENT.fullmatch(sentence)
    if sentence in REMARKS:
      found[sentence] = REMARKS[sentence]
    elif statement:
      opening, first, other, second = statement.group('opening', 'first', 'other', 'second')
      (subject,) = re.findall(_SUBJECT, opening)
      found[f'{subject}: {first}'] = _grade(first)
      if second:
        found[f'{other}: {second}'] = _grade(second)
    else:
      return None
  return found if found and not rest else None
