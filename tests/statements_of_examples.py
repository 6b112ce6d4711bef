"""What the examples' READMEs say of measurements, recomputed from `benchmarks/results`."""

from __future__ import annotations

import json

from statements import ROOT, interval, mean, minutes, number, percent, results

from diffusers_sae.demo.shipped import SITES
from diffusers_sae.evaluation.shares import wilson


def of_every_timestep() -> list[str]:
    told = results("every_timestep")
    over_time, removal = list(told["over time"].values()), list(told["removal"].values())
    keys = ("next steps alike", "first and middle step alike", "first and last step alike")
    following, middle, last = (number(mean([o[key] for o in over_time]), 2) for key in keys)
    used = [o["latents at any step"] for o in over_time]
    (latents,) = {o["latents a step"] for o in over_time}
    plans = {
        "nothing": "bare", "γ = -20, all steps": "gamma -20", "γ = -1, all steps": "gamma -1, all steps",
        "γ = -1, first third": "gamma -1, first third", "γ = -1, second third": "gamma -1, second third",
        "γ = -1, last third": "gamma -1, last third", "the plan of `diffusers-sae evaluate`": "the demo's plan",
    }  # fmt: skip
    rows = []
    widest = max(
        (high - low) / 2
        for plan in plans.values()
        for name in ("removed", "the rest kept")
        for low, high in [wilson(mean([seen[plan][name]["value"] for seen in removal]), 8 * len(removal))]
    )
    for name, plan in plans.items():
        gone, kept = (percent(mean([s[plan][key]["value"] for s in removal])) for key in ("removed", "the rest kept"))
        rows.append(f"| {name} | {gone} % | {kept} % |")
    assert widest < 0.15
    return [
        f"{minutes(told['seconds']['whole'])} on two cores",
        f"the {number(latents)} latents above the 99th percentile of two neighbouring steps have a Jaccard "
        f"index (latents "
        f"of both, over latents of either) of {following}, those of the first and the middle step {middle}, of "
        f"the first "
        f"and the last {last} (means of {len(over_time)} concepts). A concept uses {min(used)} to {max(used)} latents",
        *rows,
    ]


def of_kandinsky() -> list[str]:
    told = results("kandinsky")
    transfer, bans, rows = told["transfer"], told["bans"], []
    for factor in ("object", "style", "background"):
        for name, shown in (("of the prior", "of the prior"), ("seen anew", "seen anew")):
            each = transfer[f"embeddings {name}"][factor]
            seen = each["against the pictures"]
            cells = [f"{percent(seen[k]['value'])} % {interval(seen[k])}" for k in ("moved", "kept")]
            first = f"| {factor} | {each['features']} |" if name == "of the prior" else "| | |"
            rows.append(f"{first} {shown} | {' | '.join(cells)} |")
    for name in ("of the prior", "seen anew"):
        again = transfer[f"embeddings {name}"]["seen again when drawn anew"]
        rows.append(", ".join(f"{f} {percent(again[f]['value'])} %" for f in ("object", "style", "background")))
    prior = [transfer["embeddings of the prior"][f]["against the pictures"] for f in ("object", "style", "background")]
    assert all(p[k]["value"] >= 0.85 for p in prior for k in ("moved", "kept"))
    assert bans["ban"]["red, cats"]["value"] == bans["ban"]["red, others"]["value"] == 0
    by_rule = bans["ban where a cat is"]
    assert (by_rule["red, cats"]["value"], by_rule["red, others"]["value"]) == (0, 1)
    tower = json.loads((ROOT / "diffusers_sae/demo/models/emoji-kandinsky/sae/held_out.json").read_text())["tower_fvu"]
    return [
        f"The run took {minutes(told['seconds']['whole'])} on two cores",
        *rows,
        f"misses {percent(tower)} % of the variance",
        f"object and style are kept in {percent(bans['ban']['object and style kept']['value'])} %. With the rule",
        f"none of {by_rule['red, cats']['images']} cats stays red",
    ]


