"""Features in a file, written as they come: `.safetensors` or `.parquet`. W: windows.

A safetensors file has a header in front, with the number of windows. Room for it is kept, and it is written last, when
it is known what could be read: so nothing but the index (24 bytes a window) is held in memory.

```
features       float32 or float16 [W, E], [W, t, E] or [W, N, E]
video          int64 [W]: place in the list `videos` of the metadata (JSON)
start_frame    int64 [W]        start_seconds  float64 [W], NaN where nothing tells
```
"""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from fastjepa.interop.commit import committed, refuse_taken

STORED = {"float32": (torch.float32, "F32", 4), "float16": (torch.float16, "F16", 2)}
LONGEST_HEADER = 90_000_000  # bytes; readers of safetensors take 100 MB
MOST_ROWS = 10**15  # a number as long as any
ROW_GROUP = 64_000_000  # bytes of features in memory before they are written to a parquet file


class FeatureFile(Protocol):
    """Rows in, file out."""

    def append(self, features: Tensor, video: Tensor, start_frame: Tensor, start_seconds: Tensor) -> None:
        """Add rows of features [B, ...] and where they are from, each [B]."""

    def finish(self) -> None:
        """Write what is still missing."""


Make = Callable[[tuple[int, ...], list[str], dict[str, list[str]], dict[str, str]], FeatureFile]


@contextmanager
def open_file(out: Path, store: str) -> Iterator[Make]:
    """What makes the file, from (shape of a row, videos, labels by task, facts); it takes its name in the end.

    Errors: ValueError for another suffix, a precision that is none or a file that exists, before anything is computed;
    ImportError becomes one too.
    """
    if store not in STORED:
        raise ValueError(f"store: expected {' or '.join(STORED)}, given {store!r}")
    if out.suffix not in (".safetensors", ".parquet"):
        raise ValueError(f"--out: expected a name that ends in .safetensors or .parquet, given {str(out)!r}")
    refuse_taken(out)
    if out.is_dir():
        raise ValueError(f"--out: expected a file, given {out}, which is a folder")
    if out.suffix == ".parquet":
        _pyarrow()
    with committed(out) as scratch:
        made: list[Any] = []

        def make(*arguments: Any) -> FeatureFile:
            made.append((_Safetensors if out.suffix == ".safetensors" else _Parquet)(scratch, store, *arguments))
            return made[0]

        try:
            yield make
        finally:
            for file in made:
                file.close()


class _Safetensors:
    def __init__(
        self,
        path: Path,
        store: str,
        shape: tuple[int, ...],
        videos: list[str],
        labels: dict[str, list[str]],
        facts: dict[str, str],
    ) -> None:
        self.shape, (self.dtype, self.name, self.bytes) = shape, STORED[store]
        self.metadata = {**facts, "videos": json.dumps(videos), "labels": json.dumps(labels)}
        self.rows = 0
        self.index: tuple[list[Tensor], ...] = ([], [], [])
        self.room = len(self._header(MOST_ROWS))
        if self.room > LONGEST_HEADER:
            raise ValueError(
                f"--out: the names of {len(videos):,} videos are too long for a safetensors file: name a .parquet file"
            )
        self.file: BinaryIO = path.open("wb")
        self.file.write(bytes(8 + self.room))

    def append(self, features: Tensor, video: Tensor, start_frame: Tensor, start_seconds: Tensor) -> None:
        self.file.write(_bytes(features.to(self.dtype)))
        self.rows += len(features)
        for column, values in zip(self.index, (video, start_frame, start_seconds)):
            column.append(values)

    def finish(self) -> None:
        for column in self.index:
            self.file.write(_bytes(torch.cat(column)))
        header = self._header(self.rows)
        self.file.seek(0)
        self.file.write(struct.pack("<Q", self.room) + header.ljust(self.room))
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _header(self, rows: int) -> bytes:
        """Padded to a multiple of 8 bytes, as readers expect it."""
        entries: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        columns = (("video", "I64", 8), ("start_frame", "I64", 8), ("start_seconds", "F64", 8))
        for name, kind, size in (("features", self.name, self.bytes * prod(self.shape)), *columns):
            shape = [rows, *self.shape] if name == "features" else [rows]
            entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + rows * size]}
            end += rows * size
        text = json.dumps(entries).encode()
        return text.ljust(-(-len(text) // 8) * 8)


class _Parquet:
    """Columns path, label (or label_TASK), start_frame, start_seconds, feature (flattened; its shape in the schema)."""

    def __init__(
        self,
        path: Path,
        store: str,
        shape: tuple[int, ...],
        videos: list[str],
        labels: dict[str, list[str]],
        facts: dict[str, str],
    ) -> None:
        self.pa, self.parquet = _pyarrow()
        self.shape, self.dtype, self.videos = shape, STORED[store][0], videos
        self.labels = {"label" if task == "label" else f"label_{task}": names for task, names in labels.items()}
        value = self.pa.float32() if store == "float32" else self.pa.float16()
        columns = [("path", self.pa.string())]
        columns += [(name, self.pa.string()) for name in self.labels]
        columns += [
            ("start_frame", self.pa.int64()),
            ("start_seconds", self.pa.float64()),
            ("feature", self.pa.list_(value, prod(shape))),
        ]
        self.schema = self.pa.schema(columns, metadata={**facts, "shape": json.dumps(list(shape))})
        self.writer = self.parquet.ParquetWriter(path, self.schema)
        self.held: list[tuple[Tensor, ...]] = []
        self.held_bytes = 0

    def append(self, features: Tensor, video: Tensor, start_frame: Tensor, start_seconds: Tensor) -> None:
        self.held.append((features.to(self.dtype), video, start_frame, start_seconds))
        self.held_bytes += features.numel() * features.element_size()
        if self.held_bytes >= ROW_GROUP:
            self._write()

    def finish(self) -> None:
        if self.held:
            self._write()

    def close(self) -> None:
        self.writer.close()

    def _write(self) -> None:
        features, video, frames, seconds = (torch.cat(column) for column in zip(*self.held))
        names = video.tolist()
        flat = self.pa.array(features.flatten().numpy())
        arrays = [self.pa.array([_utf8(self.videos[n]) for n in names])]
        arrays += [self.pa.array([labels[n] for n in names]) for labels in self.labels.values()]
        known = seconds.numpy()
        arrays += [
            self.pa.array(frames.numpy()),
            self.pa.array(known, mask=np.isnan(known)),
            self.pa.FixedSizeListArray.from_arrays(flat, prod(self.shape)),
        ]
        self.writer.write_table(self.pa.Table.from_arrays(arrays, schema=self.schema))
        self.held, self.held_bytes = [], 0


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data.cast("B")


def _utf8(name: str) -> str:
    """Names are any bytes that a file system allows; a column of texts takes UTF-8 alone."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("--out: .parquet needs pyarrow: pip install pyarrow, or name a .safetensors file") from None
    return pyarrow, pyarrow.parquet


def read_features(path: str | Path) -> tuple[dict[str, Tensor], Sequence[str]]:
    """(the tensors, names of the videos) of a `.safetensors` file of features."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()["videos"])  # noqa: SIM118
