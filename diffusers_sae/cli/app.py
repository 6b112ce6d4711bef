"""The commands and what they share."""

from __future__ import annotations

import typer

from .capture import capture
from .check import check
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .inspect import inspect
from .train import train

app = typer.Typer(
    name="diffusers-sae",
    help="Sparse autoencoders for diffusers pipelines. With --debug, an error shows its traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(evaluate)
app.command()(capture)
app.command()(train)
app.command()(inspect)
app.command()(convert)
app.command()(check)
