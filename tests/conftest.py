"""Tiny pipelines, bare and steerable, and SAEs with random weights."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from tiny import EMBEDDED, PIPELINES, SITE, WIDTH, make

from diffusers_sae import SAESteeringPipeline, TopKSAE
from diffusers_sae.training import SAETrainer


class Stop(BaseException):
    """As sudden as a kill: nothing that cleans up after an `Exception` runs."""


@contextmanager
def file_limit(size: int):
    """No file grows beyond `size` bytes: the system refuses to write on, as on a full disk."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Outcome(NamedTuple):
    """How a command ended, and what it showed."""

    code: int | None
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs `diffusers-sae` with arguments, in this process; no command shows a traceback."""
    from diffusers_sae import cli

    def run(*arguments) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["diffusers-sae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        outcome = Outcome(stop.value.code, *capsys.readouterr())
        assert "Traceback" not in outcome.err
        return outcome

    return run


OTHER = "unet.down_blocks.0.attentions.0"
"""A site besides `SITE`."""


class Harness:
    """A tiny pipeline, bare and steerable over the same modules, and how to run it."""

    def __init__(self, kind: str = "Stable Diffusion") -> None:
        self.kind = kind
        self.tiny = PIPELINES[kind]
        self.bare = make(kind)
        self.pipe = SAESteeringPipeline.from_pipe(self.bare)

    def run(self, pipe=None, prompt="ab", **kwargs):
        """Images `(N, 3, H, W)` of four steps from seed 0."""
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 4, "generator": generator, **self.tiny.arguments, **kwargs}
        if self.kind in EMBEDDED:
            arguments.update(EMBEDDED[self.kind](1 if isinstance(prompt, str) else len(prompt)))
        else:
            arguments["prompt"] = prompt
        return (pipe or self.pipe)(output_type="pt", **arguments).images

    def sae(self, **provenance) -> TopKSAE:
        """A random SAE that fits the site."""
        torch.manual_seed(1)
        return random_sae(self.tiny.width, site={"path": self.tiny.site}, **provenance)


@pytest.fixture(params=list(PIPELINES))
def every(request) -> Harness:
    return Harness(request.param)


@pytest.fixture
def sd() -> Harness:
    return Harness()


@pytest.fixture
def sae() -> TopKSAE:
    torch.manual_seed(1)
    return random_sae()


def random_sae(d_in: int = WIDTH, n_latents: int = 32, k: int = 4, **provenance) -> TopKSAE:
    """Random weights with untied encoder and biases, so that no term of the formulas is zero."""
    sae = TopKSAE(d_in, n_latents, k, provenance={"site": {"path": SITE}, **provenance})
    with torch.no_grad():
        sae.W_enc += 0.3 * torch.randn_like(sae.W_enc)
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
    return sae.eval()


def with_saes(*names: str) -> Harness:
    """A harness with random SAEs: `hand` at `SITE` and `other` at `OTHER`, or those that are named."""
    harness = Harness()
    torch.manual_seed(1)
    saes = {"hand": random_sae(), "other": random_sae(site={"path": OTHER})}
    for name in names or saes:
        harness.pipe.load_sae(saes[name], adapter_name=name)
    return harness


@pytest.fixture
def steps_left(monkeypatch):
    """A list of one number that every training step takes one from; where it reaches 0, the step stops the run."""
    step, left = SAETrainer.step, [0]

    def stopping(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        return step(self, *args)

    monkeypatch.setattr(SAETrainer, "step", stopping)
    return left
