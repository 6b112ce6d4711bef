"""What `import diffusers_sae` offers, and what it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_sae


def test_every_export_is_imported_as_an_editor_is_told():
    tree = ast.parse(Path(diffusers_sae.__file__).read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in typed.body for alias in node.names}
    assert sorted(told) == diffusers_sae.__all__ == sorted(diffusers_sae._MODULES)
    assert told == diffusers_sae._MODULES
    for name, module in told.items():
        value = getattr(diffusers_sae, name)
        assert value.__name__ == name and value.__module__.startswith(f"diffusers_sae.{module}")
        assert getattr(diffusers_sae, module).__name__ == f"diffusers_sae.{module}"


def test_a_star_and_dir_know_every_export():
    names: dict = {}
    exec("from diffusers_sae import *", names)
    assert names.keys() >= set(diffusers_sae.__all__) <= set(dir(diffusers_sae))


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'TopKSEA'"):
        _ = diffusers_sae.TopKSEA
    with pytest.raises(ImportError, match="cannot import name 'TopKSEA'"):
        exec("from diffusers_sae import TopKSEA")


def test_the_command_line_imports_nothing_heavy_before_it_can_be_stopped():
    heavy = ("torch", "diffusers", "transformers", "numpy", "typer")
    code = f"import diffusers_sae.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout == "[]\n"
