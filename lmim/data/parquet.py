"""Images in Parquet files, as Hugging Face lays them out.

Owns the reading of such files: an image column, a struct of `bytes` and `path` or plain binary, and an integer label,
whose class names the schema's metadata holds (huggingface.co/docs/datasets, "ClassLabel"). The invariant: only labels
are read while listing; images are read a row group at a time, so a row group's images are kept together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lmim.config import ConfigError
from lmim.data.sources import SPLIT_NAMES, Images, Source, SourceImage, quoted

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
OPEN_GROUPS = 2  # row groups kept decoded: one that two shards share, and the one being read
NUMBERED = re.compile(r"(.*)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


def open_parquet(spec: str, paths: Sequence[Path], option: str) -> Source:
    """List the images of Parquet files; keys are 'FILE/ROW'. ConfigError: files without images, mixed splits."""
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowInvalid
    except ImportError as error:
        raise ConfigError(f"{option} ({spec}) is Parquet, which pyarrow reads: "
                          "pip install pyarrow, or 'lmim[sources]'") from error  # fmt: skip
    _refuse_splits(spec, paths, option)
    starts, groups, labels, sizes = [0], [], [], []
    columns: tuple[str, str | None] | None = None
    classes = None
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            if columns is None:
                columns, classes = _columns(file.schema_arrow, path)
            image_column, label_column = columns
            for number in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(number)
                groups.append((str(path), number))
                starts.append(starts[-1] + group.num_rows)
                sizes.append(_image_bytes(group, image_column) // max(group.num_rows, 1))
            if label_column is not None:
                column = file.read(columns=[label_column])[label_column]
                labels.append(column.fill_null(-1).to_numpy().astype(np.int32))
        except (ArrowInvalid, OSError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path} cannot be read as Parquet of images ({reason}): download it again") from error
    bounds = np.array(starts)
    if columns is None or not bounds[-1]:
        raise ConfigError(f"{option} ({spec}) holds no rows: give other files")
    label_of = np.concatenate(labels) if labels else np.full(bounds[-1], -1, np.int32)
    first_row = {path: int(bounds[n]) for n, (path, number) in enumerate(groups) if number == 0}

    def image(i: int) -> SourceImage:
        n = int(np.searchsorted(bounds, i, side="right")) - 1
        path, number = groups[n]
        name = f"{Path(path).name}/{i - first_row[path]:06d}"
        key = f"{quoted(Path(path).stem)}/{i - first_row[path]:06d}"
        label = int(label_of[i])
        load = partial(_read_row, path, number, columns[0], i - int(bounds[n]))
        return SourceImage(key, None, None if label < 0 else label, name, load, sizes[n])

    return Source(spec, classes, Images(int(bounds[-1]), image), groups=bounds[:-1])


def _refuse_splits(spec: str, paths: Sequence[Path], option: str) -> None:
    matches = [NUMBERED.fullmatch(path.stem) for path in paths]
    names = {match[1] if match else path.stem for match, path in zip(matches, paths, strict=True)}
    splits = sorted(name for name in names if name.lower() in SPLIT_NAMES)
    if splits and len(names) > 1:
        raise ConfigError(f"{option} ({spec}) holds several splits ({', '.join(sorted(names))}): "
                          f"shard each by itself, such as '{paths[0].parent}/{splits[0]}-*.parquet'")  # fmt: skip


def _columns(schema: Any, path: Path) -> tuple[tuple[str, str | None], tuple[str, ...] | None]:
    """Return the names of the image and label columns, and the names of the classes."""
    import pyarrow as pa

    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    kinds = {name: feature.get("_type", "") for name, feature in features.items() if isinstance(feature, dict)}
    images = [name for name in (*(name for name, kind in kinds.items() if kind == "Image"), *IMAGE_COLUMNS)
              if name in schema.names and _holds_bytes(schema.field(name).type)]  # fmt: skip
    if not images:
        raise ConfigError(f"{path} has no column of images (one named {', '.join(IMAGE_COLUMNS)} or marked as Image, "
                          f"with bytes in it), but {', '.join(schema.names)}: give other files")  # fmt: skip
    labels = [name for name in (*(name for name, kind in kinds.items() if kind == "ClassLabel"), *LABEL_COLUMNS)
              if name in schema.names and pa.types.is_integer(schema.field(name).type)]  # fmt: skip
    if not labels:
        return (images[0], None), None
    classes = features.get(labels[0], {}).get("names")
    return (images[0], labels[0]), None if classes is None else tuple(classes)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_bytes(group: Any, column: str) -> int:
    chunks = (group.column(n) for n in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column)


@lru_cache(maxsize=OPEN_GROUPS)
def _row_group(path: str, number: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(number, columns=[column], use_threads=False)[column]


def _read_row(path: str, number: int, column: str, row: int) -> bytes:
    value = _row_group(path, number, column)[row].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise OSError(0, "holds no bytes")
    return data
