"""Train and evaluate by plain `lmim` commands, and put what they find into one table.

    study.py evaluations [RUN_FOLDER] [section.key=value ...]   raw pixels, a random encoder and a run's, evaluated
    study.py ablations [CONFIG] [section.key=value ...]         what each part of the method is worth, over seeds
    study.py table [RECORD ...]                                 the tables of records, as Markdown

evaluations: nearest neighbours, linear probe, few-shot and fine-tuning. A run folder that is not complete is trained
first. `finetune` of the random encoder is training from scratch with labels, for as long.
ablations: each row differs from the whole method (the first) by what its name says, all else is CONFIG's. As many runs
at once as there are GPUs, or cores. Started again it goes on: what is complete is not trained again.

Both write a record with every command to tools/bench_results.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, progress_bar, write_figures

from lmim.dist import available_cores
from lmim.metrics import LOG_FILE, read_rows

QUICKSTART = "configs/quickstart.yaml"
SUBJECTS = {"pixels": "raw pixels", "random": "random encoder", "online": "trained encoder"}

# What differs from CONFIG in each row of the ablations: first the whole method, then what it is without.
WHOLE = ["objective.similarity_weight=0.1"]
ABLATIONS = {
    "whole": ("the whole method", ""),
    "joint": ("no moving average: joint targets", "objective.target=joint"),
    "mse": ("direct prediction: MSE", "objective.loss=mse"),
    "no_gaps": ("no gaps", "model.patch_gap=0"),
    "no_penalty": ("no similarity penalty", "objective.similarity_weight=0"),
    "self_attention": ("decoder of self-attention only", "model.decoder_attention=self"),
    "no_cues": ("no visual cues", "model.visual_cues=false"),
    "no_projector": ("no projector", "model.projector_depth=0"),
}
ABLATION_EVALUATION = ["eval.baselines=[]", "probe.poolings=[patch_mean]"]
LAST_SHARE = 0.05  # of a run, over which values of its log are averaged


class CommandFailed(Exception):
    """A command that ended in something other than 0: the command, and the last line that it wrote."""


def lmim(*words: str, environment: dict[str, str] | None = None, echo: bool = False) -> tuple[str, str]:
    """Run an `lmim` command and return it, as a user would type it, with the last line it prints."""
    told, last = shlex.join(["lmim", *words]), ""
    with subprocess.Popen([sys.executable, "-m", "lmim", *words], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | (environment or {})) as process:  # fmt: skip
        for line in process.stdout:
            last = line.strip() or last
            if echo:
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise CommandFailed(f"{told}: exit code {process.returncode}: {last}")
    return told, last


# --- one run, every evaluation ---------------------------------------------------------------------------------------


def run_evaluations(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a run, train it before where it is not complete, and return what was found."""
    began = time.perf_counter()
    settings = [f"run.folder={options.run_folder}", *options.overrides]
    commands, found = [], {}
    source = options.run_folder if (Path(options.run_folder) / "config.yaml").is_file() else QUICKSTART

    def do(*words: str) -> dict[str, Any]:
        print(f"\n== lmim {shlex.join(words)}", file=sys.stderr)
        command, last = lmim(*words, *settings, echo=True)
        commands.append(command)
        return json.loads(last) if words[0] == "eval" else {}

    if not (Path(options.run_folder) / "done.json").is_file():
        do("train", source)
    for name in ("knn", "linear", "fewshot"):
        found[name] = do("eval", name, options.run_folder)
    found["finetune"] = do("eval", "finetune", options.run_folder)
    found["finetune"] |= do("eval", "finetune", options.run_folder, "finetune.scratch=true")
    return dict(commands=commands, found=found, minutes=round((time.perf_counter() - began) / 60, 1))


def evaluations_table(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of a record of evaluations."""
    found = record["found"]
    shots = next(iter(found["fewshot"].values()))
    headings = ["1-NN, leave-one-out", "20-NN, train as gallery", "linear probe"]
    headings += [f"{count} image{'s' * (int(count) > 1)} a class" for count in shots] + ["fine-tuned"]
    yield from _heading("", headings)
    for name, words in SUBJECTS.items():
        knn, linear = found["knn"][name], found["linear"][name]
        cells = [f"{100 * share:.1f}" for share in (knn["leave_one_out"], knn["gallery"], linear["accuracy"])]
        cells += [f"{100 * few['accuracy']:.1f} ± {100 * few['interval']:.1f}"
                  for few in found["fewshot"][name].values()]  # fmt: skip
        tuned = found["finetune"].get({"random": "scratch"}.get(name, name))
        yield _row(words, [*cells, f"{100 * tuned['top1']:.1f}" if tuned else "–"])


# --- the ablations ---------------------------------------------------------------------------------------------------


def slots() -> list[dict[str, str]]:
    """Return the environments of the runs that go on at once: a GPU each, or a core."""
    if torch.cuda.is_available():
        return [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in range(torch.cuda.device_count())]
    return [{"OMP_NUM_THREADS": "1"} for _ in range(available_cores())]


def run_ablations(options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate every row with every seed, and return what was found."""
    rows = options.rows
    jobs = [(name, seed) for seed in range(options.seeds) for name in rows]
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in slots():
        free.put(slot)
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in rows}
    with progress_bar() as progress:
        task = progress.add_task("runs", total=len(jobs))

        def do(job: tuple[str, int]) -> None:
            name, seed = job
            slot = free.get()
            try:
                runs[name][seed] = one_run(options, name, seed, slot)
            finally:
                free.put(slot)
            progress.advance(task)

        with ThreadPoolExecutor(free.qsize()) as pool:
            list(pool.map(do, jobs))
    seeds = {name: [found[seed] for seed in sorted(found)] for name, found in runs.items()}
    return dict(config=options.config, overrides=options.overrides, rows=seeds)


