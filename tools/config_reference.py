"""Write configs/README.md: every option with its default, the values it may have and what it means.

    python tools/config_reference.py [--check]     --check writes nothing, and exits with 1 where the file is outdated

All of it is read from `lmim/options.py`: defaults and types of the dataclasses, the comments beside them, the tables
of what is allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmim import options
from lmim.options import BELOW_ONE, CHOICES, NEUTRAL, NOT_NEGATIVE, POSITIVE, UNIT_INTERVAL, Config

PAGE = Path(__file__).parent.parent / "configs" / "README.md"
RANGES = {"above 0": POSITIVE, "0 or above": NOT_NEGATIVE, "0 to 1": UNIT_INTERVAL, "0 to below 1": BELOW_ONE}
KINDS = {
    "Any": "text or list",
    "str": "text",
    "bool": "`true`, `false`",
    "int": "whole number",
    "float": "number",
    "list[str]": "list",
    "list[int]": "list of whole numbers",
    "list[float]": "list of numbers",
}
HEAD = """# Every option

`lmim COMMAND CONFIG [section.key=value ...]`: CONFIG is a file of this folder, one of your own (`base: other.yaml`
takes another as its start) or a run folder, and what is written behind it comes last. An unknown key is an error that
names the nearest one. This page is written by `python tools/config_reference.py` from `lmim/options.py`.

Durations are `800ep` (epochs), `125000st` (steps) or `5%` (of the run). *empty* is nothing: `data.eval=`. Options
marked † may differ when a run is resumed; others change what is computed, and a resumed run refuses them.
"""


def comments(source: str) -> dict[int, str]:
    """Return the comments of a source by line, those that stand alone by the line below them."""
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            alone = not token.line[: token.start[1]].strip()
            found[line + alone] = token.string.lstrip("# ").strip()
    return found


def shown(value: Any) -> str:
    """Return a default as it would be written in a file or on the command line."""
    if value is None or value == "":
        return "*empty*"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(f'{x:.6g}' if isinstance(x, float) else str(x) for x in value)}]`"
    return f"`{value}`"


def allowed(key: str, annotation: str) -> str:
    """Return in words which values an option may have."""
    if key in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[key])
    words = KINDS[re.sub(r"Optional\[(.*)\]", r"\1", annotation)]
    bounds = [name for name, keys in RANGES.items() if key in keys]
    return ", ".join([words, *bounds[-1:]])


def sections() -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yield each section's name and its rows: key, default, allowed values, meaning."""
    source = Path(options.__file__).read_text()
    beside, classes = comments(source), {n.name: n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
    for section in dataclasses.fields(Config):
        defaults, rows = getattr(Config(), section.name), []
        for statement in classes[section.type].body:
            if not isinstance(statement, ast.AnnAssign):
                continue
            name, key = statement.target.id, f"{section.name}.{statement.target.id}"
            neutral = any(key == n or (n.endswith(".") and key.startswith(n)) for n in NEUTRAL)
            values = allowed(key, ast.unparse(statement.annotation))
            meaning = beside.get(statement.lineno) or beside[statement.end_lineno]
            rows.append((f"`{name}`" + " †" * neutral, shown(getattr(defaults, name)), values, meaning))
        yield section.name, rows


def page() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for name, rows in sections():
        lines += [f"## {name}\n", "| option | default | values | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with the one there is."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if arguments:
        same = PAGE.is_file() and PAGE.read_text() == page()
        print(f"{PAGE.name} is {'up to date' if same else 'out of date: python tools/config_reference.py'}")
        return 0 if same else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
