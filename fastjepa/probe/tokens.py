"""The tokens of every probed clip, kept on disk: computed once, read again in every epoch of every classifier.

2,000 clips of a ViT-L are 6.4 GB in half precision, which a training process has no memory for. One encoder is probed
after the other, so one such file is there at a time.
"""

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# More than twice a ViT-L of 2,000 clips at 224 px; larger models and several clips a video are probed on fewer videos.
MOST_BYTES = 16e9
# Of the space that is free: checkpoints have to fit beside it.
MOST_OF_FREE = 0.5


class TokenFile:
    """Rows [N, E] in float16 in a file that has no name: it is gone with the process, however that ends.

    Kept are normalised tokens (zero mean, unit variance over E, epsilon 1e-5), which every pooler makes of its tokens
    first: so the scale of an encoder cannot leave the range of float16, and no classifier does it again.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.row_shape: tuple[int, int] = (0, 0)

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, tokens: Tensor) -> None:
        """Add the rows of `tokens` [B, N, E], of any dtype and device. Errors: OSError where the disk is full."""
        self.row_shape = (tokens.shape[1], tokens.shape[2])
        rows = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-5).half().cpu()
        self._file.seek(0, 2)
        self._file.write(rows.contiguous().numpy().data.cast("B"))

    def read(self, rows: Tensor, device: torch.device) -> Tensor:
        """The rows of these numbers (int64 [B]), float32 [B, N, E] on the device. Errors: OSError."""
        found = np.empty((len(rows), *self.row_shape), dtype=np.float16)
        for place, row in zip(found, rows.tolist()):
            self._file.seek(row * place.nbytes)
            if self._file.readinto(place.data.cast("B")) != place.nbytes:
                raise OSError(f"the file of tokens ends before row {row}")
        return torch.from_numpy(found).to(device).float()


def most_clips(tokens: int, width: int, folder: Path) -> int:
    """How many rows of `tokens` x `width` may be kept in this folder."""
    room = min(MOST_BYTES, MOST_OF_FREE * shutil.disk_usage(folder).free)
    return int(room / (2 * tokens * width))
