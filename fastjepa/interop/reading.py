"""One door to weights, wherever they lie."""

from pathlib import Path

from fastjepa.interop.folder import CONFIG, load_folder
from fastjepa.interop.meta import load_meta_checkpoint
from fastjepa.interop.own import load_own_checkpoint
from fastjepa.interop.weights import Weights


def read_weights(source: str | Path) -> Weights:
    """Weights of a file of the public code, of an exported folder, or of a run of this library (or one checkpoint).

    Errors: WeightsRefused with one sentence.
    """
    path = Path(source).expanduser()
    if (path / CONFIG).is_file():
        return load_folder(path)
    if path.is_dir():
        return load_own_checkpoint(path)
    return load_meta_checkpoint(path)
