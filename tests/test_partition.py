import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from factorllm.convert.partition import METHODS, keep_top_energy, partition, partition_from_labels, partition_from_order
from factorllm.convert.partition.balanced import balanced_assignment
from factorllm.convert.partition.energy import expert_picks
from factorllm.dense.ffn import FFN, neuron_energy
from factorllm.recipe import Shape


def random_ffn(width: int, d: int, seed: int) -> tuple[FFN, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up, x = (torch.randn(n, d, generator=generator) for n in (width, width, 80))
    ffn = FFN(gate, up, torch.randn(d, width, generator=generator))
    return ffn, ffn.hidden(x)


@st.composite
def shapes(draw) -> Shape:
    experts = draw(st.integers(1, 6))
    width = draw(st.integers(1, 9))
    shared = draw(st.integers(0, 12))
    return Shape(shared + experts * width, shared, experts, width, draw(st.integers(1, experts)))


@pytest.mark.parametrize("method", METHODS)
@given(shape=shapes(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_every_partition_is_exact(method, shape, seed):
    ffn, hidden = random_ffn(shape.ffn_width, 5, seed)
    split = partition(ffn, hidden, shape, method, torch.Generator().manual_seed(seed))
    assert split.shared.shape == (shape.shared_width,)
    assert split.experts.shape == (shape.experts, shape.expert_width)
    assert torch.equal(split.order.sort().values, torch.arange(shape.ffn_width))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_partition(method):
    ffn, hidden = random_ffn(48, 8, 3)
    shape = Shape(48, 12, 6, 6, 2)
    first, second = (partition(ffn, hidden, shape, method, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.order, second.order)


def test_a_partition_that_loses_a_neuron_is_refused():
    with pytest.raises(ValueError, match="not an exact partition"):
        partition_from_labels(torch.tensor([0, 0, 1, 0]), Shape(4, 0, 2, 2, 1))


@given(
    n=st.integers(2, 14), clusters=st.integers(1, 4), seed=st.integers(0, 10_000), scale=st.sampled_from([1e-9, 1, 1e9])
)
@settings(max_examples=60, deadline=None)
def test_balanced_assignment_is_optimal(n, clusters, seed, scale):
    cost = torch.randn(n * clusters, clusters, generator=torch.Generator().manual_seed(seed)) * scale
    labels = balanced_assignment(cost, [n] * clusters)
    assert torch.bincount(labels, minlength=clusters).tolist() == [n] * clusters
    square = cost.repeat_interleave(n, dim=1).numpy()
    best = square[linear_sum_assignment(square)].sum()
    assert cost.gather(1, labels[:, None]).sum().item() == pytest.approx(best, rel=1e-4, abs=1e-6 * scale)


def clustered_hidden() -> tuple[FFN, torch.Tensor, torch.Tensor]:
    """Activations of 4 groups of 8 neurons, shuffled, of which each token excites one; and the groups."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(4).repeat_interleave(8)[torch.randperm(32, generator=generator)]
    excited = torch.randint(4, (400,), generator=generator)
    strength = 0.05 + (excited[:, None] == group).float()
    hidden = torch.randn(400, 32, generator=generator) * strength
    return FFN(torch.randn(32, 4), torch.randn(32, 4), torch.ones(4, 32)), hidden, group


@pytest.mark.parametrize(
    ("method", "least"),
    # CMoE starts from the neurons that fire most, which may be of one group, and k-means keeps what it starts with.
    [("energy", 1.0), ("coactivation", 1.0), ("activation", 0.6)],
)
def test_neurons_that_fire_together_stay_together(method, least):
    ffn, hidden, group = clustered_hidden()
    split = partition(ffn, hidden, Shape(32, 0, 4, 8, 1), method)
    purity = sum(group[neurons].bincount().max().item() for neurons in split.experts) / 32
    assert purity >= least


def captured(ffn: FFN, hidden: torch.Tensor, split, top_k: int) -> float:
    energy = neuron_energy(hidden, ffn.neuron_gain())
    scores = torch.stack([energy[:, neurons].sum(1) for neurons in split.experts], dim=1)
    return ((scores * expert_picks(scores, top_k)).sum() / energy.sum()).item()


def test_energy_captures_more_than_the_paper_split():
    ffn, hidden = random_ffn(96, 16, 1)
    shape = Shape(96, 0, 6, 16, 2)
    by_method = {m: captured(ffn, hidden, partition(ffn, hidden, shape, m), 2) for m in ("energy", "random")}
    assert by_method["energy"] > 1.1 * by_method["random"]


@st.composite
def overlapping_shapes(draw) -> Shape:
    width, experts, shared = draw(st.integers(1, 9)), draw(st.integers(2, 6)), draw(st.integers(0, 12))
    ffn_width = draw(st.integers(shared + width, shared + experts * width - 1))
    return Shape(ffn_width, shared, experts, width, 1)


@given(shape=overlapping_shapes(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_overlapping_experts_repeat_no_neuron_that_runs(shape, seed):
    ffn, hidden = random_ffn(shape.ffn_width, 5, seed)
    first, second = (partition(ffn, hidden, shape, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first.order, second.order)
    assert first.experts.shape == (shape.experts, shape.expert_width)
    for expert in first.experts:
        assert len(torch.cat([first.shared, expert]).unique()) == shape.active_width
    assert torch.equal(partition_from_order(first.order, shape).order, first.order)


def test_overlapping_experts_capture_more_than_disjoint_ones():
    ffn, hidden = random_ffn(96, 16, 1)
    disjoint = partition(ffn, hidden, Shape(96, 0, 2, 48, 1))
    overlapping = partition(ffn, hidden, Shape(96, 0, 4, 48, 1))
    assert captured(ffn, hidden, overlapping, 1) > 1.1 * captured(ffn, hidden, disjoint, 1)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ([0, 1, 3, 3, 0, 2], "twice"),
        ([0, 1, 2, 3, 0, 4], "not of the dense FFN"),
        ([0, 1, 2, 3, 0], "5 neurons, not 6"),
    ],
)
def test_what_is_no_partition_is_refused(order, says):
    with pytest.raises(ValueError, match=says):
        partition_from_order(torch.tensor(order), Shape(4, 0, 3, 2, 1))


def shared_of(method: str, ffn: FFN, hidden: torch.Tensor, width: int) -> torch.Tensor:
    """The neurons that a static prune keeps, or that a method shares beside two experts."""
    if method == "prune":
        return keep_top_energy(ffn, hidden, Shape(ffn.width, width, 0, 1, 0)).shared
    rest = (ffn.width - width) // 2
    return partition(ffn, hidden, Shape(ffn.width, width, 2, rest, 1), method).shared


@pytest.mark.parametrize("method", ["prune", "kmeans", "coactivation"])
def test_neurons_that_always_run_have_most_of_the_energy(method):
    ffn, hidden = random_ffn(24, 6, 2)
    kept = shared_of(method, ffn, hidden, 10)
    energy = neuron_energy(hidden, ffn.neuron_gain())
    share = (energy / energy.sum(1, keepdim=True)).mean(0)
    dropped = torch.ones(24, dtype=torch.bool).index_fill(0, kept, False)
    assert len(kept) == 10
    assert share[kept].min() >= share[dropped].max()


@pytest.mark.parametrize("method", ["prune", "kmeans", "coactivation"])
def test_tokens_of_large_activations_do_not_decide_alone(method):
    """Of 10 neurons, half of the tokens use the first five, the others the last five, a hundred times as strongly."""
    hidden = torch.zeros(40, 10)
    hidden[:20, :5], hidden[20:, 5:] = torch.tensor([5.0, 4, 3, 2, 1]), 100 * torch.tensor([5.0, 4, 3, 2, 1])
    ffn = FFN(torch.rand(10, 4), torch.zeros(10, 4), torch.ones(4, 10))
    assert shared_of(method, ffn, hidden, 4).tolist() == [0, 1, 5, 6]
