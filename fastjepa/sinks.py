"""Where the numbers and pictures of a run go beside its folder: TensorBoard and Weights & Biases, each on request.

Their packages are imported when one is opened. What goes wrong in them later (a full disk, a network that is gone) is
said once and never ends a run.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastjepa import config


class Sink(Protocol):
    """Takes what a run shows. `step` counts from 1; every call may raise whatever its library raises."""

    label: str

    def settings(self, values: Mapping[str, Any]) -> None:
        """Dotted keys of the settings and their plain values."""

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step by their names."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """An image file."""

    def rewind(self, step: int) -> None:
        """Forget what came after this step: it is going to be logged again."""

    def close(self, failed: bool) -> None:
        """Write what is buffered. `failed`: the run did not end well."""


class TensorBoard:
    """Events in tensorboard/ of the run folder. Errors: ValueError where the package is missing."""

    label = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer = self._open()

    def settings(self, values: Mapping[str, Any]) -> None:
        """A table of the settings on the page of texts."""
        rows = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """A curve of each name."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """On the page of images, where a slider goes through the steps."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        """The next file of events tells readers to drop what came later."""
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def close(self, failed: bool) -> None:
        """End the file of events."""
        self._writer.close()

    def _open(self, **options: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("log.tensorboard needs the package tensorboard: pip install 'fastjepa[log]'") from None
        return SummaryWriter(str(self._folder), **options)


class WandB:
    """A run of Weights & Biases that has the name of the run folder, and is continued with it.

    Errors: ValueError where the package is missing; whatever `wandb.init` raises where nobody is logged in, say.
    """

    label = "Weights & Biases"

    def __init__(self, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("log.wandb needs the package wandb: pip install 'fastjepa[log]'") from None
        self._image = wandb.Image
        # The console has the lines of this program, train.log keeps them.
        quiet = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project="fastjepa", name=name, dir=str(folder), id=folder.name, resume="allow", settings=quiet
        )
        # A resumed run logs some steps again: those that are known are not taken twice, and hold the same numbers.
        self._known = self._run.step

    def settings(self, values: Mapping[str, Any]) -> None:
        """The configuration of the run."""
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Of steps that were not logged before."""
        if step >= self._known:
            self._run.log(dict(numbers), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Of steps that were not logged before."""
        if step >= self._known:
            self._run.log({name: self._image(str(path))}, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: what was sent stays, see `scalars`."""

    def close(self, failed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=int(failed))


class Sinks:
    """Those that the settings ask for, each kept from ending the run. `say` takes one line for the console.

    Errors: ValueError where the package of one is missing.
    """

    def __init__(self, settings: config.Log, folder: Path, name: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._silent: set[str] = set()
        self._sinks: list[Sink] = []
        if settings.tensorboard:
            self._begin(TensorBoard.label, lambda: TensorBoard(folder))
        if settings.wandb:
            self._begin(WandB.label, lambda: WandB(folder, name))

    def settings(self, values: Mapping[str, Any]) -> None:
        """Dotted keys of the settings and their plain values."""
        self._each(lambda sink: sink.settings(values))

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step by their names."""
        self._each(lambda sink: sink.scalars(step, numbers))

    def picture(self, name: str, path: Path, step: int) -> None:
        """An image file."""
        self._each(lambda sink: sink.picture(name, path, step))

    def rewind(self, step: int) -> None:
        """Forget what came after this step."""
        self._each(lambda sink: sink.rewind(step))

    def close(self, failed: bool = False) -> None:
        """Write what is buffered."""
        self._each(lambda sink: sink.close(failed))
        self._sinks = []

    def _begin(self, label: str, make: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(make())
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001 - a library raises what it likes, and the run does not need it
            self._say(f"warning: nothing goes to {label}: {_one_line(error)}")

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                act(sink)
            except Exception as error:  # noqa: BLE001 - as above
                if sink.label not in self._silent:
                    self._silent.add(sink.label)
                    self._say(f"warning: {sink.label} does not take everything: {_one_line(error)}; the run goes on")


def _one_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
