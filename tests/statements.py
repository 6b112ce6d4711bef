"""What the README says of measurements, recomputed from `benchmarks/results`: sentences for `test_figures.py`."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from diffusers_sae.demo.world import CONCEPTS, ROLES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def number(x: float, digits: int = 0) -> str:
    """Rounded as by hand: halves go up."""
    return str(Decimal(str(round(x, 7))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def percent(x: float, digits: int = 0) -> str:
    return number(100 * x, digits)


def interval(share: dict[str, Any], digits: int = 0) -> str:
    return f"({percent(share['low'], digits)} to {percent(share['high'], digits)})"


def listed(shares: list[float]) -> str:
    """`69, 77 and 78 %`."""
    texts = [percent(x) for x in shares]
    return f"{', '.join(texts[:-1])} and {texts[-1]} %"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def of_the_demo() -> list[str]:
    told = results("demo_quality")
    drawn, styles, objects = told["model"]["accuracy"], told["styles"], told["objects"]
    reached = [c for c, f in told["steering"].items() if f["seen"]["value"] >= 0.85 and f["kept"]["value"] >= 0.8]
    kinds = [CONCEPTS[c] for c in reached]
    assert [c for c in reached if CONCEPTS[c] in ("style", "gender", "skin") or c in ROLES] == ["ink"]
    assert "purple background" not in reached
    assert {f["seen"]["images"] for f in told["steering"].values()} == {32}
    sentences = [
        f"object {percent(drawn['object']['value'], 1)} %, style {percent(drawn['style']['value'], 1)} %, background "
        f"{percent(drawn['background']['value'])} %; of people skin {percent(drawn['skin']['value'], 1)} %, but gender "
        f"{percent(drawn['gender']['value'], 1)} % (chance: 50 %)",
        f"CPU cores | {number(told['model']['seconds_an_image'], 1)} s |",
        f"of {len(told['steering'])} concepts, {len(reached)} ({kinds.count('object')} objects, `ink`, "
        f"{kinds.count('background')} backgrounds) are seen in at least 85 % of 32 images with all else kept in "
        f"at least "
        "80 %; no other style, no skin tone, gender or profession reaches both, purple backgrounds fail",
        f"A rule edits {percent(styles['edited']['value'], 1)} % (styles) and "
        f"{percent(objects['edited']['value'], 1)} % "
        "(objects) of the images and leaves the others bit-identical, so that IRA and CRA differ from the bare model's "
        f"{percent(styles['ira_bare']['value'], 1)} % and {percent(objects['ira_bare']['value'], 1)} % by no "
        f"more than that",
        f"objects survive in {percent(styles['cra_target']['value'])} % of images without their style, styles in "
        f"{percent(objects['cra_target']['value'])} % of images without their object; and in "
        f"{percent(styles['artefacts_edited']['value'])} % and {percent(objects['artefacts_edited']['value'])} "
        f"% of edited "
        "images the judge can no longer name some factor, the removed one included",
    ]
    for name, part in (("styles removed, grid of 224 images", styles), ("objects removed, the same grid", objects)):
        figures = [f"{n.upper()} {percent(part[n]['value'], 1)} % {interval(part[n], 1)}" for n in ("ua", "ira", "cra")]
        sentences.append(f"| {name} | {', '.join(figures)} |")
    for site, sae in told["sae"].items():
        each = list(sae["fvu_by_timestep"].values())  # the first is pure noise
        span = f"{number(min(each), 3)} to {number(max(each), 3)}"
        if each[0] == max(each) and "up_blocks" in site:
            span = f"{number(min(each), 3)} to {number(max(each[1:]), 3)}, and {number(each[0], 3)} at pure noise"
        assert sae["dead"] == 0
        sentences.append(f"FVU {number(sae['fvu'], 3)}; by timestep {span}; no latent dead on 256 images")
    return sentences


def of_the_kinds() -> list[str]:
    kinds, chosen = results("kinds_steering")["kinds"], {"object": "1.25", "style": "3.4", "background": "1.0"}
    seen, kept = (
        {f: [kind[f][chosen[f]][name] for kind in kinds.values()] for f in chosen} for name in ("seen", "kept")
    )
    halves = [(s["high"] - s["low"]) / 2 for shares in (*seen.values(), *kept.values()) for s in shares]
    values = {name: {f: listed([s["value"] for s in shares]) for f, shares in each.items()}
              for name, each in (("seen", seen), ("kept", kept))}  # fmt: skip
    images = {s["images"] for shares in seen.values() for s in shares}
    return [
        f"bring in an object in {values['seen']['object']}, a style in {values['seen']['style']} and a background in "
        f"{values['seen']['background']} of {images.pop()} images, and keep all else in {values['kept']['object']}, "
        f"{values['kept']['style']}, and {values['kept']['background']}",
        f"intervals of ± {percent(min(halves))} to {percent(max(halves))} points",
    ]


def of_the_choices() -> list[str]:
    told = results("steering_choices")
    masks = {one["start"]: one for one in told["masks"]}
    shown = [masks[start] for start in (0.0, 0.4, 0.6)]
    (before,) = {one["left_before"]["value"] for one in shown}
    replaced = told["removal"]["replace"]
    gains = [one["more_backgrounds"]["value"] for one in told["removal"]["at_equal_ua"]]
    left, right = shown[0]["left_turned"], shown[0]["right_turned"]
    return [
        f"the left half has the background asked for in {listed([s['left_turned']['value'] for s in shown])} of "
        f"{left['judgements']} cases (in {percent(before)} % it had it before), and of the "
        f"{right['judgements']} cases in "
        f"which the right half had another, it turns, too, in "
        f"{listed([s['right_turned']['value'] for s in shown])}, for "
        f"edits that begin at 0, 0.4 and 0.6 of the steps ({left['images']} images, five backgrounds;",
        f"`replace` keeps the background in {listed([r['background']['value'] for r in replaced])} of all images and "
        f"removes the object in {listed([r['ua']['value'] for r in replaced])}, with 2, 3 and 5 latents; at the "
        f"same share "
        f"of removed objects `scale` keeps {percent(min(gains))} to {percent(max(gains))} points fewer backgrounds",
    ]


def of_the_systems() -> list[str]:
    vae, kandinsky, text = results("vae")["tied"], results("kandinsky")["transfer"], results("text_encoder")
    prior = [kandinsky["embeddings of the prior"][f]["against the pictures"] for f in ("object", "style", "background")]
    over_time = results("every_timestep")["over time"].values()
    h = results("h_space")
    vector, edits = h["kinds"]["TopK, vector"], h["edits"]["one step at 0.7 T, guidance 12"]
    ways = h["consistency"]["ways"]
    undone, by_prompt = ways["latent added, inverted with it"], ways["prompt"]
    for name in ("pixels", "lpips"):
        assert undone[name] < by_prompt[name] and undone[f"edit_{name}"] < by_prompt[f"edit_{name}"]
    again = kandinsky["embeddings seen anew"]["seen again when drawn anew"]["object"]
    return [
        f"{vae['named']} of the top {vae['of']} features named",
        f"objects, styles and backgrounds moved in {listed([p['moved']['value'] for p in prior])} of "
        f"{prior[0]['moved']['images']} pairs, the rest kept in {listed([p['kept']['value'] for p in prior])}",
        f"(mean Jaccard index {number(mean([o['first and last step alike'] for o in over_time]), 2)})",
        f"explained variance {number(vector['ev'], 2)} and cosine {number(vector['cosine'], 2)} with "
        f"{vector['active_an_image']:.0f} numbers an image ({percent(vector['zeros'])} % zeros), PCA "
        f"{number(vector['pca']['equal_nonzeros']['whole_map']['ev'], 2)}; {edits['named']} of {edits['of']} latents",
        f"{text['words']['words with precision and recall >= 0.8']} words named, attributes seen in "
        f"{percent(text['steering']['judge sees the attribute']['steered'])} % of {text['steering']['pairs']} images",
        f"{percent(again['value'])} % of {again['images']} show the same object",
    ]


def of_training() -> list[str]:
    wide, inversion = results("wide_sae"), results("inversion")
    best = {name: side["best"]["fvu"] for name, side in wide["quality"]["unet.down_blocks.1.attentions.0"].items()}
    truth = results("ground_truth")
    peers = [kinds["topk"] for name, kinds in truth.items() if name != "diffusers_sae"]
    found, dead = ([p[key] for p in peers] for key in ("recovered", "dead"))
    ours = truth["diffusers_sae"].values()
    assert max(kind["dead"] for kind in ours) == 0
    speed = results("training_speed_amd_epyc_avx2")
    sides = ("diffusers_sae", "sparsify", "overcomplete", "SAELens", "dictionary_learning")
    table = []
    for side in sides:
        name = side.lower().replace("saelens", "sae_lens")
        best_rate = speed["quality"]["sides"][name]["best"]["fvu"]
        table.append(
            f"| {side} | {speed['speed']['rows_a_second'][name]:,.0f} | {speed['peak_bytes'][name] / 1e9:.2f} GB | "
            f"{number(best_rate, 3)} |"
        )
    formats = results("peer_formats").values()
    assert max(error for each in formats for error in (each["codes"], each["reconstructions"])) <= 2e-5
    quality = speed["quality"]
    after = {int(divisor): fvu for divisor, fvu in quality["ours_after_a_share_of_the_rows"].items()}
    assert 0.72 < speed["speed"]["share_of_the_floor"] < 0.78
    for divisor, peer in ((2, "dictionary_learning"), (4, "sparsify")):
        assert after[divisor] <= quality["sides"][peer]["best"]["fvu"]
    units = results("training_speed_amd_epyc_avx512_bf16")
    rate, sooner = units["speed"]["rows_a_second"], units["time_to_equal_fvu"]["times_shorter"]
    assert 0.63 < units["speed"]["share_of_the_floor"] < 0.69
    decoder = inversion["runs"]["50 steps, to 1.0, 1 iterations, decoder 3"]["psnr"]
    return [
        *table,
        "give the same codes and reconstructions to 2e-5",
        "Three quarters of our step are the encoder's product",
        f"ours trains on {rate['diffusers_sae']:,.0f} rows per second and sparsify on {rate['sparsify']:,.0f}, and the "
        "product takes two thirds of the step",
        f"any peer at its best rate is reached {number(sooner, 1)} times sooner (d = 256)",
        "ours has dictionary_learning's FVU after half of the rows and sparsify's after a quarter",
        f"is {number(best['adafactor'], 3)} then beside {number(best['adam'], 3)}, each at the best of five rates",
        f"train in {number(wide['memory']['adafactor']['train']['peak_gib'], 1)} GiB in all (`--optimizer "
        f"adafactor`) and "
        f"steer {wide['memory']['steer']['features']} features in {number(wide['memory']['steer']['peak_gib'], 1)} GiB",
        f"{number(decoder, 1)} dB at 50 steps on the embedded model, where it has "
        f"{number(inversion['autoencoder']['psnr'], 1)}",
        f"finds at least {percent(min(kind['recovered'] for kind in ours), 1)} % of them",
        f"the other libraries' TopK find {percent(min(found))} to {percent(max(found))} % at their best of "
        f"three rates, "
        f"with {percent(min(dead))} to {percent(max(dead))} % dead",
    ]
