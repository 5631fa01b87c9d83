"""The command line.

    lmim train CONFIG [section.key=value ...]        pretrain; under a launcher or alone; started again it goes on
    lmim eval knn CONFIG [section.key=value ...]     nearest-neighbour accuracy beside raw pixels and a random encoder
    lmim eval linear CONFIG                          linear probe: learning rates, poolings and blocks tried together
    lmim eval attentive CONFIG                       attentive probe: a learned query over the patch tokens
    lmim eval fewshot CONFIG                         ridge or logistic regression on a few images a class
    lmim eval finetune CONFIG [section.key=value ...]  the encoder trained on with labels; started again it goes on
    lmim eval segment CONFIG [section.key=value ...] clusters of images' patch tokens as pictures, and mIoU with masks
    lmim eval davis CONFIG [section.key=value ...]   video object segmentation by label propagation on DAVIS-2017
    lmim export SOURCE [DESTINATION --format F]      weights of any format as another's; alone: what SOURCE holds
    lmim report RUN_FOLDER [OTHER ...]               one page of a run, RUN_FOLDER/report.html; of several, compared
    lmim plan CONFIG --nodes N --gpus-per-node K     memory, speed and duration on GPUs, for every way of sharding
    lmim doctor CONFIG [section.key=value ...]       is all well for this run? alone or under its launcher, before it

CONFIG is a YAML file or a run folder. Exit codes: 0 done, 2 a mistake in what was given (one line says which), 75
stopped by a signal after a checkpoint, 1 anything else, such as a doctor's row that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmim import __version__
from lmim.config import ConfigError, load_config, neighbours_of
from lmim.data.datasets import open_source
from lmim.data.shards import INDEX, ShardIndex
from lmim.export import SUFFIXES, export, format_of
from lmim.forecast import GPUS, IMAGENET_IMAGES, Cluster, plan, print_plan
from lmim.formats import describe, read_weights
from lmim.train import DONE, MISTAKES, last_line, train

OTHER_RANKS_WAIT_S = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; users' mistakes end in one line."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings that follow an option, as in `eval knn CONFIG --which target eval.k=5`
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        return parsed.run(parsed)
    except MISTAKES as error:
        # All ranks see most mistakes: the first speaks, and the launcher ends the others before they repeat it.
        rank = os.environ.get("RANK", "0")
        words = last_line(error)
        if rank != "0":
            time.sleep(OTHER_RANKS_WAIT_S)
        print(f"error: {words}" if rank == "0" else f"error on rank {rank}: {words}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lmim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=__version__)
    # given by the deepspeed launcher, ahead of everything; the rank is read from the environment
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="pretrain")
    _add_config(command)
    command.set_defaults(run=_train)

    evaluations = commands.add_parser("eval", help="evaluate a checkpoint").add_subparsers(
        required=True, metavar="WHAT"
    )
    _add_evaluation(evaluations, "knn", _eval_knn, "nearest-neighbour accuracy by both protocols")
    _add_evaluation(evaluations, "linear", _eval_probe, "accuracy of a linear probe on frozen features")
    _add_evaluation(evaluations, "attentive", _eval_probe, "accuracy of an attentive probe on frozen patch tokens")
    _add_evaluation(evaluations, "fewshot", _eval_fewshot, "accuracy with a few labelled images a class")
    _add_evaluation(evaluations, "finetune", _eval_finetune, "accuracy of the encoder trained on with labels (MAE)")
    _add_evaluation(evaluations, "segment", _eval_segment,
                    "cluster images' patch tokens, draw them, measure mIoU where masks are given")  # fmt: skip
    _add_evaluation(evaluations, "davis", _eval_davis,
                    "carry masks through videos by the tokens' likeness, measure J and F")  # fmt: skip

    command = commands.add_parser("plan", help="tell what fits a GPU, and how fast it would go")
    _add_config(command)
    command.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    command.add_argument("--gpus-per-node", type=int, default=8, help="GPUs in each (default: 8)")
    command.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="their kind (default: h100)")
    command.add_argument("--network-gbit", type=float, default=400.0,
                         help="network between nodes, Gbit/s for each GPU (default: 400)")  # fmt: skip
    command.add_argument("--mfu", type=float, default=0.4,
                         help="share of the dense bf16 peak that is reached, an assumption (default: 0.4)")  # fmt: skip
    command.add_argument("--images", type=int, default=IMAGENET_IMAGES,
                         help="of an epoch where data.train has no index here (default: ImageNet-1K)")  # fmt: skip
    command.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    command.set_defaults(run=_plan)

    command = commands.add_parser("doctor", help="look at all that a run needs, on all its ranks, before it starts")
    _add_config(command)
    command.set_defaults(run=_doctor)

    command = commands.add_parser("export", help="convert weights, or tell what a file or folder holds")
    command.add_argument("source", type=Path, help="run folder, checkpoint, .pth, .safetensors, or a folder of "
                         "DeepSpeed, torch.distributed.checkpoint, transformers or timm")  # fmt: skip
    command.add_argument("destination", type=Path, nargs="?", help="file or folder to write; left out: tell what "
                         "SOURCE is")  # fmt: skip
    command.add_argument("--format", choices=SUFFIXES, help="of DESTINATION (default: by .pth, .safetensors, .onnx)")
    command.add_argument("--which", choices=("online", "target"),
                         help="encoder, for timm, huggingface and onnx (default: online)")  # fmt: skip
    command.add_argument("--grid", type=int, help="cells a side that positions are resized to (default: as trained)")
    command.add_argument("--num-heads", type=int, help="attention heads, where SOURCE does not tell them")
    command.add_argument("--check", action="store_true",
                         help="run both sides on the same images and print the largest difference")  # fmt: skip
    command.set_defaults(run=_export)

    command = commands.add_parser("report", help="make a page of a run, or one that compares several")
    command.add_argument("run_folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    command.add_argument("--figures", nargs="+", choices=("png", "pdf", "svg"), default=[], metavar="FORMAT",
                         help="write each figure to RUN_FOLDER/figures as well: png, pdf, svg")  # fmt: skip
    command.set_defaults(run=_report)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="YAML file or run folder")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")


def _add_evaluation(evaluations: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> None:
    command = evaluations.add_parser(name, help=help)
    _add_config(command)
    command.add_argument("--checkpoint", type=Path, help="whatever `lmim export` reads; default: run.folder")
    command.add_argument("--which", choices=("online", "target"), default="online", help="encoder (default: online)")
    command.set_defaults(run=run, evaluation=name)


def _train(parsed: argparse.Namespace) -> int:
    return train(load_config(parsed.config, parsed.overrides))


def _eval_knn(parsed: argparse.Namespace) -> int:
    from lmim.eval.knn import evaluate_checkpoint

    config = load_config(parsed.config, parsed.overrides)
    results = evaluate_checkpoint(config, parsed.checkpoint or Path(config.run.folder), parsed.which)
    if results is None:
        return 0  # another rank prints
    ks = neighbours_of(config.eval)
    columns = {"gallery" if len(ks) == 1 else f"gallery_{k}": f"gallery {k}-NN (common)" for k in ks}
    print(f"{'features':18} {'leave-one-out 1-NN (released)':>32}" + "".join(f" {c:>24}" for c in columns.values()))
    for name, accuracy in results.items():
        votes = (accuracy.get(column) for column in columns)
        words = ("no labels" if share is None else f"{100 * share:.2f} %" for share in votes)
        print(f"{name:18} {100 * accuracy['leave_one_out']:30.2f} %" + "".join(f" {word:>24}" for word in words))
    print(json.dumps(results))
    return 0


def _eval_probe(parsed: argparse.Namespace) -> int:
    from lmim.eval import attentive, linear

    config = load_config(parsed.config, parsed.overrides)
    evaluate = dict(linear=linear, attentive=attentive)[parsed.evaluation].evaluate_checkpoint
    results = evaluate(config, parsed.checkpoint or Path(config.run.folder), parsed.which)
    if results is None:
        return 0  # another rank prints
    print(f"{'features':18} {'accuracy':>10} {'held out':>10}  chosen by the held-out training images")
    for name, found in results.items():
        setting = ", ".join(f"{key} {found[key]}".replace("_", " ") for key in ("layer", "pooling", "learning_rate")
                            if key in found)  # fmt: skip
        print(f"{name:18} {100 * found['accuracy']:8.2f} % {100 * found['held_out']:8.2f} %  {setting}")
    print(json.dumps(results))
    return 0


def _eval_fewshot(parsed: argparse.Namespace) -> int:
    from lmim.eval.fewshot import evaluate_checkpoint

    config = load_config(parsed.config, parsed.overrides)
    results = evaluate_checkpoint(config, parsed.checkpoint or Path(config.run.folder), parsed.which)
    if results is None:
        return 0  # another rank prints
    probe = config.probe
    print(f"{probe.classifier}, {probe.trials} draws, mean and 95 % interval; training images a class:")
    print(f"{'features':18}" + "".join(f" {shots:>18}" for shots in probe.shots))
    for name, by_shots in results.items():
        cells = (f"{100 * found['accuracy']:.2f} ± {100 * found['interval']:.2f} %" for found in by_shots.values())
        print(f"{name:18}" + "".join(f" {cell:>18}" for cell in cells))
    print(json.dumps(results))
    return 0


def _eval_segment(parsed: argparse.Namespace) -> int:
    from lmim.eval.segment import evaluate_checkpoint

    config = load_config(parsed.config, parsed.overrides)
    figures = evaluate_checkpoint(config, parsed.checkpoint or Path(config.run.folder), parsed.which)
    if figures is None:
        return 0  # another rank prints
    miou = figures.get("miou_per_image", {})
    print(f"{'clusters':14} {'variance explained':>20}" + f" {'mIoU per image':>16}" * bool(miou))
    for name in [*figures["explained"], *(["as_mask"] if miou else [])]:
        share = [f"{100 * of[name]:.2f} %" if name in of else "" for of in (figures["explained"], miou)]
        print(f"{name.replace('as_mask', 'as in the mask'):14} {share[0]:>20} {share[1]:>16}".rstrip())
    if miou:
        print(
            f"all images in one clustering, {figures['classes']} classes: mIoU {100 * figures['miou_data_set']:.2f} %"
        )
    print(json.dumps(figures))
    return 0


def _eval_davis(parsed: argparse.Namespace) -> int:
    from lmim.eval.davis import evaluate_checkpoint

    config = load_config(parsed.config, parsed.overrides)
    figures = evaluate_checkpoint(config, parsed.checkpoint or Path(config.run.folder), parsed.which)
    if figures is None:
        return 0  # another rank prints
    if figures["objects"]:
        kinds = ("mean", "recall", "decay")
        print(f"J&F {100 * figures['J&F']:.2f} %  {''.join(f'{kind:>8}' for kind in kinds)}")
        for measure in ("J", "F"):
            print(f"{measure:12}" + "".join(f"{100 * figures[f'{measure}_{kind}']:8.2f}" for kind in kinds))
    else:
        print("masks written; no video has annotations beyond the first, so nothing is measured")
    print(json.dumps(figures))
    return 0


def _eval_finetune(parsed: argparse.Namespace) -> int:
    from lmim.eval.finetune import finetune_config, outcome

    config = load_config(parsed.config, parsed.overrides)
    made = finetune_config(config, parsed.checkpoint, parsed.which)
    code = train(made)
    results = outcome(made, Path(config.run.folder)) if code == DONE else None
    if results is None:
        return code  # it was stopped, or another rank prints
    print(f"{'fine-tuned':18} {'epochs':>8} {'top-1':>10} {'top-5':>10}")
    for name, found in results.items():
        shares = "".join(f" {100 * found[key]:8.2f} %" for key in ("top1", "top5") if key in found)
        print(f"{name:18} {found['epochs']:8g}{shares}")
    print(json.dumps(results))
    return DONE


def _plan(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.overrides)
    cluster = Cluster(parsed.nodes, parsed.gpus_per_node, parsed.gpu, parsed.network_gbit, parsed.mfu)
    if parsed.images < 1:
        raise ConfigError(f"--images ({parsed.images}) must be above 0")
    images, source = _epoch_images(config.data.train, parsed.images)
    told = {**plan(config, cluster, images), "epoch_source": source}
    if parsed.json:
        print(json.dumps(told))
    else:
        print_plan(told)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from lmim.doctor.visit import doctor

    return doctor(load_config(parsed.config, parsed.overrides))


def _epoch_images(train: str | list[str], otherwise: int) -> tuple[int, str]:
    """Return how many images an epoch has, and how that is known, without reading more than an index."""
    sources = [train] if isinstance(train, str) else train
    if all(source.startswith("embedded:") for source in sources):
        return sum(len(open_source(source).images) for source in sources), "embedded"
    if all((Path(source) / INDEX).is_file() for source in sources):
        return sum(len(ShardIndex.open(source, option="data.train")) for source in sources), "index of data.train"
    return otherwise, "by --images; data.train has no index here"


def _export(parsed: argparse.Namespace) -> int:
    if parsed.destination is None:
        told = describe(read_weights(parsed.source))
        for name, value in told.items():
            words = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name:>10}  {(', '.join(words) or 'nothing') if isinstance(words, list) else words}")
        print(json.dumps(told))
        return 0
    format = parsed.format or format_of(parsed.destination)
    if format is None:
        raise ConfigError(f"--format is not given, and {parsed.destination} does not tell it: {', '.join(SUFFIXES)}")
    done = export(parsed.source, parsed.destination, format, parsed.which, num_heads=parsed.num_heads,
                  grid=parsed.grid, check=parsed.check)  # fmt: skip
    print(f"{done.source} ({done.kind}) -> {done.destination} ({done.format}, {done.which})")
    for words in done.changed:
        print(words)
    if done.left_out:
        print(f"left out: {len(done.left_out)} tensors, from {done.left_out[0]} to {done.left_out[-1]}")
    if done.difference is not None:
        print(f"largest difference of features on the same images: {done.difference:.1e} of the largest feature")
    print(json.dumps(done._asdict()))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from lmim.eval.report import compare, report

    if os.environ.get("RANK", "0") != "0":
        return 0  # under a launcher the first rank is enough
    folders = parsed.run_folders
    told = report(folders[0], parsed.figures) if len(folders) == 1 else compare(folders, parsed.figures)
    if len(folders) == 1:
        print(f"healthy? {told['healthy']}")
    print(f"page: {told['page']}")
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