def of_h_space() -> list[str]:
    told, rows = results("h_space"), []
    for name, kind in told["kinds"].items():
        cells = [number(kind["ev"], 3), number(kind["cosine"], 3), f"{percent(kind['zeros'], 1)} %",
                 number(kind["active_a_row"], 1).removesuffix(".0"), number(kind["active_an_image"])]  # fmt: skip
        for rows_of in ("same_rows", "whole_map"):
            for size in ("equal_nonzeros", "equal_numbers"):
                pca = kind["pca"][size][rows_of]
                ev = number(pca["ev"], 3) if pca["ev"] < 0.9999 else "1"
                cells.append(f"{ev} ({pca['rank']})")
        label = {"channel-aware": "channel-aware, k = 2"}.get(name, name)
        rows.append(f"| {label} | {' | '.join(cells)} |")
    for name, size in (("β-VAE, 16", 16), ("β-VAE, 512", 512)):
        vae, pca = told["beta_vaes"][name], told["pca_of_the_map"][str(size)]
        rows.append(f"{name} numbers | {number(vae['ev'], 3)} | {number(vae['cosine'], 3)} | | {size} | {size} | | | "
                    f"{number(pca['ev'], 3)} ({size}) |")  # fmt: skip
    probes = told["probes"]
    for label, name, way in (
        ("raw h, all 3072", "raw h", "all"), ("raw h", "raw h", "chosen"), ("PCA", "PCA, 512", "chosen"),
        ("channel-aware", "channel-aware", "chosen"), ("TopK, channels", "TopK, channels", "chosen"),
        ("TopK, vector", "TopK, vector", "chosen"),
    ):  # fmt: skip
        shares = [number(probes[name][factor][way]["value"], 2) for factor in ("style", "background")]
        rows.append(f"| {label} | {' | '.join(shares)} |")
    near, middle = (max(abs(x - share) for x in wilson(share, told["held_out"])) for share in (0.95, 0.5))
    assert 0.02 < near < 0.031 and 0.05 <= middle < 0.056
    held_out = told["held_out"]
    of_raw, of_code = (round(probes[n]["background"][way]["value"] * held_out) for n, way in (
        ("raw h", "all"), ("TopK, channels", "chosen")))  # fmt: skip
    edits = told["edits"]
    by_guidance, all_steps = edits["one step at 0.7 T, guidance 12"], edits["all steps from 0.9 T"]
    run = told["seconds"]["reconstruction probes edits consistency interpolation, 2 trips"]["all"]["clock"]
    moved = [c["mean_change"] for c in edits["components"]]
    changed = [c["h_changed"] * 3072 for c in edits["components"]]
    ways, tests = told["consistency"]["ways"], told["consistency"]["against_prompt_editing"]
    undone, by_prompt = ways["latent added, inverted with it"], ways["prompt"]
    test = tests["latent added, inverted with it"]
    mixing = told["interpolation"]
    code, whole, one_step = (
        number(mixing[name]["from_first"][-1], 3)
        for name in ("code of h, all steps from 0.9 T", "whole h, all steps from 0.9 T", "whole h, one step at 0.7 T")
    )
    rows += [
        f"On {told['images']:,} renders with three noises each, {told['h']:,} maps, measured on "
        f"{told['held_out']} renders",
        f"A whole run takes {minutes(run)} on two cores",
        f"({of_raw} of {held_out} images, where the code has {of_code})",
        f"| {edits['one step at 0.7 T']['named']} of {edits['one step at 0.7 T']['of']} | "
        f"{edits['one step at 0.7 T']['as_chosen']} | |",
        f"| {by_guidance['named']} of {by_guidance['of']} ({by_guidance['different_names']} different) | "
        f"{by_guidance['as_chosen']} | {by_guidance['named_at_random']} of {by_guidance['of_random']} |",
        f"| {all_steps['named']} of {all_steps['of']} | {all_steps['as_chosen']} | "
        f"{all_steps['named_at_random']} of {all_steps['of_random']} |",
        f"moves them by {number(min(moved))} to {number(max(moved), 3)} and changes {number(min(changed))} to "
        f"{number(max(changed))} of 3072",
        f"pixels: {number(undone['share_left_pixels'], 2)} with latents, "
        f"{number(by_prompt['share_left_pixels'], 2)} with "
        f"prompts; LPIPS: {number(undone['share_left_lpips'], 2)} and {number(by_prompt['share_left_lpips'], 2)}; p = "
        f"{number(test['share_left_pixels']['p'], 2)} and {number(test['share_left_lpips']['p'], 2)}",
        f"differ by {number(mixing['between_the_ends'], 2)} on average, mixing codes at all steps from 0.9 T "
        f"moves pixels "
        f"by {code}, putting in the other's whole h by {whole}, and by {one_step} at one step",
    ]
    for label, name in (
        ("prompt, another object", "prompt"),
        ("latent added, strength 30, then subtracted", "latent added"),
    ):
        way = ways[name]
        of16 = [f"{number(16 * way[key])} of 16" for key in ("edit_changes_object", "edit_shows_target", "same_object")]
        left = f"{number(way['pixels'], 3)} | {number(way['psnr'], 1)} | {number(way['lpips'], 2)}"
        rows.append(f"| {label} | {number(way['edit_pixels'], 3)} | {of16[0]} | {of16[1]} | {left} | {of16[2]} |")
    return rows


