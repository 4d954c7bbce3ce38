import io
import sys

import pytest

from analogfx import terminal


def test_rows_that_differ_by_numbers_are_one():
    rows = [(f"h.{i}.fc", "linear") for i in range(3)] + [("head", "linear")]
    assert terminal.fold(rows) == [(("h.{0..2}.fc", "linear"), 3), (("head", "linear"), 1)]


@pytest.mark.parametrize(
    ("paths", "folded"),
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
def test_numbers_in_braces_stand_for_exactly_the_rows_there_are(paths, folded):
    assert [(row[0], n) for row, n in terminal.fold([(p,) for p in paths])] == folded


def test_other_cells_keep_rows_apart():
    rows = [("h.0", "a"), ("h.1", "b"), ("h.2", "a")]
    assert terminal.counted(rows) == [("h.{0,2}  ×2", "a"), ("h.1", "b")]


def test_the_last_column_is_wrapped():
    text = terminal.text(("a", "b"), [("x", "one two three four five six seven eight")], 30)
    assert text.splitlines() == [
        "a  b",
        "-  ---------------------------",
        "x  one two three four five six",
        "   seven eight",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_colours_and_a_file_gets_none(monkeypatch, capsys):
    arguments = (("a", "b"), [("x", "one [red]")], ["bold red"], ["below [1]"])
    terminal.show(*arguments)
    assert capsys.readouterr().out.splitlines()[2:] == ["x  one [red]", "below [1]"]
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", screen)
    assert terminal.terminal_width() == 40
    terminal.show(*arguments)
    assert "\x1b[1;31m" in screen.getvalue() and "one [red]" in screen.getvalue()
    assert "below [1]" in screen.getvalue()
