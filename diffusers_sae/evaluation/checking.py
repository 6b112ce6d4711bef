"""Whether an SAE fits the tensor that it is put at, and which tensor nearby it fits better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..capture.calls import arguments_refused_by, check_call
from ..context import Context
from ..errors import InputError
from ..families import DENOISERS
from ..hooks import Observer
from ..layouts import LAYOUTS
from ..saes import SparseAutoencoder
from ..site_mapping import SiteMapping
from ..sites import BLOCK_STREAMS, KINDS, STREAMS, Place, Site, resolve
from ..widths import changes_size, row_width_of
from .reconstruction import ReconstructionMeter

PLACES = 64
"""Rows of each image and step that are looked at, evenly spread."""
NEIGHBOURS = 6
"""Blocks of the SAE's width that are looked at beside the site's."""
FITS = 0.5
"""FVU up to which an SAE is said to fit; trained ones have 0.05 to 0.3."""
BETTER = 0.7
"""By how much less FVU another tensor is said to be the one that was meant."""


@dataclass
class CandidateFigures:
    """What an SAE makes of one tensor.

    Args:
        fvu, l0: over all rows.
        seen: share of latents that fired at all.
        by_step: FVU by (branch, timestep).
        norm: of the rows' mean, where the SAE expects about that of `b_dec`.
        spread: root of the mean square distance of rows from their mean.
        cosine: between the rows' mean and `b_dec`.
    """

    fvu: float
    l0: float
    seen: float
    by_step: dict[tuple[str, float], float]
    norm: float
    spread: float
    cosine: float


@dataclass
class SAECheck:
    """What `check_sae` found: a sentence, and the figures of the site and of what lies nearby."""

    site: Site
    verdict: str
    expected_norm: float
    candidates: SiteMapping[CandidateFigures]

    @property
    def fits(self) -> bool:
        return self.best == self.site and self.candidates[self.site].fvu <= FITS

    @property
    def best(self) -> Site:
        """The tensor that the SAE is for; its site, unless another one has much less FVU."""
        return _best(self.site, self.candidates)

    def __str__(self) -> str:
        header = f" {'tensor':<59} {'FVU':>8} {'L0':>7} {'seen':>6} {'|mean|':>8} {'spread':>8} {'cos':>6}"
        lines = [self.verdict, "", header]
        for site, f in sorted(self.candidates.items(), key=lambda item: item[1].fvu):
            figures = f"{f.fvu:8.3f} {f.l0:7.1f} {f.seen:6.1%} {f.norm:8.2f} {f.spread:8.2f} {f.cosine:6.2f}"
            lines.append(f"{'*' if site == self.site else ' '}{site!s:<59} {figures}")
        lines += ["", f"The SAE's b_dec has norm {self.expected_norm:.2f}; cos is that of the mean with it."]
        lines += ["FVU by branch and timestep at the site:"]
        for (branch, timestep), fvu in self.candidates[self.site].by_step.items():
            lines.append(f"  {branch:<8} {timestep:8.1f} {fvu:8.3f}")
        return "\n".join(lines)


def check_sae(pipe: Any, sae: SparseAutoencoder, site: Site | str, prompt: Any = None, **call: Any) -> SAECheck:
    """Run the pipeline once, unsteered, and measure the SAE at its site and at the tensors nearby.

    Nearby are the module's output, input and update, its other stream, and the same of the nearest blocks of its class
    that have the SAE's width.

    Args:
        pipe: a steerable pipeline.
        sae: the SAE, loaded or not.
        site: where it is put.
        prompt, call: of the pipeline's call; images are not decoded unless `output_type` is told.

    Raises:
        InputError: the site does not exist, or did not run; or the pipeline takes no such call.
    """
    site = Site.of(site)
    check_call(pipe, call, taken=("prompt",))
    sae.fetch()
    device = sae.W_dec.device
    sae.to("cpu")
    meters = {each: _Meter(sae) for each in _candidates(pipe, site, sae.d_in)}
    observers = [Observer(each, resolve(pipe, each), meter.take) for each, meter in meters.items()]
    arguments = call if prompt is None else {"prompt": prompt, **call}
    if any(hasattr(pipe, name) for name in DENOISERS):
        arguments = {"output_type": "latent", **arguments}
    try:
        with pipe._steering.unsteered(), pipe._steering.observed(observers), arguments_refused_by(pipe):
            pipe(**arguments)
    finally:
        sae.to(device)
    found = SiteMapping((each, meter.candidate()) for each, meter in meters.items() if meter.varies)
    if not meters[site].finite:
        raise InputError(f"{site} held numbers that are not finite; run the pipeline in fp32 or bfloat16.")
    if site not in found:
        raise InputError(
            f"{site} did not run, has not the SAE's width of {sae.d_in}, or held the same in all rows; choose another."
        )
    norm = float(sae.b_dec.float().norm()) if hasattr(sae, "b_dec") else 0.0
    return SAECheck(site, _verdict(site, found), norm, found)


def _candidates(pipe: Any, site: Site, width: int) -> list[Site]:
    """The site, and tensors nearby that could have the width."""
    if site.is_embeds:
        return [site]
    here = [replace(site, kind=kind) for kind in KINDS]
    text = [replace(site, stream=stream) for stream in STREAMS if stream != site.stream]
    blocks = [replace(site, path=path) for path in _neighbours(pipe, site)]
    blocks = [block for block in blocks if _could_have(resolve(pipe, block), block, width)]
    near = [replace(block, kind=kind) for block in blocks[:NEIGHBOURS] for kind in KINDS]
    found = [site]
    for each in (*here, *text, *near):
        if each not in found and _could_have(resolve(pipe, each), each, width):
            found.append(each)
    return found


def _neighbours(pipe: Any, site: Site) -> list[str]:
    """Modules of the same class in the same component, the nearest in the order of its layers first."""
    place = resolve(pipe, site)
    paths = [f"{place.root_name}.{name}" for name, m in place.root.named_modules() if type(m) is type(place.module)]
    own = next(path for path in paths if replace(site, path=path) == site)  # maybe as another version calls it
    return sorted((p for p in paths if p != own), key=lambda path: abs(paths.index(path) - paths.index(own)))


def _could_have(place: Place, site: Site, width: int) -> bool:
    if site.kind == "update" and changes_size(place):
        return False
    known = row_width_of(place, site)
    if known is not None and known != width:
        return False
    if site.stream == "text":
        return BLOCK_STREAMS.get(type(place.module).__name__, (0, None))[1] is not None
    return True


class _Meter(ReconstructionMeter):
    """Measures what a site holds when it holds it, by branch and timestep."""

    finite = True

    def take(self, site: Site, x: torch.Tensor, context: Context) -> None:
        for branch, part in context.parts():
            rows = LAYOUTS[site.layout].to_rows(x[part])
            if rows.shape[-1] == self.sae.d_in:
                every = max(1, rows.shape[1] // PLACES) if self.sae.rows_apart else 1
                some = rows[:, ::every].float().cpu()
                self.finite = self.finite and bool(torch.isfinite(some).all())
                if self.finite:
                    self.add((branch, context.timestep), some)

    @property
    def varies(self) -> bool:
        """Whether the rows, if there were any, were finite and not all the same."""
        return self.finite and self.rows > 0 and self.variance > 1e-12 * float(self.mean.square().sum())

    def candidate(self) -> CandidateFigures:
        told, mean = self.figures(), self.mean
        centre = self.sae.b_dec.double() if hasattr(self.sae, "b_dec") else torch.zeros_like(mean)
        return CandidateFigures(
            fvu=told["fvu"],
            l0=told["l0"],
            seen=1 - told["dead"],
            by_step=told["fvu_by_timestep"],
            norm=float(mean.norm()),
            spread=self.variance**0.5,
            cosine=float(torch.cosine_similarity(mean, centre, dim=0)),
        )


def _best(site: Site, found: SiteMapping[CandidateFigures]) -> Site:
    best = min(found, key=lambda each: found[each].fvu)
    return best if found[best].fvu < BETTER * found[site].fvu else site


def _verdict(site: Site, found: SiteMapping[CandidateFigures]) -> str:
    best, here = _best(site, found), found[site].fvu
    if best == site and here <= FITS:
        return f"The SAE fits {site}: FVU {here:.3f}, L0 {found[site].l0:.1f}."
    if found[best].fvu <= FITS:
        return (
            f"This SAE was not trained on {site} but on {best}: FVU {here:.3f} against {found[best].fvu:.3f}; "
            f"load it with site={str(best)!r}."
        )
    return (
        f"The SAE fits nothing that was tried: FVU {here:.3f} at {site}, and at best {found[best].fvu:.3f} at {best}; "
        "check the base model, the layer and how the pipeline is called."
    )