def of_the_text_encoder() -> list[str]:
    told = results("text_encoder")
    similar, seen = told["steering"]["similarity"], told["steering"]["judge sees the attribute"]
    plain, attributed = similar["steered, prompt"], similar["steered, prompt + attribute"]
    bare = told["steering"]["bare against steered"]["before"]
    alone = seen["tokens=[2], the object's, first 25"]
    words, selective, removal = told["words"], told["selective"]["not named"], told["removal"]
    first, against = (told["steering"][k]["p"] for k in ("prompt against prompt + attribute", "bare against steered"))
    rows = [
        f"| steered image with the prompt | 0.216 | {number(plain, 3)} |",
        f"| steered image with prompt + attribute | 0.228 (+5.8 %) | {number(attributed, 3)} "
        f"(+{percent(attributed / plain - 1)} %) |",
        f"| paired t-test over {told['steering']['pairs']} pairs | p < 1e-4 | p = {first:.0e} |",
        f"| {number(bare, 3)} (against steered: p = {against:.0e}) |",
        f"| {percent(seen['bare'])} % / {percent(seen['steered'])} % |",
        f"{words['latents with both >= 0.8']} latents, {words['words with precision and recall >= 0.8']} words",
        f"brings the attribute in {percent(seen['steered, first 25'])} %",
        f"(`tokens=[2]`) in {percent(alone)} %",
        f"({selective['distinct images']} distinct ones, {selective['images']} cases of image and object), "
        f"{selective['images'] - selective['changed']} of {selective['images']} stay the same",
        f"{removal['U-Net']['cra']['images']} distinct ones in all",
    ]
    labels = {"nothing removed": "bare", "text encoder, `ablate` 2": "text", "U-Net, shipped SAEs and rule": "U-Net"}
    for label, name in labels.items():
        shares = [number(removal[name][k]["value"], 2) for k in ("ua", "ira", "cra", "cra_target", "artefacts")]
        rows.append(f"| {label} | {' | '.join(shares)} |")
    return rows


def of_the_vae() -> list[str]:
    told, rows = results("vae"), []
    for label, name, sae in (("tied ReLU, λ = 0.5", "tied", "tied"), ("TopK, k = 16", "topk", "topk")):
        figures = told["saes"][sae]
        rows.append(
            f"| {label} | {number(figures['fvu'], 3)} | {number(figures['l0'], 1).removesuffix('.0')} | "
            f"{percent(figures['dead'])} % | {number(figures['fvu of PCA with as many numbers'], 3)} | "
            f"{told[name]['named']} |"
        )
    judge, tied, topk = told["vae"]["judge"], told["tied"]["paths"], told["topk"]["paths"]["carried"]
    pairs = told["tied"]["opposite"]
    between = list(tied["interpolation"]["code"].values())
    carried = tied["carried"]
    ends = carried["all"]
    assert ends["source"]["background"] == 0
    (same,) = {ends["target"]["object"], ends["target"]["style"]}
    (of_topk,) = {topk["all"]["target"]["object"], topk["all"]["target"]["style"]}
    return [
        *rows,
        f"| *random directions* | | | | | {told['random']['named']} |",
        f"squared error {number(told['vae']['mse of [-1, 1]'], 3)}",
        f"the object in {percent(judge['object'])} %, the style in {percent(judge['style'])} % and the background in "
        f"{percent(judge['background'])} % of reconstructions (all "
        f"{percent(min(told['vae']['judge, images themselves'].values()))} % on the images themselves)",
        f"cosines of {number(pairs[0]['cosine'], 2)} and {number(pairs[1]['cosine'], 2)}",
        f"({pairs[0]['first']} and {pairs[0]['second']}, {pairs[1]['first']} and {pairs[1]['second']}), which leave "
        f"{percent(pairs[0]['left'])} % and {percent(pairs[1]['left'])} % of the first",
        f"by {number(min(between), 3)} to {number(max(between), 3)} in pixels of [0, 1], where source and target are "
        f"{number(tied['source to target'], 2)} apart",
        f"bring the target's background in {percent(carried['4']['target']['background'])} % of images, eight in "
        f"{percent(carried['8']['target']['background'])} %; with TopK two bring it in "
        f"{percent(topk['2']['target']['background'])} %, four in {percent(topk['4']['target']['background'])} %",
        f"with all features {percent(same)} % each (TopK: {percent(of_topk)} %), while all of the *source's* "
        f"backgrounds "
        f"and {percent(1 - ends['source']['object'])} % of its objects are gone",
    ]


def of_the_models() -> dict[str, str]:
    """What the cards of the embedded models say of their own figures on what is held out."""
    models, said = ROOT / "diffusers_sae" / "demo" / "models", {}
    for site in SITES:
        card, told = (
            models / "saes" / site / "README.md",
            json.loads((models / "saes" / site / "held_out.json").read_text()),
        )
        said[str(card)] = f"FVU {told['fvu']:.4f}, L0 {told['l0']:.1f}, dead latents {100 * told['dead']:.2f} %"
    judge = json.loads((models / "judge" / "held_out.json").read_text())["accuracy"]
    right = ", ".join(f"{factor} {100 * share:.2f} %" for factor, share in judge.items())
    said[str(models / "judge" / "README.md")] = f"right on held-out real renders: {right}"
    return said
