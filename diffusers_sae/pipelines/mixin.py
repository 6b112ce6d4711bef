"""What steering adds to a pipeline: SAEs to load, latents to turn and sites to capture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..activations import Activations, SiteActivations
from ..context import Context
from ..disk import write_whole
from ..edits import Edit, check_fits, make_edit
from ..errors import InputError
from ..families import check_supported
from ..hooks import LoadedSAE, Observer, run_of
from ..loaders import Source, load_sae
from ..origin import base_model, warn_of_other_recipe, warn_of_other_sae
from ..recipes import plan_of, read_json, recipe_of
from ..rules import Rule, checked_rule
from ..saes import SparseAutoencoder
from ..site_mapping import distinct_sites
from ..sites import Site, resolve
from ..strengths import Strength
from ..widths import check_update, row_width_of
from .base import SteerableBase


class SAESteeringMixin(SteerableBase):
    """What steering adds to a diffusers pipeline. Mix it in before the pipeline's class, or use `SAESteeringPipeline`.

    SAEs are side-loaded, as LoRAs are: they are no components, and `save_pretrained` writes the stock pipeline.
    """

    def load_sae(
        self,
        pretrained_model_name_or_path_or_dict: Source,
        site: Site | str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        weight_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        config: Mapping[str, Any] | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """Load an SAE and hook it to its site; nothing changes until `steer` is called.

        Args:
            pretrained_model_name_or_path_or_dict: hub repository, folder, weights file, state dict or SAE object.
            site: where it acts; by default the site its config names.
            adapter_name: name to call it by; by default `default_0`, `default_1`, ...
            subfolder, weight_name, revision, token, hub_kwargs: as in diffusers' loaders.
            config: the SAE's arguments (`{"k": 32}`), for weights that come without a `config.json`.

        Raises:
            InputError: unknown site, wrong width, name in use, unreadable, altered or unsafe file. The pipeline is left
                as it was.
        """
        check_supported(self)
        name = adapter_name or next(n for i in range(10**6) if (n := f"default_{i}") not in self._steering.loaded)
        if name in self._steering.loaded:
            raise InputError(
                f"An SAE named {name!r} is loaded already; choose another adapter_name or delete_saes({name!r})."
            )
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, SparseAutoencoder):
            sae = source
        else:
            sae = load_sae(
                source, subfolder=subfolder, weight_name=weight_name, revision=revision, token=token,
                config=config, **hub_kwargs,
            )  # fmt: skip
        wanted = site if site is not None else sae.provenance.get("site")
        if wanted is None:
            raise InputError("The SAE does not say which site it is for; pass site='unet.…'.")
        where = Site.of(wanted)
        place = resolve(self, where)
        width = row_width_of(place, where)
        if width is not None and width != sae.d_in:
            raise InputError(
                f"The SAE takes activations of width {sae.d_in} and {where} has {width}; "
                "load an SAE that was trained at this site."
            )
        warn_of_other_sae(self, sae, where)
        self._steering.add(LoadedSAE(name, sae.eval().requires_grad_(False), where, place))

    def steer(
        self,
        features: Mapping[int, Strength],
        adapter_name: str | None = None,
        mode: str = "add",
        start: float = 0.0,
        stop: float = 1.0,
        branch: str = "cond",
        mask: Any = None,
        unit: str = "raw",
        when: Rule | None = None,
        tokens: Sequence[int] | None = None,
        preserve_norm: bool = False,
    ) -> None:
        """Add an edit to the plan; it stays in force until `reset_steering`.

        Args:
            features: `{feature: strength}`. A strength is a number, a list with one number an image of the batch, a
                function of the fraction of the steps that are done (`i / n` at step i of n), a `StrengthTable` over
                timesteps, or a `StrengthMap` over timesteps and places.
            adapter_name: which SAE's features; may be left out if only one is loaded.
            mode: `add` (z + s), `set` (s), `scale` (s z), `cap` (at most s), `ablate` (z - s z), or `replace`: places
                where a feature is above s get what the nearest place holds where none is.
            start, stop: fractions of the steps, as in diffusers: of a run of n steps (as counted after `strength`,
                `denoising_start` and the like) it acts at the steps from `start * n` on and before `stop * n`.
            branch: guidance branch: `cond`, `uncond`, `both`, or `contrast` (on cond, and its opposite on uncond).
            mask: places it acts at: a PIL image, whose brightness counts, 0 where it is transparent; an array, a tensor
                or nested lists, `(H, W)` or `(images, H, W)`; or a list of them, one an image. Booleans and
                floating-point numbers lie in [0, 1], uint8 in [0, 255] and uint16 in [0, 65535]; integers of any type
                that are 0 and 1 only are just that.
            unit: of the strengths of modes other than `scale` and `ablate`, which are factors: `raw` activation, or
                multiples of the latent's `mean` while firing or of its `max`, at that timestep.
            when: a `Rule`: only images, or places, for which it holds are edited.
            tokens: positions that are edited, each once: of the prompt, at sites of text; of the layers of W+, at
                StyleGAN's `w`; channels, in the layout `channels`.
            preserve_norm: keep the norm of every row that the edit reaches by its window, branch, mask, tokens and
                rule, also where other edits change the row and this one's strength does not.

        Raises:
            InputError: anything above is wrong. The plan is left as it was.
        """
        one = self._named(adapter_name)
        if when is not None:
            watched = self._named(getattr(when, "adapter_name", None) or one.name)
            when = checked_rule(when, watched.name, watched.sae)
        edit = make_edit(
            features, one.sae, mode=mode, start=start, stop=stop, branch=branch, mask=mask, unit=unit,
            when=when, tokens=tokens, preserve_norm=preserve_norm, statistics=one.sae.statistics,
        )  # fmt: skip
        check_fits(edit, one.site, one.place, self._watched_site(edit))
        one.edits.append(edit)

    @contextmanager
    def steering(self, features: Mapping[int, Strength], **kwargs: Any) -> Iterator[None]:
        """`steer` for the length of a `with` block; the plan is then as it was before."""
        before = {name: list(one.edits) for name, one in self._steering.loaded.items()}
        self.steer(features, **kwargs)
        try:
            yield
        finally:
            for name, one in self._steering.loaded.items():
                one.edits[:] = before.get(name, [])

    def reset_steering(self, adapter_name: str | None = None) -> None:
        """Drop all edits, or those of one SAE."""
        for one in [self._named(adapter_name)] if adapter_name else self._steering.loaded.values():
            one.edits.clear()

    def save_recipe(self, path: str | os.PathLike) -> None:
        """Write the plan to a JSON file: edits, whether they rest, and what their SAEs and statistics are known by.

        Raises:
            InputError: a strength is a function, or the disk is full. Nothing is written.
        """
        recipe = recipe_of(self._steering.loaded, type(self).__name__, base_model(self))
        text = json.dumps(recipe, indent=1) + "\n"
        write_whole(Path(path), lambda partial: partial.write_text(text))

    def load_recipe(self, path: str | os.PathLike) -> None:
        """Add the edits of a recipe to the plan. The SAEs that it names must be loaded, under the names it has.

        Edits that rested when it was saved rest again. What is in doubt is a warning: another base model, weights
        that were rounded to half precision, windows of schema version 1.

        Raises:
            InputError: the file is no recipe, or is for other SAEs, sites or versions; or its edits of an SAE rest and
                those in the plan act, or the other way round. The plan is left as it was.
        """
        recipe = read_json(path)
        plan = plan_of(recipe, self._steering.loaded)
        warn_of_other_recipe(self, recipe.get("base_model"), recipe.get("pipeline"))
        planned = [(self._steering.loaded[name], enabled, edits) for name, (enabled, edits) in plan.items()]
        for one, _, edits in planned:
            for edit in edits:
                check_fits(edit, one.site, one.place, self._watched_site(edit))
        for one, enabled, edits in planned:
            one.edits += edits
            one.enabled = one.enabled if enabled is None else enabled

    @contextmanager
    def capture(self, sites: Sequence[Site | str]) -> Iterator[Activations]:
        """Collect activations, as the following layers see them, from all calls inside the `with` block.

        Yields:
            `{site: SiteActivations}`, each with its tensor and labels (timestep, branch, image); a site is looked up
            by itself, by its text, or by its path where that is one site's only.
        """
        check_supported(self)
        if isinstance(sites, (str, Site)):
            raise InputError(f"capture takes a list of sites; pass [{str(sites)!r}].")
        places = distinct_sites(sites)
        found = [resolve(self, place) for place in places]
        for where, place in zip(found, places, strict=True):
            check_update(where, place)
        activations = Activations((place, SiteActivations(place)) for place in places)

        def take(site: Site, x: torch.Tensor, context: Context) -> None:
            activations.take(site, x, context, context.first_image)

        with self._steering.observed([Observer(*each, take) for each in zip(places, found, strict=True)]):
            yield activations

    def rule_decisions(self) -> dict[tuple[str, int], torch.Tensor]:
        """What the rules about whole images decided in the last run.

        Returns:
            `{(adapter_name, index of the edit among the SAE's): bool (images,)}`; a rule whose SAE was not reached is
            left out.
        """
        return dict(self._steering.decisions)

    def check_sae(self, prompt: Any = None, adapter_name: str | None = None, **call: Any) -> Any:
        """Run once, unsteered, and tell whether a loaded SAE fits its site, or which tensor nearby it fits.

        Returns:
            `SAECheck`: a `verdict`, and figures by tensor, branch and timestep; printed, it is a table.

        Raises:
            InputError: no such SAE, or its site did not run.
        """
        from ..evaluation.checking import check_sae

        loaded = self._named(adapter_name)
        return check_sae(self, loaded.sae, loaded.site, prompt, **call)

    def enable_sae(self, adapter_name: str | None = None) -> None:
        """Let the edits of one SAE, or of all, act again."""
        self._switch(adapter_name, True)

    def disable_sae(self, adapter_name: str | None = None) -> None:
        """Keep the edits of one SAE, or of all, but let them rest."""
        self._switch(adapter_name, False)

    def get_list_saes(self) -> dict[str, dict[str, Any]]:
        """`{name: {site, architecture, d_in, n_latents, enabled, edits}}` of every loaded SAE."""
        return {
            name: {
                "site": str(one.site),
                "architecture": type(one.sae).__name__,
                "d_in": one.sae.d_in,
                "n_latents": one.sae.n_latents,
                "enabled": one.enabled,
                "edits": len(one.edits),
            }
            for name, one in self._steering.loaded.items()
        }

    def delete_saes(self, adapter_names: str | Sequence[str]) -> None:
        """Unload the named SAEs and their edits."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        self._check_that_no_rule_needs(names)
        for one in [self._named(name) for name in names]:
            self._steering.remove(one)

    def unload_sae(self) -> None:
        """Unload every SAE; the pipeline is then as it was before the first `load_sae`."""
        self.delete_saes(list(self._steering.loaded))

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """As in diffusers. Pipelines call it when their timesteps are set, so that the plan can be made ready."""
        run = run_of(self)
        if run is not None:
            run.prepare(iterable, total)
        return super().progress_bar(iterable, total)  # type: ignore[misc]

    def _named(self, name: str | None) -> LoadedSAE:
        loaded = self._steering.loaded
        if name is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if name in loaded:
            return loaded[name]
        if not loaded:
            raise InputError("No SAE is loaded; call load_sae first.")
        wrong = "adapter_name is missing" if name is None else f"No SAE is named {name!r}"
        raise InputError(f"{wrong}; loaded are {', '.join(map(repr, loaded))}, so choose one of them.")

    def _check_that_no_rule_needs(self, names: Sequence[str]) -> None:
        for name, one in self._steering.loaded.items():
            needed = {edit.when.adapter_name for edit in one.edits if edit.when is not None} & set(names)
            if needed and name not in names:
                raise InputError(
                    f"Edits of {name!r} have a rule about {needed.pop()!r}; delete both SAEs, "
                    f"or call reset_steering({name!r}) first."
                )

    def _watched_site(self, edit: Edit) -> Site | None:
        """The site that an edit's rule looks at."""
        return None if edit.when is None else self._named(edit.when.adapter_name).site

    def _switch(self, name: str | None, enabled: bool) -> None:
        for one in [self._named(name)] if name else self._steering.loaded.values():
            one.enabled = enabled
