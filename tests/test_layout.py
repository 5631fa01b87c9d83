"""The house rules that a machine can hold: imports go downward, optional packages stay out, the top level is fixed."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Every module of the package and its floor; an import must lead to a lower one. "" is lmim/__init__.py.
LEVELS = {
    "options": -1, "config": 0, "randomness": 0, "version": 0, "data": 0, "eval": 0,
    "patches": 1, "schedules": 1, "optim": 1, "heartbeat": 0.5, "dist": 1, "stop": 1.2,
    "vit": 1.5, "store": 1.5,
    "norms": 1.6, "objective": 2, "classifier": 2, "data.augment": 2.2, "convert": 2, "data.transforms": 2,
    "metrics": 2.2, "checkpoint": 2.2, "health": 2.2, "data.sources": 2.2, "data.plan": 2.2, "data.nvjpeg": 2.2,
    "profiling": 2.2, "forecast": 2.3, "pickles": 1, "formats": 2.3, "export": 2.4,
    "data.memory": 2.2, "data.progress": 2.2, "data.storage": 2.25, "data.cache": 2.3, "data.pool": 2.3,
    "data.shards": 2.4,
    "data.archives": 2.5, "data.parquet": 2.5, "data.unfinished": 2.5,
    "data.datasets": 2.6, "data.sharding": 2.6,
    "data.verify": 2.7,
    "parallel": 3, "parallel.engine": 3, "data.loader": 3,
    "parallel.local": 3.5, "parallel.fsdp": 3.5, "parallel.deepspeed": 3.5,
    "eval.feature_cache": 4, "eval.features": 4.1, "eval.clusters": 4, "eval.results": 4,
    "eval.masks": 4, "eval.panels": 4, "eval.session": 4.1, "eval.case": 4.2,
    "eval.knn": 4.3, "eval.fewshot": 4.3, "eval.linear": 4.3, "eval.attentive": 4.35, "eval.segment": 4.3,
    "eval.davis": 4.3, "eval.in_loop": 4.4, "eval.finetune": 4.3,
    "eval.history": 4.4, "eval.curves": 4.45, "eval.svg": 4.5, "eval.verdict": 4.52, "eval.token_maps": 4.5,
    "eval.tables": 4.55, "eval.figures": 4.55,
    "eval.page": 4.6, "eval.report": 4.7,
    "resume": 4.8,
    "task": 4.9,
    "train": 5,
    "doctor": 0, "doctor.memory": 1, "doctor.rows": 5.1, "doctor.trial": 5.2, "doctor.machine": 5.2,
    "doctor.folder": 5.2, "doctor.images": 5.2, "doctor.arithmetic": 5.2, "doctor.reached": 5.3, "doctor.step": 5.3,
    "doctor.visit": 5.4,
    "": 5.5,
    "__main__": 6,
}  # fmt: skip
# The choice of a backend opens the chosen one only, inside a function: the one way up.
DEFERRED = {("parallel", f"parallel.{name}") for name in ("local", "fsdp", "deepspeed")}
OPTIONAL = (
    "deepspeed",
    "wandb",
    "tensorboard",
    "matplotlib",
    "sklearn",
    "scipy",
    "pyarrow",
    "transformers",
    "onnxruntime",
    "onnxscript",
)
TOP_LEVEL = {"lmim", "configs", "launch", "tools", "tests", "docker", "README.md", "setup.cfg", "LICENSE",
             "pyproject.toml", ".ci", ".gitignore", ".dockerignore"}  # fmt: skip


def package_sources() -> dict[str, str]:
    """Return {module: source}, modules named as in LEVELS."""
    sources = {}
    for path in sorted((ROOT / "lmim").rglob("*.py")):
        parts = path.relative_to(ROOT / "lmim").with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield (absolute dotted name, whether inside a function) of every import, names of a `from` included."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    inner = {id(n) for function in functions for n in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", id(node) in inner) for alias in node.names)


def own_target(name: str) -> str | None:
    """Return the module of LEVELS that a dotted name leads to, None for other packages, "?" for an unknown module."""
    if name.startswith("."):
        return "?"
    first, _, rest = name.partition(".")
    if first != "lmim":
        return None
    if rest in LEVELS:
        return rest
    above = rest.rpartition(".")[0]
    return above if above in LEVELS else "?"


def breaches(sources: dict[str, str]) -> list[str]:
    found = []
    for module, source in sources.items():
        if module not in LEVELS:
            found.append(f"{module} has no level")
            continue
        for name, inside in imports(source):
            target = own_target(name)
            if target == "?":
                found.append(f"{module} imports {name}, which is relative or unknown")
            elif (
                target is not None
                and LEVELS[target] >= LEVELS[module]
                and not (inside and (module, target) in DEFERRED)
            ):
                found.append(f"{module} imports {name} upward")
    return found


def users_of(sources: dict[str, str], dotted: str) -> set[str]:
    """Return the modules that import a dotted name or write it as an attribute chain."""
    package = dotted.partition(".")[0]
    found = set()
    for module, source in sources.items():
        chains = {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
        names = {name for name, _ in imports(source)}
        if dotted in chains or any(name == dotted or name.startswith(dotted + ".") for name in names):
            found.add(module)
        assert f"import {package} as" not in source, f"{module} renames {package}"
    return found


def test_imports_go_downward_only():
    assert breaches(package_sources()) == []


def test_every_level_is_a_module_that_exists():
    assert set(LEVELS) == set(package_sources())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "from lmim.vit import VisionTransformer"),
        ("patches", "import lmim.objective"),
        ("patches", "from lmim import schedules"),
        ("parallel.local", "def f():\n    from lmim.parallel.deepspeed import DeepSpeedBackend"),
        ("parallel.deepspeed", "from lmim.parallel import local"),
        ("parallel", "from lmim.parallel.local import LocalBackend"),
        ("eval.features", "from lmim.eval import knn"),
        ("train", "from lmim import load_config"),
        ("vit", "from .patches import tile_patches"),
        ("vit", "from lmim.utils import helper"),
        ("helpers", ""),
    ],
)
def test_the_checker_catches_a_breach(module, source):
    assert len(breaches({module: source})) == 1


def test_the_checker_lets_downward_and_foreign_imports_pass():
    down = "import torch\nfrom lmim import checkpoint, dist\nfrom lmim.parallel import Backend\nimport lmim.eval.knn"
    assert breaches({"train": down, "parallel": "def f():\n    from lmim.parallel.local import LocalBackend"}) == []


def test_distribution_and_environment_are_touched_in_their_places_only():
    sources = package_sources()
    distributed = users_of(sources, "torch.distributed")
    assert {m for m in distributed if m.split(".")[0] != "parallel"} <= {"dist", "store", "pickles"}
    assert "dist" in distributed  # else the search finds nothing at all
    environment = users_of(sources, "os.environ") | users_of(sources, "os.getenv") | users_of(sources, "os.putenv")
    assert environment <= {"dist", "profiling", "__main__"}
    assert "dist" in environment


def test_optional_packages_are_imported_inside_functions_only():
    for module, source in package_sources().items():
        at_import = {name.split(".")[0] for name, inside in imports(source) if not inside}
        allowed = {"deepspeed"} if module == "parallel.deepspeed" else set()
        assert at_import & set(OPTIONAL) <= allowed, module


def test_import_lmim_is_quiet_and_loads_no_optional_package():
    # timm by itself imports wandb where that is installed; what lmim adds is none of them
    code = (
        "import sys, json, timm; before = set(sys.modules); import lmim; print(json.dumps([*before, 0, *sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    loaded = json.loads(done.stdout)
    by_timm, after = set(loaded[: loaded.index(0)]), set(loaded[loaded.index(0) :])
    assert "lmim.train" in after
    assert (after - by_timm) & set(OPTIONAL) == set()
    assert by_timm & set(OPTIONAL) <= {"wandb"}
    assert done.stderr == ""


def test_the_top_level_is_fixed():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    found = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert found <= TOP_LEVEL
    assert found >= TOP_LEVEL - {"docker", ".dockerignore"}
