"""Make the photos of the benchmark: 800 JPEGs of 500 x 375 px, quality 94, in 40 class folders.

    make_photos.py DST

The pictures are those of the Debian package plasma-workspace-wallpapers: 20 crops each, from 500 x 375 px at full
resolution to as much as fits, brought down to 500 x 375 px. Where the package is not installed it is downloaded with
apt-get and unpacked to a temporary folder. The same package and Pillow give the same bytes.

Ends with code 0, with 1 if the package is out of reach, with 2 if DST holds anything.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

PACKAGE = "plasma-workspace-wallpapers"
PICTURES, CROPS = 40, 20
WIDTH, HEIGHT, QUALITY = 500, 375, 94
SMALLEST_SIDE = 1000  # px; the package's smaller pictures are copies for phones


class MissingPackageError(Exception):
    """The package is not installed and cannot be downloaded; says what apt-get said."""


def find_pictures(scratch: Path) -> list[Path]:
    """Return the package's 40 large pictures, sorted; downloads and unpacks it to `scratch` if not installed."""
    listed = subprocess.run(["dpkg", "-L", PACKAGE], capture_output=True, text=True)
    if listed.returncode == 0:
        files = [Path(line) for line in listed.stdout.splitlines()]
    else:
        _download(scratch)
        files = list(scratch.rglob("*"))
    pictures = [path for path in files if path.parent.name.startswith("images") and _short_side(path) >= SMALLEST_SIDE]
    if len(pictures) != PICTURES:
        raise MissingPackageError(f"{PACKAGE} holds {len(pictures)} large pictures, not {PICTURES}: another version?")
    return sorted(pictures, key=_class_name)


def _download(folder: Path) -> None:
    print(f"{PACKAGE} is not installed: downloading it", file=sys.stderr)
    try:
        subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise MissingPackageError(f"{error.filename} is missing: unpack Debian's {PACKAGE} by hand") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise MissingPackageError(f"cannot get {PACKAGE} (try apt-get update, or install it): {said}") from error


def _short_side(path: Path) -> int:
    """Return the short side in px of a picture named by its size (5120x2880.png), 0 for links and other files."""
    sides = path.stem.split("x")
    plain = path.is_file() and not path.is_symlink() and len(sides) == 2 and all(side.isdigit() for side in sides)
    return min(map(int, sides)) if plain else 0


def _class_name(path: Path) -> str:
    wallpaper, variant = path.parts[-4], path.parent.name.removeprefix("images")
    return f"{wallpaper}{variant}_{path.stem}"


def write_crops(picture: Path, folder: Path) -> None:
    """Write 20 random crops of a picture, drawn by its name."""
    folder.mkdir(parents=True)
    draw = random.Random(folder.name)
    image = Image.open(picture).convert("RGB")
    largest = min(image.width / WIDTH, image.height / HEIGHT)
    for number in range(CROPS):
        zoom = draw.uniform(1, largest)
        w, h = int(WIDTH * zoom), int(HEIGHT * zoom)
        left, top = draw.randint(0, image.width - w), draw.randint(0, image.height - h)
        crop = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        crop.save(folder / f"{number:02d}.jpg", quality=QUALITY)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dst", metavar="DST", type=Path, help="new or empty folder for the photos")
    dst = parser.parse_args(arguments).dst
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        print(f"make_photos: {dst} holds something: give a new or empty folder", file=sys.stderr)
        return 2
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for done, picture in enumerate(find_pictures(Path(scratch)), start=1):
                write_crops(picture, dst / _class_name(picture))
                rate = done * CROPS / (time.monotonic() - start)
                eta_s = (PICTURES - done) * CROPS / rate
                print(f"\r{done * CROPS}/{PICTURES * CROPS} photos, {rate:.0f} images/s, ETA {eta_s:.0f} s ",
                      end="", file=sys.stderr, flush=True)  # fmt: skip
    except MissingPackageError as error:
        print(f"make_photos: {error}", file=sys.stderr)
        return 1
    photos = sorted(dst.rglob("*.jpg"))
    total = sum(path.stat().st_size for path in photos)
    print(f"\n{dst}: {len(photos)} photos in {PICTURES} classes, {total / len(photos) / 1000:.1f} kB each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
