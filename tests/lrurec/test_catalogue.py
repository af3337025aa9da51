import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrurec.catalogue import Catalogue
from lrurec.errors import CatalogueError

item_ids = st.lists(
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True
)


@given(ids=item_ids)
def test_rows_and_ids_are_each_others_inverse(ids):
    catalogue = Catalogue(ids)
    assert catalogue.rows(ids).tolist() == list(range(1, len(ids) + 1))
    assert [catalogue.item_id(row) for row in range(1, len(catalogue) + 1)] == ids


@given(ids=item_ids)
def test_a_catalogue_survives_as_text(ids):
    assert Catalogue.from_text(Catalogue(ids).to_text()) == Catalogue(ids)


def test_unknown_items_are_row_zero():
    rows = Catalogue(["a", "b"]).rows(["b", "x", "a"])
    assert rows.tolist() == [2, 0, 1]
    assert rows.dtype == np.int32


def test_no_items_asked_give_no_rows():
    assert Catalogue(["a"]).rows([]).shape == (0,)


@pytest.mark.parametrize("row", [0, -1, 3])
def test_a_row_that_holds_no_item_has_no_id(row):
    with pytest.raises(IndexError, match=str(row)):
        Catalogue(["a", "b"]).item_id(row)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([], "empty"),
        (["a", "b", "a"], "rows 1 and 3"),
        (["a", ""], "row 2"),
        (["a\nb"], "line break"),
        (["a\r"], "line break"),
    ],
)
def test_ids_that_can_be_no_catalogue_are_refused(ids, named):
    with pytest.raises(CatalogueError, match=named):
        Catalogue(ids)


def test_text_with_windows_line_ends_is_read():
    assert Catalogue.from_text("a\r\nb\r\n").item_ids == ("a", "b")


def test_the_last_line_may_lack_its_end():
    assert Catalogue.from_text("a\nb").item_ids == ("a", "b")
