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


def test_a_gap_stays():
    assert fold([("a.0", 1), ("a.2", 1)]) == [("a.0", 1, 1), ("a.2", 1, 1)]


def test_two_numbers_fold_both():
    rows = [(f"l.{i}.e.{j}", "x") for i in range(3) for j in range(4)]
    assert fold(rows) == [("l.{0..2}.e.{0..3}", 12, "x")]


def test_nothing():
    assert fold([]) == []


def test_a_table_is_aligned():
    assert table(("a", "n"), [("long", "1"), ("x", "23")]) == [
        "a      n",
        "----  --",
        "long   1",
        "x     23",
    ]
