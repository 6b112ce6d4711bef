"""Values of options that typer cannot check: `--call`, JSON of further arguments of the pipeline, and `--seed`."""

from __future__ import annotations

import json
from typing import Any

from ..errors import InputError

EXAMPLE = """'{"num_inference_steps": 20}'"""


LARGEST_SEED = 2**62


def read_call(text: str) -> dict[str, Any]:
    """The arguments in `--call`; raises `InputError` unless it is an object of JSON with each name once."""
    try:
        call = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"call={text!r} is no JSON ({error}); pass such as {EXAMPLE}.") from None
    if not isinstance(call, dict):
        raise InputError(f"call={text!r} is no JSON object of arguments; pass such as {EXAMPLE}.")
    return call


def check_seed(seed: int) -> None:
    """Raise `InputError` unless torch takes the seed, and those of as many images as anybody makes, counted from it."""
    if abs(seed) > LARGEST_SEED:
        raise InputError(f"seed={seed} must lie between -2^62 and 2^62.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"call has {twice[0]!r} twice; leave one out.")
    return dict(pairs)


def _refuse_constant(name: str) -> Any:
    raise InputError(f"call has the value {name}, which no pipeline can use; pass a number.")
