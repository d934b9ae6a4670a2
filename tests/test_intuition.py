"""From a prompt to probabilities over kinds of text."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from factorllm.errors import FactorLLMError
from factorllm.text.intuition import FILE, WIDTH, Intuition, TextVectors

VECTOR = [-0.004183, -0.102659, -0.131461, 0.053421]
WORDS = ("for while return import class self", "sea ship wind sail harbour wave", "flour butter oven sugar bake cake")


def documents(each: int, seed: int) -> tuple[list[str], list[int]]:
    """Documents of three kinds, which share some words, in turn."""
    chooser = random.Random(seed)
    kinds = [number % 3 for number in range(3 * each)]
    common = ["and", "the", "a", "of", "to", "in"]
    return [" ".join(chooser.choices(WORDS[kind].split() + common, k=20)) for kind in kinds], kinds


def accuracy(intuition: Intuition, texts: list[str], kinds: list[int]) -> float:
    return float(
        np.mean([intuition.probabilities(text).argmax() == kind for text, kind in zip(texts, kinds, strict=True)])
    )


@given(st.lists(st.text(), max_size=5), st.text())
def test_any_text_has_a_vector_of_unit_length_and_probabilities(known, text):
    vectors = TextVectors.of(known)
    (vector,) = vectors([text])
    assert vector.shape == (WIDTH,)
    assert np.isclose(np.linalg.norm(vector), 1) or not vector.any()
    p = Intuition(vectors, np.arange(2.0 * WIDTH).reshape(2, WIDTH)).probabilities(text)
    assert np.isclose(p.sum(), 1)


def test_vectors_are_the_same_everywhere():
    """A number of them, so that a change that would spoil saved files is seen."""
    vector = TextVectors.of(["one text", "another text"])(["some other text"])[0]
    assert vector[:4].round(6).tolist() == VECTOR


def test_what_stands_in_all_documents_says_nothing():
    vectors = TextVectors.of(["the sea", "the ship"])
    assert not vectors(["the"]).any()
    assert vectors(["sea"]).any()


@pytest.mark.parametrize("build", ["labels", "soft"])
def test_known_kinds_are_told_on_new_documents(build):
    texts, kinds = documents(30, seed=0)
    wanted = 0.8 * np.eye(3)[kinds] + 0.2 / 3
    intuition = Intuition.from_labels(texts, kinds) if build == "labels" else Intuition.fit(texts, wanted)
    assert accuracy(intuition, *documents(30, seed=1)) > 0.9
    if build == "soft":  # no surer than what it was fitted to
        sure = [intuition.probabilities(text).max() for text in documents(30, seed=1)[0]]
        assert 0.6 < np.mean(sure) < 0.95


def test_kinds_are_found_without_labels():
    texts, kinds = documents(40, seed=0)
    intuition = Intuition.from_documents(texts, 3)
    picks = np.array([intuition.probabilities(text).argmax() for text in texts])
    table = np.array([[np.sum((picks == pick) & (np.array(kinds) == kind)) for kind in range(3)] for pick in range(3)])
    assert table.max(1).sum() > 0.9 * len(texts)
    assert sorted(table.argmax(1)) == [0, 1, 2]
    assert np.array_equal(intuition.weights, Intuition.from_documents(texts, 3).weights)
    with pytest.raises(ValueError, match="2 documents cannot be of 3 kinds"):
        Intuition.from_documents(texts[:2], 3)


def test_the_fit_is_at_its_minimum():
    texts, _ = documents(5, seed=0)
    wanted = np.random.default_rng(0).dirichlet(np.ones(3), len(texts))
    intuition = Intuition.fit(texts, wanted)
    points = intuition.vectors(texts)
    slope = (softmax(points @ intuition.weights.T, axis=1) - wanted).T @ points / len(texts) + 1e-4 * intuition.weights
    assert np.abs(slope).max() < 1e-3


def test_it_is_kept_in_a_file(tmp_path):
    texts, kinds = documents(10, seed=0)
    made = Intuition.from_labels(texts, kinds)
    made.save(tmp_path)
    read = Intuition.load(tmp_path)
    assert read.kinds == 3
    assert np.array_equal(read.probabilities(texts[0]), made.probabilities(texts[0]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("weights"),
        lambda content: content["weights"].append([0.0]),
        lambda content: content["weights"][0].__setitem__(0, float("nan")),
        lambda content: content.update(counts=content["counts"][:-1]),
        lambda content: content.update(documents=0),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    Intuition.from_labels(*documents(4, seed=0)).save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    damage(content)
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(FactorLLMError, match=r"intuition\.json cannot be used .*; make or fetch"):
        Intuition.load(tmp_path)
