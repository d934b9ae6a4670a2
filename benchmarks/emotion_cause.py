"""Write the documents of the chain `emotion-cause`: short texts in clauses, each with its emotions' causes.

    python benchmarks/emotion_cause.py -o src/factorllm/measure/chain/emotion-cause.jsonl

All are made from the templates below, which were written for this; the same seed makes the same documents.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

DOCUMENTS = 50
SEED = 17

# (what happened, how it felt): {0} is the person
EVENTS = {
    "joy": [
        ("{0} won the first prize", "{0} was full of joy"),
        ("{0}'s brother came home at last", "{0} laughed and danced"),
        ("the school gave {0} a new bicycle", "{0} could not stop smiling"),
        ("{0} passed the last exam", "{0} was very happy"),
    ],
    "sadness": [
        ("{0}'s old dog died in the night", "{0} wept for hours"),
        ("{0}'s best friend moved to another country", "{0} felt sad and alone"),
        ("the house where {0} grew up burnt down", "{0} was in tears"),
        ("{0} lost a golden ring at sea", "{0} was heavy at heart"),
    ],
    "anger": [
        ("somebody stole {0}'s car", "{0} shouted with rage"),
        ("the neighbour cut down {0}'s apple tree", "{0} was furious"),
        ("the shop refused to give {0} the money back", "{0} was very angry"),
        ("a colleague lied about {0} to everyone", "{0} banged on the table"),
    ],
    "fear": [
        ("a large bear came towards {0}", "{0} trembled all over"),
        ("{0} heard steps in the empty house", "{0} was afraid to move"),
        ("the rope that held {0} began to tear", "{0} was terrified"),
        ("the lift stopped with {0} between two floors", "{0} began to panic"),
    ],
    "surprise": [
        ("{0} found a letter from a king", "{0} could not believe it"),
        ("forty guests stood in {0}'s dark kitchen", "{0} was astonished"),
        ("the parrot told {0} the time", "{0} stared with an open mouth"),
        ("{0} met an old teacher on a mountain", "{0} was greatly surprised"),
    ],
    "disgust": [
        ("there was a worm in {0}'s soup", "{0} felt sick"),
        ("the milk that {0} drank was sour", "{0} pulled a face of disgust"),
        ("rats ran over {0}'s bread", "{0} turned away in disgust"),
        ("{0} stepped into something rotten", "{0} shuddered with disgust"),
    ],
}
PLAIN = [
    "it was a Tuesday in spring",
    "the bus was ten minutes late",
    "a radio was playing next door",
    "the shops close at six here",
    "there were two chairs by the window",
    "the street leads down to the river",
    "a man was painting a fence",
    "it had rained a little before",
]
PEOPLE = ["Anna", "Tom", "Mira", "Paul", "Nadia", "Oskar", "Lena", "David"]


def documents(count: int = DOCUMENTS) -> list[dict]:
    """Documents with one emotion or two, each of another person, between clauses of none."""
    chooser = random.Random(SEED)
    return [_document(chooser, 1 + number % 2) for number in range(count)]


def _document(chooser: random.Random, emotions: int) -> dict:
    kinds, people = chooser.sample(sorted(EVENTS), emotions), chooser.sample(PEOPLE, emotions)
    plain = chooser.sample(PLAIN, 3)
    clauses: list[tuple[str, str]] = [("plain 0", plain[0])]
    for number, (kind, person) in enumerate(zip(kinds, people, strict=True), 1):
        cause, feeling = (text.format(person) for text in chooser.choice(EVENTS[kind]))
        pair = [(f"cause {kind}", cause), (f"feeling {kind}", feeling)]
        clauses += pair if chooser.random() < 0.7 else pair[::-1]
        clauses.append((f"plain {number}", plain[number]))
    if chooser.random() < 0.5:  # so that no place is always that of the same
        clauses.pop(0)
    said = {what: f"{text[0].upper()}{text[1:]}" for what, text in clauses}
    return {
        "text": " ".join(f"{clause}." for clause in said.values()),
        "clauses": list(said.values()),
        "gold": [[kind, said[f"feeling {kind}"], said[f"cause {kind}"]] for kind in kinds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="how many")
    options = parser.parse_args()
    lines = (json.dumps(document) + "\n" for document in documents(options.documents))
    options.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
