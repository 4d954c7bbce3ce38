import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    """The fenced blocks of a language as (line before the first, text)."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        yield README.count("\n", 0, match.start(1)), match[1]


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, text in blocks("python"):
        # Leading lines, so that a traceback names the line of the README.
        exec(compile("\n" * line + text, "README.md", "exec"), namespace)


def test_ci_runs_the_command_that_the_readme_gives():
    last_line = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert any(last_line in text for _, text in blocks("bash"))
