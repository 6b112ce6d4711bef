"""Optional packages, looked for before a command begins to work."""

from __future__ import annotations

from importlib import import_module

from ..errors import InputError

EXTRAS = {
    "typer": "cli",
    "tqdm": "cli",
    "PIL": "demo",
    "matplotlib": "demo",
    "scipy": "evaluate",
    "spacy": "words",
    "resvg_py": "world",
    "tokenizers": "world",
    "xformers": "xformers",
}
"""The extra of this package that installs a module."""


def advise_install(module: str) -> str:
    """The command that installs a module."""
    name = module.partition(".")[0]
    return f"run: pip install 'diffusers_sae[{EXTRAS[name]}]'" if name in EXTRAS else f"run: pip install {name}"


def require(*modules: str) -> None:
    """Raise `InputError` unless all of these modules can be imported."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise InputError(
                f"This command needs {module}, which cannot be imported ({error}); {advise_install(module)}."
            ) from error
