"""The command line, `diffusers-sae`: one command a file."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. A user's mistake ends in one sentence and exit code 2; `--debug` shows where it arose."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        sys.exit(f"diffusers-sae needs {error.name}; run: pip install 'diffusers_sae[cli]'")
    from ..errors import InputError

    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        sys.exit(app(args=arguments, prog_name="diffusers-sae", standalone_mode=True))
    except (InputError, FileNotFoundError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if debug:
            raise
        sys.exit(f"error: this command needs {error.name}; run: pip install 'diffusers_sae[evaluate]'")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
