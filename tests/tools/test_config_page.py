"""The page of config fields says what the code says."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import config_page
import tables


def test_the_page_is_up_to_date():
    page = config_page.PAGE.read_text(encoding="utf-8")
    table = tables.markdown(["field", "default", "unit", "step", "meaning"], config_page.rows())
    assert page == tables.with_section(page, config_page.COMMAND, table)


def test_every_field_says_what_it_is_and_where_it_acts():
    rows = config_page.rows()
    assert all(meaning and step for _, _, _, step, meaning in rows)
    assert set(config_page.UNITS) <= {name.strip("`") for name, *_ in rows}


def test_the_picture_is_drawn(tmp_path):
    config_page.draw(tmp_path / "tile.png")
    assert (tmp_path / "tile.png").read_bytes().startswith(b"\x89PNG")
