import torch

from lrurec.bundle import make_bundle
from lrurec.recommendation import recommend


def ids(result):
    return [item.item_id for item in result.items]


def test_items_are_ranked_by_score_best_first(small_bundle):
    items = recommend(small_bundle, ["item-3"], 19).items
    assert [item.score for item in items] == sorted((item.score for item in items), reverse=True)


def test_clicked_items_are_left_out_unless_asked_for(small_bundle):
    clicked = ["item-3", "item-7", "item-3"]
    assert not set(ids(recommend(small_bundle, clicked, 20))) & set(clicked)
    assert len(recommend(small_bundle, clicked, 20, include_seen=True).items) == 20


def test_a_list_longer_than_the_catalogue_gives_what_there_is(small_bundle):
    assert len(recommend(small_bundle, ["item-3", "item-4"], 1000).items) == 18
    assert recommend(small_bundle, [f"item-{row}" for row in range(1, 21)], 5).items == []


def test_the_padding_item_is_never_recommended(small_bundle):
    weights = {name: value.clone() for name, value in small_bundle.model.state_dict().items()}
    weights["item_bias"][0] = 1e6
    bundle = make_bundle(small_bundle.config, weights, small_bundle.catalogue)
    result = recommend(bundle, [], 100)
    assert sorted(ids(result)) == sorted(bundle.catalogue.item_ids)


def test_unknown_items_are_skipped_and_named_once(small_bundle):
    result = recommend(small_bundle, ["x", "item-3", "y", "x", "item-4"], 5)
    assert result.unknown_items == ["x", "y"]
    assert result.clicks == 2
    assert result.items == recommend(small_bundle, ["item-3", "item-4"], 5).items


def test_only_unknown_items_are_a_cold_start(small_bundle):
    result = recommend(small_bundle, ["x"], 5)
    assert result.clicks == 0
    assert result.items == recommend(small_bundle, [], 5).items


def test_equal_scores_stand_in_row_order(small_bundle):
    weights = {name: torch.zeros_like(value) for name, value in small_bundle.model.state_dict().items()}
    bundle = make_bundle(small_bundle.config, weights, small_bundle.catalogue)
    assert ids(recommend(bundle, ["item-2"], 3)) == ["item-1", "item-3", "item-4"]
