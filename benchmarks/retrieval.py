"""What passages bring to a model, and which of them it should be given: the table of docs/serving.md.

    python benchmarks/retrieval.py ask dense.gguf --results retrieval.jsonl
    python benchmarks/retrieval.py ask student.gguf --results retrieval.jsonl
    python benchmarks/retrieval.py table --results retrieval.jsonl --out docs/serving.md --mark retrieval

A hundred documents hold facts that no model can know, for they are drawn here. Questions ask for such a fact, or for
one that models know and that shares a word with the documents. Each is answered without passages, with the four that
BM25 finds, with those of the four that `serve --retrieval` keeps, and with those after which the model says that they
answer the question (yes more likely than no). An answer is right where the fact is in it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from pathlib import Path

from common import commit, in_one_line, markdown_table, replace_part

from factorllm.engines.base import Options
from factorllm.engines.llamacpp import open_server, server_params
from factorllm.engines.llamacpp_client import post
from factorllm.serving.retrieval import Judge, Library, helpful, with_passages

SYLLABLES = [
    "vel",
    "mor",
    "tas",
    "kin",
    "dra",
    "lu",
    "pen",
    "zor",
    "hal",
    "bre",
    "quin",
    "sol",
    "fer",
    "gat",
    "nim",
    "ost",
    "ril",
    "cam",
    "jun",
    "wex",
]
NAMES = ["Ada", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas"]
KINDS = ["Museum", "Bridge", "Library", "Observatory", "Harbour"]
WARES = ["copper", "tin", "salt", "amber", "marble", "wool", "glass", "silk"]
KNOWN = [
    ("Who founded the company Amazon?", "Bezos"),
    ("In which town was William Shakespeare born?", "Stratford"),
    ("What is the first day of the week after Sunday?", "Monday"),
    ("Which insect makes silk?", "silkworm|moth|caterpillar"),
    ("In which country does the Eiffel Tower stand?", "France"),
    ("In which year did the second world war end?", "1945"),
    ("In which city is the Tower Bridge?", "London"),
    ("Which sea is between Europe and Africa and full of trade?", "Mediterranean"),
]
WAYS = {"closed": "none", "always": "all four", "yes": "where yes beats no", "kept": "as served"}


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ask", "table"])
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="question to begin with")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=4, help="of the documents; 3 was looked at to choose the threshold")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mark", default="retrieval")
    options = parser.parse_args()
    if options.what == "table":
        replace_part(options.out, options.mark, table(options.results))
        return
    with tempfile.TemporaryDirectory() as folder:
        questions = write_documents(Path(folder), options.seed)
        questions = questions[options.first : options.first + options.questions]
        ask_all(options.model, Library(Path(folder)), questions, options.threads, options.results)


def write_documents(folder: Path, seed: int) -> list[tuple[str, str, str | None]]:
    """Write the documents; the questions with the answers, and the passages that hold them."""
    chooser, planted = random.Random(seed), []

    def name() -> str:
        return "".join(chooser.sample(SYLLABLES, chooser.choice([2, 3]))).capitalize()

    for number in range(100):
        place, town, year = f"{name()} {chooser.choice(KINDS)}", name(), str(chooser.randint(1700, 1990))
        founder, ware = f"{chooser.choice(NAMES)} {name()}", chooser.choice(WARES)
        text = f"The {place} stands in the town of {town}. It was founded in {year} by {founder}. "
        text += f"Its first trade was {ware}."
        (folder / f"{number:03}.txt").write_text(text)
        asked = [
            (f"In which year was the {place} founded?", year),
            (f"Who founded the {place}?", founder),
            (f"In which town does the {place} stand?", town),
            (f"What was the first trade of the {place}?", ware),
        ]
        planted.append((*asked[number % 4], text))
    # Three that are planted, one that is known.
    known = [(*each, None) for each in KNOWN]
    chosen = iter(chooser.sample(planted, 3 * len(known)))
    return [each for last in known for each in (next(chosen), next(chosen), next(chosen), last)]


def ask_all(model: Path, library: Library, questions: list, threads: int | None, results: Path) -> None:
    server = open_server(server_params(str(model), Options(context=1024, decode_threads=threads)), f"load {model}")
    address = server.listening_address
    judge = Judge(address)
    for question, wanted, gold in questions:
        texts, unrelated = library.candidates(question)
        gains = judge.gains(question, texts, unrelated) if texts else []
        odds = [odds_of_yes(address, question, text) for text in texts]
        chosen = {
            "closed": [],
            "always": texts,
            "yes": [text for text, each in zip(texts, odds, strict=True) if each > 0],
            "kept": [text for text, helps in zip(texts, helpful(gains), strict=True) if helps],
        }
        answers: dict[tuple[str, ...], str] = {}
        for passages in chosen.values():
            if tuple(passages) not in answers:
                answers[tuple(passages)] = answer(address, question, passages)
        said = {way: answers[tuple(passages)] for way, passages in chosen.items()}
        found = {
            "model": model.stem,
            "commit": commit(),
            "question": question,
            "planted": gold is not None,
            "gold": texts.index(gold) if gold in texts else None,
            "gains": gains,
            "odds": odds,
            "answers": said,
            "right": {
                way: any(each.lower() in text.lower() for each in wanted.split("|")) for way, text in said.items()
            },
        }
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(found, flush=True)


def odds_of_yes(address: str, question: str, passage: str) -> float:
    """Log-odds of yes against no, where the model is asked whether a passage answers a question."""
    asked = f"{question}\n\nDoes the text above answer this question? Say yes or no only."
    messages = with_passages([{"role": "user", "content": asked}], [passage])
    prompt = post(address, "/apply-template", {"messages": messages})["prompt"]
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 50}
    top = post(address, "/completion", body)["completion_probabilities"][0]["top_logprobs"]

    def said(word: str) -> float:
        chances = [math.exp(each["logprob"]) for each in top if each["token"].strip().lower() == word]
        return math.log(sum(chances)) if chances else top[-1]["logprob"]

    return said("yes") - said("no")


def answer(address: str, question: str, passages: list[str]) -> str:
    messages = [{"role": "user", "content": f"{question} Answer in a few words."}]
    body = {"messages": with_passages(messages, passages) if passages else messages, "temperature": 0, "max_tokens": 24}
    return post(address, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def table(results: Path) -> str:
    """Right answers of each model in each way, of planted facts, of known ones, and of both."""
    made = "`python benchmarks/retrieval.py ask MODEL.gguf --results retrieval.jsonl` for each: right answers.\n\n"
    found = [json.loads(line) for line in results.read_text().splitlines()]
    rows = []
    for model in dict.fromkeys(each["model"] for each in found):
        for way, words in WAYS.items():
            cells = [model, words]
            for of in ([True], [False], [True, False]):
                right = [each["right"][way] for each in found if each["model"] == model and each["planted"] in of]
                cells.append(f"{sum(right)} of {len(right)}")
            rows.append(cells)
    return made + markdown_table(["model", "passages", "planted facts", "known facts", "both"], rows)


if __name__ == "__main__":
    main()