def one_run(options: argparse.Namespace, name: str, seed: int, slot: dict[str, str]) -> dict[str, Any]:
    """Train one row with one seed, unless that is done, and return its commands and figures."""
    folder = Path(options.runs) / name / f"seed_{seed}"
    settings = [*WHOLE, *filter(None, ABLATIONS[name][1:]), *options.overrides]
    settings += [f"run.folder={folder}", f"run.seed={seed}"]
    commands = [lmim("train", options.config, *settings, environment=slot)[0]]
    found = {}
    for evaluation in ("knn", "linear"):
        command, last = lmim("eval", evaluation, str(folder), *ABLATION_EVALUATION, environment=slot)
        commands.append(command)
        found[evaluation] = json.loads(last)["online"]
    log = read_rows(folder / LOG_FILE)
    last_rows = log[-max(round(LAST_SHARE * len(log)), 1) :]
    values = {key: statistics.fmean(row[key] for row in last_rows)
              for key in ("loss", "similarity_targets", "similarity_positions")}  # fmt: skip
    return dict(commands=commands, **values, leave_one_out=found["knn"]["leave_one_out"],
                gallery=found["knn"]["gallery"], linear=found["linear"]["accuracy"])  # fmt: skip


def ablations_table(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of a record of ablations: means over seeds ± their standard deviation."""
    headings = {
        "leave_one_out": "1-NN, leave-one-out",
        "gallery": "20-NN, train as gallery",
        "linear": "linear probe",
        "similarity_targets": "cosine of targets in an image",
        "similarity_positions": "… of images at a position",
    }
    yield from _heading("", list(headings.values()))
    for name, runs in record["rows"].items():
        cells = []
        for key in headings:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.2f} ± {spread:.2f}" if key.startswith("similarity")
                         else f"{100 * statistics.fmean(values):.1f} ± {100 * spread:.1f}")  # fmt: skip
        yield _row(ABLATIONS[name][0], cells)


# --- tables and the command line -------------------------------------------------------------------------------------


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _heading(corner: str, headings: Sequence[str]) -> Iterator[str]:
    yield _row(corner, headings)
    yield "|---" + "|---:" * len(headings) + "|"


TABLES = {"evaluations": evaluations_table, "ablations": ablations_table}


def print_tables(paths: Sequence[Path]) -> None:
    """Print the tables of records."""
    for path in paths:
        record = json.loads(path.read_text())
        if record["benchmark"] in TABLES:
            print(f"{path.name}\n")
            print("\n".join(TABLES[record["benchmark"]](record)) + "\n")


def rows_of(text: str) -> list[str]:
    """Parse 'whole,joint'."""
    if unknown := [name for name in text.split(",") if name not in ABLATIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(ABLATIONS)}")
    return text.split(",")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    evaluations = commands.add_parser("evaluations", help="raw pixels, a random encoder and a run's, evaluated")
    evaluations.add_argument("run_folder", nargs="?", default="runs/quickstart", metavar="RUN_FOLDER")
    ablations = commands.add_parser("ablations", help="what each part of the method is worth")
    ablations.add_argument("config", nargs="?", default=QUICKSTART, metavar="CONFIG")
    ablations.add_argument("--seeds", type=int, default=3, metavar="N", help="of each row (default 3)")
    ablations.add_argument("--rows", type=rows_of, default=list(ABLATIONS), metavar="A,B",
                           help=f"only these of {', '.join(ABLATIONS)}")  # fmt: skip
    ablations.add_argument("--runs", default="runs/ablations", metavar="DIR", help="where runs lie")
    for command in (evaluations, ablations):
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    table = commands.add_parser("table", help="the tables of records, as Markdown")
    table.add_argument("records", nargs="*", type=Path, metavar="RECORD", help="default: all there are")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    if options.command == "table":
        print_tables(options.records or sorted(RESULTS.glob("*.json")))
        return 0
    if options.command == "evaluations" and "=" in options.run_folder:
        options.run_folder, options.overrides = "runs/quickstart", [options.run_folder, *options.overrides]
    if options.command == "ablations" and "=" in options.config:
        options.config, options.overrides = QUICKSTART, [options.config, *options.overrides]
    try:
        figures = (run_evaluations if options.command == "evaluations" else run_ablations)(options)
    except CommandFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = write_figures(options.command, figures)
    print_tables([path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
