import io
import sys

from analogfx import terminal


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
