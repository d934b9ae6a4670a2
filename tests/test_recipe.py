import pytest

from factorllm import FactorLLMError, Recipe, parse_recipe
from factorllm.recipe import LITERATURE, prune_recipe


def test_cmoe_and_paper_notation():
    recipe = parse_recipe("S2A2E8")
    assert (recipe.shared, recipe.active, recipe.parts, recipe.experts) == (2, 2, 8, 6)
    paper = parse_recipe("1R4E2K")
    assert (paper.shared, paper.active, paper.experts) == (0, 2, 4)
    assert recipe.shape(1536).sparsity == paper.shape(1536).sparsity == 0.5


def test_overlapping_experts_are_as_wide_as_the_active_parts_and_one_runs():
    recipe = parse_recipe("S1A3E8N4")
    shape = recipe.shape(1536)
    assert recipe.name == "S1A3E8N4"
    assert (shape.shared_width, shape.experts, shape.expert_width, shape.top_k) == (192, 4, 576, 1)
    assert (shape.active_width, shape.kept_width, shape.sparsity) == (768, 192 + 4 * 576, 0.5)
    assert recipe.static_prune() == parse_recipe("S2A2E8").static_prune()
    assert shape.overlaps
    assert not parse_recipe("S2A2E8").shape(1536).overlaps


def test_shape_counts_every_neuron():
    shape = parse_recipe("S2A2E8").shape(1536)
    assert (shape.shared_width, shape.experts, shape.expert_width, shape.top_k) == (384, 6, 192, 2)
    assert shape.kept_width == 1536
    assert shape.active_width == 768


def test_static_prune_has_the_same_active_width():
    recipe = parse_recipe("S2A2E8")
    prune = recipe.static_prune()
    assert prune.is_prune
    assert prune.shape(1536).active_width == recipe.shape(1536).active_width == prune.shape(1536).kept_width


def test_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("shared: 1\nactive: 1\nparts: 4\npartition: random\nrestore: none\n")
    assert parse_recipe(str(path)) == Recipe(shared=1, active=1, parts=4, partition="random", restore="none")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("S2A7E8", "use at most 6"),
        ("S9A0E8", "more than there are"),
        ("S0A0E8", "no part of the FFN would run"),
        ("2R4E2K", "use 1R"),
        ("S0A4E8N2", "need not overlap; use at least 3, or leave the N out"),
        ("S4A0E8N2", "make at least one part active"),
        ("S0A4E8N1", "greater than or equal to 2"),
        ("cmoe:S0A4E8N3", "experts of partition activation share no neurons"),
        ("cmoe:S4A0E8", "keeps the neurons of most energy, not what partition activation would choose"),
        ("1R4E5K", "use at most 4"),
        ("half", "is not understood"),
        ("missing.yaml", "no recipe file"),
    ],
)
def test_refusals_say_what_to_do(text, says):
    with pytest.raises(FactorLLMError, match=says):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("shared: 1\nactive: 1\nparts: 4\nexperts: 3\n", "unknown key `experts`"),
        ("shared: 1\nactive: 1\n", "parts"),
        ("shared: 1\nactive: 1\nparts: 4\npartition: magic\n", "partition"),
        ("[1, 2", "cannot be read"),
        ("just text", "must hold keys"),
    ],
)
def test_yaml_refusals(tmp_path, content, says):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(FactorLLMError, match=says):
        parse_recipe(str(path))


def test_parts_must_divide_the_ffn():
    with pytest.raises(FactorLLMError, match="1365 neurons do not divide by 8; part counts that do: 3, 5, 7"):
        parse_recipe("S2A2E8").shape(1365)


def test_published_methods_by_name():
    cmoe = parse_recipe("cmoe")
    assert (cmoe.name, cmoe.partition, cmoe.router) == ("S2A2E8", "activation", "analytic")
    assert parse_recipe("cmoe:S3A3E8") == cmoe.model_copy(update={"shared": 3, "active": 3})
    for name in LITERATURE:
        assert parse_recipe(name).shape(1536).sparsity == 0.5


@pytest.mark.parametrize(
    ("keep", "width", "kept"),
    [(0.5, 4864, 2432), (0.6, 4864, 2912), (0.75, 1536, 1152), (0.01, 1536, 32), (0.999, 1536, 1504), (0.5, 24, 16)],
)
def test_a_prune_keeps_the_nearest_width_that_engines_quantise(keep, width, kept):
    assert prune_recipe(keep, width).shape(width).kept_width == kept


@pytest.mark.parametrize("keep", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_prune_of_no_share_is_refused(keep):
    with pytest.raises(FactorLLMError, match="is no share of the neurons"):
        prune_recipe(keep, 64)
