"""Tables in Markdown, and the parts of pages that commands write."""

from collections.abc import Iterable, Sequence

END = "<!-- end -->"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def with_section(page: str, command: str, text: str) -> str:
    """A page whose section that a command writes is replaced by a text."""
    begin = f"<!-- {command} -->"
    before, found, rest = page.partition(begin)
    if not found:
        raise ValueError(f"the page has no section {begin}")
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n\n{text}\n\n{END}{after}"
