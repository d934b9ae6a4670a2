"""Which kind of text a prompt is, from its words and letters alone: a vector, and probabilities over K kinds. No second
model is asked, so it takes a millisecond.

The vector is TF-IDF of hashed words and runs of three bytes, under a random projection of signs (Achlioptas 2003): a
feature's signs are the bits of its own hash, so no matrix is kept, and it is the same everywhere. Of rarity the root is
taken: what tells kinds of text apart is how they are written, more than what each is about (docs/experiments.md).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from factorllm.errors import refusing
from factorllm.runs.workspace import write_text

FILE = "intuition.json"
"""Its file in a folder of what it chooses among."""

WIDTH = 256
"""Numbers of a vector."""

_BUCKETS = 1 << 14  # of features, in which documents are counted
_READ = 8192  # bytes of a text that are looked at: the beginning and the end, where a prompt says what is wanted
_WORD = re.compile(rb"[a-z0-9_\x80-\xff]+")
_MANY = 10  # documents, of which a feature must be in two to count
_TEMPERATURE = 0.1  # of cosines
_RIDGE = 1e-4  # on the weights that are fitted
_STARTS, _ROUNDS = 8, 50  # of k-means

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TextVectors:
    """Texts to vectors, by how rare their features are among some documents.

    Attributes:
        documents: how many there were.
        counts: in how many of them a feature of each bucket is, (buckets,).
    """

    documents: int
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, documents: Iterable[str]) -> TextVectors:
        """Count them."""
        counts, number = np.zeros(_BUCKETS, np.int64), 0
        for document in documents:
            counts[np.unique(_buckets(_digests(_features(document))))] += 1
            number += 1
        return cls(number, counts)

    def __call__(self, texts: Iterable[str]) -> Array:
        """(n, 256), each of unit length; of nothing but what all documents have, 0."""
        return np.array([self._vector(text) for text in texts]).reshape(-1, WIDTH)

    def _vector(self, text: str) -> Array:
        features = _features(text)
        digests = _digests(features)
        often = 1 + np.log(np.array(list(features.values()), np.float64))
        counts = self.counts[_buckets(digests)]
        # What one document alone has, or none, says nothing of others.
        known = counts >= (2 if self.documents >= _MANY else 1)
        rare = np.where(known, np.sqrt(np.log((1 + self.documents) / (1 + counts))), 0)
        signs = 2.0 * np.unpackbits(digests[:, : WIDTH // 8], axis=1) - 1
        vector = (often * rare) @ signs
        return vector / (np.linalg.norm(vector) or 1.0)


@dataclass(frozen=True, eq=False)
class Intuition:
    """Probabilities over kinds of text: `p = softmax(W v)` of a text's vector v.

    Attributes:
        weights: W, (K, 256).

    Example:
        >>> known = ["def add(a, b): return a + b", "the sea is wide and the sea is deep"]
        >>> intuition = Intuition.from_labels(known, [0, 1])
        >>> int(intuition.probabilities("how deep is the sea?").argmax())
        1
    """

    vectors: TextVectors
    weights: Array

    @property
    def kinds(self) -> int:
        """K."""
        return len(self.weights)

    def probabilities(self, text: str) -> Array:
        """(K,); the same for each kind where nothing of the text is known."""
        probabilities: Array = softmax(self.weights @ self.vectors([text])[0])
        return probabilities

    @classmethod
    def from_documents(
        cls, documents: Sequence[str], kinds: int, seed: int = 0, weights: Sequence[float] | None = None
    ) -> Intuition:
        """Kinds found by k-means: `p = softmax(cos(v, centre) / T)`.

        Args:
            weights: how much each document counts; all the same unless given.

        Raises:
            ValueError: for fewer documents than kinds.
        """
        vectors = TextVectors.of(documents)
        counted = np.ones(len(documents)) if weights is None else np.array(weights, np.float64)
        centres = _centres(vectors(documents), counted, kinds, np.random.RandomState(seed))
        return cls(vectors, centres / _TEMPERATURE)

    @classmethod
    def from_labels(cls, documents: Sequence[str], labels: Sequence[int]) -> Intuition:
        """Kinds that are known, a number 0..K-1 for each document."""
        return cls.fit(documents, np.eye(max(labels) + 1)[list(labels)])

    @classmethod
    def fit(cls, documents: Sequence[str], wanted: Array) -> Intuition:
        """The W of least mean `KL(q || p)`, a convex problem: logistic regression with soft labels.

        Args:
            wanted: q, (documents, K), rows that sum to 1.
        """
        vectors = TextVectors.of(documents)
        points, shape = vectors(documents), (wanted.shape[1], WIDTH)

        def loss(flat: Array) -> tuple[float, Array]:
            weights = flat.reshape(shape)
            log_p = log_softmax(points @ weights.T, axis=1)
            slope = (np.exp(log_p) - wanted).T @ points / len(points) + _RIDGE * weights
            return -(wanted * log_p).sum() / len(points) + _RIDGE / 2 * (flat @ flat), slope.ravel()

        found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B")
        return cls(vectors, found.x.reshape(shape))

    def save(self, folder: Path) -> None:
        """Write it into a folder, as one file."""
        content = {
            "documents": self.vectors.documents,
            "counts": self.vectors.counts.tolist(),
            "weights": self.weights.tolist(),
        }
        write_text(folder / FILE, json.dumps(content) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Intuition:
        """What `save` wrote.

        Raises:
            FactorLLMError: when the file is not there or damaged.
        """
        path = folder / FILE
        with refusing(path, "make or fetch what it belongs to again"):
            content = json.loads(path.read_text(encoding="utf-8"))
            number = int(content["documents"])
            counts, weights = np.array(content["counts"], np.int64), np.array(content["weights"], np.float64)
            if counts.shape != (_BUCKETS,) or weights.ndim != 2 or weights.shape[1] != WIDTH:
                raise ValueError(f"counts {counts.shape} and weights {weights.shape} are of another shape")
            if not np.isfinite(weights).all() or counts.min() < 0 or counts.max() > number:
                raise ValueError("its numbers are none that could have been counted or fitted")
            return cls(TextVectors(number, counts), weights)


def _features(text: str) -> Counter[bytes]:
    """How often each word and run of three bytes is there; which of them it is, its first byte says."""
    data = text.lower().encode(errors="replace")
    if len(data) > _READ:
        data = data[: _READ // 2] + b"\n" + data[-_READ // 2 :]
    found = Counter(b"w" + word for word in _WORD.findall(data))
    found.update(b"b" + data[start : start + 3] for start in range(len(data) - 2))
    return found


def _digests(features: Iterable[bytes]) -> NDArray[np.uint8]:
    """Hashes, (n, 48)."""
    digests = (xxhash.xxh3_128_digest(feature, seed) for feature in features for seed in range(3))
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 48)


def _buckets(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(n,), of bits that are not among the signs."""
    return (digests[:, -2].astype(np.int64) << 8 | digests[:, -1]) % _BUCKETS


