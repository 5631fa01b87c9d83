"""Check that webdataset tar shards are whole and are what their index says.

    python tools/verify_shards.py DATA [--decode 16] [--workers 8]

DATA is a folder made by tools/shard_images.py, or any folder of tars. Every byte is read once: checksums of shards and
images, offsets against the tars' own headers, duplicate keys, counts against the index, and some or all images are
decoded. Names each damaged shard with what is wrong. Exits with 0 where all is well, 1 where something is wrong, and 2
on unusable input.
"""

from __future__ import annotations

import argparse
import logging
import sys

from lmim.config import ConfigError
from lmim.data.pool import WorkerDied
from lmim.data.progress import ImageProgress
from lmim.data.storage import Damaged, StorageError
from lmim.data.verify import ALL, Findings, verify_shards
from lmim.dist import available_cores

LISTED_CLASSES = 20


def summary(folder: str, findings: Findings) -> str:
    """Return one line: what was checked, the class histogram, and how many problems there are."""
    labels = {label: count for label, count in sorted(findings.labels.items()) if label >= 0}
    classes = "no labels"
    if 0 < len(labels) <= LISTED_CLASSES:
        names = findings.classes or {label: label for label in labels}
        classes = ", ".join(f"{names[label] if label < len(names) else label}: {n}" for label, n in labels.items())
    elif labels:
        classes = f"{len(labels)} classes of {min(labels.values())} to {max(labels.values())} samples"
    missing = findings.labels[-1]
    classes += f" ({missing} without label)" if labels and missing else ""
    verdict = f"{len(findings.problems)} problems" if findings.problems else "all is well"
    index = "" if findings.indexed else "no index, "
    return (f"{folder}: {verdict}: {findings.shards} shards, {findings.samples} samples, {findings.bytes} bytes, "
            f"{index}{findings.decoded} images decoded; {classes}")  # fmt: skip


def count(text: str) -> int:
    """Parse the number of images to decode."""
    return {"all": ALL, "none": 0}[text] if text in ("all", "none") else int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder of shards")
    parser.add_argument("--decode", type=count, default=16, metavar="all|N|none",
                        help="images of each shard to decode, evenly spread (default 16)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="default: the cores")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        with ImageProgress(options.data) as progress:
            findings = verify_shards(options.data, decode=options.decode, workers=options.workers, progress=progress)
    except ConfigError as error:
        print(f"verify_shards: {error}", file=sys.stderr)
        return 2
    except (OSError, StorageError, Damaged, WorkerDied) as error:
        print(f"verify_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("verify_shards: stopped", file=sys.stderr)
        return 130
    for shard, problem in findings.problems:
        print(f"{shard}: {problem}")
    print(summary(options.data, findings))
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
