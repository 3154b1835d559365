"""`python -m fastjepa.train SETTINGS.yaml key=value ...`: pretrain a V-JEPA encoder."""

import sys

from fastjepa.configfile import from_command_line
from fastjepa.exits import Exit, ended


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code (see `fastjepa.exits`)."""
    try:
        settings, name = from_command_line(sys.argv[1:] if arguments is None else arguments)
        # Only now: importing torch takes seconds, and a mistake in the settings should not.
        from fastjepa.start import start

        return int(start(settings, name))
    except KeyboardInterrupt:  # before the loop, which saves and leaves by itself, there is nothing to save
        return int(Exit.SECOND_INTERRUPT)


if __name__ == "__main__":
    sys.exit(ended(main))
