"""Writes configs/tiny_pairs.jsonl: preference pairs of the review world, for the `tiny` presets.

python -m tools.make_tiny_pairs
"""

import json
import pathlib

from experiments import reviews

PAIRS = 400
TEMPERATURE = 0.2  # of the Bradley-Terry labels, in units of the score
PATH = pathlib.Path(__file__).parent.parent / 'configs' / 'tiny_pairs.jsonl'


def main() -> None:
  openings, _ = reviews.prompts()
  by_prompt: dict[str, list[str]] = {}
  for review in reviews.corpus(openings, 40 * PAIRS):
    by_prompt.setdefault(review.prompt, []).append(review.completion)
  pairs = [(p, c[0], c[1]) for p, c in sorted(by_prompt.items()) if len(set(c[:2])) == 2][:PAIRS]
  first = [reviews.score(p + a) for p, a, _ in pairs]
  second = [reviews.score(p + b) for p, _, b in pairs]
  wins = reviews.prefer(first, second, TEMPERATURE)
  with PATH.open('w', encoding='utf-8') as out:
    for (prompt, a, b), win in zip(pairs, wins, strict=True):
      better, worse = (a, b) if win else (b, a)
      print(json.dumps({'prompt': prompt, 'chosen': better, 'rejected': worse}), file=out)


if __name__ == '__main__':
  main()