def _centres(points: Array, weights: Array, kinds: int, chooser: np.random.RandomState) -> Array:
    """The best of some runs of k-means on the sphere, each from a start by k-means++: (K, 256), of unit length."""
    if len(points) < kinds:
        raise ValueError(f"{len(points)} documents cannot be of {kinds} kinds")
    found = [_climb(points, weights, _start(points, weights, kinds, chooser)) for _ in range(_STARTS)]
    return max(found, key=lambda centres: weights @ (points @ centres.T).max(1))


def _climb(points: Array, weights: Array, centres: Array) -> Array:
    for _ in range(_ROUNDS):
        labels = (points @ centres.T).argmax(1)
        sums = np.array([weights[labels == kind] @ points[labels == kind] for kind in range(len(centres))])
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(lengths > 0, sums / np.where(lengths > 0, lengths, 1), centres)  # one without points stays
        if np.allclose(moved, centres):
            break
        centres = moved
    return centres


def _start(points: Array, weights: Array, kinds: int, chooser: np.random.RandomState) -> Array:
    """Each next centre is a point, drawn in proportion to its squared distance from the nearest that there is."""
    centres: list[Array] = []
    for _ in range(kinds):
        nearest = np.min([((points - centre) ** 2).sum(1) for centre in centres] or [np.ones(len(points))], axis=0)
        chance = weights * (nearest + np.finfo(np.float64).tiny)
        centres.append(points[chooser.choice(len(points), p=chance / chance.sum())])
    return np.array(centres)
