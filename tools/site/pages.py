"""What the site has beside the files of ``docs/``: the README, the API, pages as notebooks."""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]

BESIDE_DOCS = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"} | {
    "CONTRIBUTING.md": "contributing.md"
}
"""Files of the repository's root, and where they stand on the site."""

REFERENCE = {
    "models": (
        "Models",
        "analogize to_digital report audit trace set_config analog_layers named_analog_layers "
        "AnalogModule save load digital_state_dict",
    ),
    "configs": (
        "Configs",
        "TorchInferenceRPUConfig IOParameters InputRangeParameter MappingParameter "
        "PrePostProcessingParameter WeightClipParameter WeightModifierParameter WeightClipType "
        "WeightModifierType WeightNoiseInjectionType WeightQuantizationType ExpertRange bits "
        "recipes",
    ),
    "training": (
        "Training",
        "clip_after_step clip_weights prepare_training parameter_groups distributed "
        "quantize_weights weights_written backend_state explain",
    ),
    "chips": (
        "Chips",
        "chip program Device load_device evaluate Lifetime programmed calibrate warn_unset",
    ),
    "tiles": (
        "From a model to a chip",
        "tile_map export_tiles cost hardware sensitivity plan",
    ),
    "deployment": ("Deployment", "export_onnx load_onnx_sites"),
    "errors": ("Errors", "errors"),
}
"""Every public name of ``analogfx``, by page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and a notebook of every page that shows code in steps."""
    made = {there: _moved(ROOT / here) for here, there in BESIDE_DOCS.items()}
    made |= {f"reference/{page}.md": text for page, text in _reference().items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for file in files.documentation_pages():
        if _in_steps(file.content_string):
            notebook = jupytext.writes(jupytext.reads(file.content_string, "md"), "ipynb")
            path = posixpath.splitext(file.src_uri)[0] + ".ipynb"
            files.append(File.generated(config, path, content=notebook))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Link to the page's notebook; name files that are not on the site instead of linking."""
    if _in_steps(markdown):
        notebook = posixpath.splitext(posixpath.basename(page.file.src_uri))[0] + ".ipynb"
        markdown = markdown.replace("\n", f"\n\n[As a notebook]({notebook})\n", 1)
    if page.file.src_uri in BESIDE_DOCS.values():
        return markdown
    for here, there in BESIDE_DOCS.items():
        up = "../" * page.file.src_uri.count("/")
        markdown = markdown.replace(f"]({up}../{here}", f"]({up}{there}")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?!docs)[^)]*\.py\)", r"\1", markdown)


def on_page_content(html: str, **_: object) -> str:
    """Show the roles of docstrings, such as ``:func:``, as the names that they hold."""
    return re.sub(r":(?:func|class|meth|mod|attr):<code>~?([^<]*)</code>", r"<code>\1</code>", html)


def _in_steps(markdown: str) -> bool:
    """Whether a page has several blocks of Python, which build on each other."""
    return markdown.count("\n```python\n") > 2


def _moved(path: Path) -> str:
    """A page of the root with its links as they are from the root of ``docs/``."""
    text = path.read_text(encoding="utf-8").replace("](docs/", "](")
    for here, there in BESIDE_DOCS.items():
        text = text.replace(f"]({here}", f"]({there}")
    return text


def _reference() -> dict[str, str]:
    """The pages of the API; an error where a public name is on none, or on several."""
    tree = ast.parse((ROOT / "analogfx" / "__init__.py").read_text(encoding="utf-8"))
    public = next(
        set(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    named = [name for _, names in REFERENCE.values() for name in names.split()]
    if sorted(named) != sorted(public):
        differing = set(named) ^ public or {name for name in named if named.count(name) > 1}
        raise PluginError(f"tools/site/pages.py, REFERENCE: {', '.join(sorted(differing))}")
    return {
        page: f"# {title}\n\n" + "\n\n".join(map(_entry, names.split())) + "\n"
        for page, (title, names) in REFERENCE.items()
    }


def _entry(name: str) -> str:
    module = ROOT / "analogfx" / name
    if module.is_dir() or module.with_suffix(".py").exists():
        return f"::: analogfx.{name}\n    options: {{show_root_full_path: true, heading_level: 2}}"
    return f"::: analogfx.{name}"
