import pytest

from analogfx.tables import fold, fold_names, table


def test_every_name_is_told_its_row():
    rows = [("a.0.w", 1), ("head", 2), ("a.1.w", 1), ("b.0", 3)]
    row = "a.{0..1}.w"
    assert fold_names(rows) == {"a.0.w": row, "a.1.w": row, "head": "head", "b.0": "b.0"}


def test_numbers_that_follow_each_other_fold():
    rows = [("a.0.w", 1), ("a.1.w", 1), ("a.2.w", 1), ("head", 2)]
    assert fold(rows) == [("a.{0..2}.w", 3, 1), ("head", 1, 2)]


def test_rows_that_differ_stay():
    assert fold([("a.0", 1), ("a.1", 2)]) == [("a.0", 1, 1), ("a.1", 1, 2)]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], [("a.{0..1}.b.{0..1}", 4)]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], [("a.0.b.{0..1}", 2), ("a.1.b.0", 1)]),
        (["h.0", "h.2", "h.5"], [("h.{0,2,5}", 3)]),
        (["h.0", "h.0", "h.1", "h.1"], [("h.{0..1}", 4)]),
        (["h.0", "h.0", "h.1"], [("h.0", 2), ("h.1", 1)]),
        (["conv1", "conv2"], [("conv1", 1), ("conv2", 1)]),
        (["w", "w"], [("w", 2)]),
        ([], []),
    ],
)
def test_numbers_in_braces_stand_for_exactly_the_rows_there_are(names, folded):
    assert [(name, n) for name, n, _ in fold((name, None) for name in names)] == folded


def test_a_table_is_aligned():
    assert table(("a", "n"), [("long", "1"), ("x", "23")]) == [
        "a      n",
        "----  --",
        "long   1",
        "x     23",
    ]
