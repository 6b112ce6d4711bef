"""The README's tables are made from the tested matrix and the registry of layouts, by `python tests/test_readme.py`."""

from __future__ import annotations

from pathlib import Path

from conftest import Harness
from test_matrix import attentions
from test_neighbours import NEIGHBOURS
from tiny import PIPELINES

from diffusers_sae.loaders.formats import FORMATS
from diffusers_sae.loaders.known import RECORDS

README = Path(__file__).parents[1] / "README.md"


def matrix() -> str:
    """The families with the site that is tested, and the neighbours."""
    lines = ["| family | class | steered at | attention in it | rows of a step |", "|---|---|---|---|---|"]
    for name, tiny in PIPELINES.items():
        harness = Harness(name)
        streams: dict[str, list[str]] = {}
        for site in attentions(harness):
            streams.setdefault(site.path.removeprefix(tiny.site).rpartition(".")[2], []).append(site.stream)
        inner = ", ".join(
            f"`{at}`{' (image, text)' if len(of) > 1 else ''}" if at else "itself" for at, of in streams.items()
        )
        cells = name, f"`{type(harness.bare).__name__}`", f"`{tiny.site}`", inner, ", ".join(tiny.branches)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| beside | with | loaded before or after |", "|---|---|---|"]
    for name, neighbour in NEIGHBOURS.items():
        taken_off = "both, and taken off" if neighbour.off else "both"
        lines.append(f"| {name} | {', '.join(neighbour.kinds)} | {taken_off} |")
    return "\n".join(lines)


def layouts() -> str:
    """The layouts of SAE files that are read, and whether they are written."""
    lines = ["| layout | of | codes | written |", "|---|---|---|---|"]
    for layout in FORMATS.values():
        cells = f"`{layout.name}`", layout.whose, layout.rule, "yes" if layout.write else ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def known() -> str:
    """The repositories whose site is known."""
    lines = ["| repository | subfolders | trained on |", "|---|---|---|"]
    for name, record in RECORDS.items():
        base = record.base_model or (record.note or "").removeprefix("trained on ")
        lines.append(f"| `{name}` | {', '.join(record.nicknames)} | {base} |")
    return "\n".join(lines)


TABLES = {"matrix": matrix, "layouts": layouts, "known": known}


def with_tables(text: str) -> str:
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: made by tests/test_readme.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


def test_the_readme_tells_what_is_tested():
    text = README.read_text()
    assert with_tables(text) == text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
