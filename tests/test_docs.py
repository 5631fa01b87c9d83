"""Pages are held to the code: links, options, commands and files they name exist, and what they quote is printed."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import re
import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from braceexpand import braceexpand

from lmim.__main__ import _parser
from lmim.config import flatten, load_config
from lmim.options import Config
from tests.conftest import REPOSITORY

FOLDERS = ("configs", "docker", "launch", "lmim", "tests", "tools")  # others hold what users make
PAGES = [REPOSITORY / "README.md", *sorted(page for name in FOLDERS for page in (REPOSITORY / name).rglob("*.md"))]
SECTIONS = {field.name for field in dataclasses.fields(Config)}
FILES = ("json", "jsonl", "yaml", "log", "html", "py", "md")  # eval.jsonl is a file, and no option of `eval`
# theirs, as published: what the table of lmim/weights.md must take up, option by option
AUTHORS = [
    "encoder=vit_base", "decoder_depth=3", "avg_sim_coeff=0.1", "loss=infonce_patches", "patch_gap=4", "epochs=800",
    "warmup_epochs=40", "blr=1.5e-4", "min_lr_frac=0.25", "weight_decay=0.05", "batch_size=256", "accum_iter=2",
    "env.ngpu=8", "dataset=imagenet", "resume=True", "env.slurm=True",
]  # fmt: skip

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def missing_links(page: Path, text: str) -> list[str]:
    """Return the relative links that lead to no file, or to no heading of a page."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            found.append(link)
    return found


def anchors(text: str) -> set[str]:
    """Return the names under which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unknown_options(text: str) -> list[str]:
    """Return what is written as an option, `section.key`, and is none."""
    known = set(flatten(Config()))
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS))})\.(?:\w+))(?![\w(/])", text)
    return [name for name in named if name not in known and name.partition(".")[2] not in FILES]


def missing_files(text: str) -> list[str]:
    """Return the files of this repository that are named and do not exist; patterns must match some."""
    named = re.findall(r"(?<![\w./-])(?:tools|launch|configs|tests|lmim)/[\w./*{},-]*\w/?", text)
    named = [name for name in named if not re.search(r"\{\w*\}", name)]  # a program's own, as lmim/eval/{name}.png
    written = chain.from_iterable(braceexpand(name) for name in named)
    return [name for name in written  # a file that users make of an example counts by that
            if not any(REPOSITORY.glob(name.rstrip("/"))) and not (REPOSITORY / f"{name}.example").exists()
            ]  # fmt: skip


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words behind `lmim` of every command in a page's shell blocks."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n", "", block).splitlines():
            match = re.match(r"(?:lmim|deepspeed --module lmim) (.+)", line)
            if match:
                yield shlex.split(match[1], comments=True)


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table that begins with a heading, without the heading itself."""
    lines = iter(text.splitlines())
    next(line for line in lines if line == heading)
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def texts_of(source: str) -> Iterator[str]:
    """Yield every text of a Python file but its docstrings, `…` standing for what is filled in."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%(\.\d)?[sdg]", "…", node.value)


def is_printed(quoted: str, texts: list[str]) -> bool:
    """Tell whether the words of a quoted message stand in this order in one of the texts."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in texts)


@each_page
def test_links_options_and_files_exist(page):
    text = page.read_text()
    assert missing_links(page, text) == []
    assert unknown_options(text) == []
    assert missing_files(text) == []


def test_what_does_not_exist_is_found():
    page = REPOSITORY / "README.md"
    assert missing_links(page, "[a](lmim/gone.md) [b](LICENSE) [c](lmim/README.md#gone) [d](https://x.y/z)") == [
        "lmim/gone.md", "lmim/README.md#gone"
    ]  # fmt: skip
    assert unknown_options("`data.trian=x` `data.train` eval.jsonl model.save() lmim.data.x `eval.kk`") == [
        "data.trian", "eval.kk"
    ]  # fmt: skip
    named = "`tools/gone.py`, configs/vit_{tiny,tall}_imagenet1k.yaml, launch/hostfile, tests/data/golden/*/"
    assert missing_files(named) == ["tools/gone.py", "configs/vit_tall_imagenet1k.yaml"]


@each_page
def test_commands_are_those_of_the_command_line(page):
    parser = _parser()
    known = next(action.choices for action in parser._actions if action.choices)
    for words in commands(page.read_text()):
        if words[0] == "doctor" and "doctor" not in known:
            continue
        parsed, rest = parser.parse_known_args(words)
        assert not [word for word in rest if word.startswith("-")], words
        for setting in [*getattr(parsed, "overrides", []), *rest]:
            assert setting.partition("=")[0] in flatten(Config()), words


def test_the_front_page_is_one():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_every_tool_and_every_marker_has_a_row():
    text = (REPOSITORY / "tools" / "README.md").read_text()
    assert [tool.name for tool in (REPOSITORY / "tools").glob("*.py") if f"tools/{tool.name}" not in text] == []
    setup = configparser.RawConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    markers = {line.partition(":")[0] for line in setup["tool:pytest"]["markers"].split("\n") if line}
    told = {code(row[0])[0] for row in rows((REPOSITORY / "tests" / "README.md").read_text(),
                                            "| marker | | needs |") if code(row[0])}  # fmt: skip
    assert markers and markers - told == set()


def test_the_authors_command_beside_ours_is_the_recipe(tmp_path):
    table = rows((REPOSITORY / "lmim" / "weights.md").read_text(), "| theirs | ours | |")
    theirs = [word for row in table for word in code(row[0])]
    ours = [word for row in table for word in code(row[1])]
    assert theirs == AUTHORS
    nothing = tmp_path / "defaults.yaml"
    nothing.write_text("")
    recipe = load_config(REPOSITORY / "configs" / "vit_base_imagenet1k.yaml")
    assert load_config(nothing, ours) == recipe != load_config(nothing)
    batch = dict(word.split("=") for word in theirs)
    images = int(batch["batch_size"]) * int(batch["accum_iter"]) * int(batch["env.ngpu"])
    assert (images, int(batch["batch_size"])) == (recipe.data.global_batch, recipe.data.micro_batch)


def test_messages_are_quoted_as_they_are_printed():
    table = rows((REPOSITORY / "lmim" / "troubleshooting.md").read_text(), "| what is printed | why | what to do |")
    texts = [text for path in sorted((REPOSITORY / "lmim").rglob("*.py")) for text in texts_of(path.read_text())]
    quoted = [message for row in table for message in code(row[0])]
    assert len(table) >= 12 and all(len(row) == 3 and code(row[0]) for row in table)
    assert [message for message in quoted if not is_printed(message, texts)] == []
    assert not is_printed("is in use by a run that went on", texts)
    assert not is_printed("loader workers died … times in a column", texts)
