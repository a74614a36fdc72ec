"""Write the table of tasks in docs/evaluate.md: ``python -m eval.tasks``."""

from __future__ import annotations

from pathlib import Path

from eval.tasks import get_task, names
from vtc.files import write_text

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
_HEAD = "| task | shows | files | from | licence |\n|---|---|---|---|---|\n"


def with_table(page: str) -> str:
    """Return the page with a new table of tasks, which is its last element."""
    before, _, _ = page.partition(_HEAD)
    tasks = [get_task(name) for name in names()]
    lines = [f"| `{t.name}` | {t.modality} | {t.layout} | {t.source} | {t.licence} |\n" for t in tasks]
    return before + _HEAD + "".join(lines)


if __name__ == "__main__":
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
