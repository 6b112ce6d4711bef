"""The README's tables of what works are those of the tested matrix; `python tests/test_readme.py` writes them."""

from __future__ import annotations

from pathlib import Path

from conftest import Harness
from test_matrix import attentions
from test_neighbours import NEIGHBOURS
from tiny import PIPELINES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- matrix: made by tests/test_readme.py -->", "<!-- end of matrix -->"


def tables() -> str:
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


def with_tables(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


def test_the_readme_tells_what_is_tested():
    text = README.read_text()
    assert with_tables(text) == text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
