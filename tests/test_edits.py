"""Edits against an independent float64 reference of the formula, and what makes an edit invalid."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import SITE, random_sae
from reference import edited

from diffusers_sae import InputError, LatentStatistics, StrengthMap, StrengthTable
from diffusers_sae.context import Context
from diffusers_sae.edits import OPERATIONS, make_edit
from diffusers_sae.prepared import prepare

CPU = torch.device("cpu")


def at(*timesteps, step=0, **attributes):
    context = Context(timesteps=timesteps, **attributes)
    context.step, context.known_step = torch.tensor(step), step
    return context


def strengths_of(edit, sae, context, statistics=None, grid=None):
    return prepare(edit, sae, statistics, context, None, CPU)._strengths_now(context, grid)


@pytest.mark.parametrize("mode", [name for name, op in OPERATIONS.items() if not op.overwrites])
@pytest.mark.parametrize("masked", [False, True])
def test_steered_site_equals_the_reference(sd, mode, masked):
    sae = random_sae(n_latents=64, k=5)
    features, strengths = list(range(0, 64, 3)), np.random.default_rng(0).normal(size=(2, 22))
    mask = torch.rand(2, 8, 8) if masked else None
    with sd.pipe.capture([SITE]) as bare:
        sd.run(prompt=["ab", "cd"])
    sd.pipe.load_sae(sae)
    sd.pipe.steer({f: list(strengths[:, i]) for i, f in enumerate(features)}, mode=mode, mask=mask)
    with sd.pipe.capture([SITE]) as steered:
        sd.run(prompt=["ab", "cd"])
    t = bare[SITE].timestep[0].item()
    before, after = bare[SITE].rows("cond", t), steered[SITE].rows("cond", t)  # (2, P, d)
    weights = mask.flatten(1)[..., None].double().numpy() if masked else 1.0
    expected = edited(sae, before, features, strengths, mode, weights)
    np.testing.assert_allclose(after.numpy(), expected, atol=2e-5)
    assert np.abs(expected - before.numpy()).max() > 0.1


def test_units_multiply_by_the_statistics_of_the_nearest_timestep(sae):
    n = sae.n_latents
    statistics = LatentStatistics(
        timesteps=torch.tensor([900.0, 100.0]),
        mean=torch.stack([torch.full((n,), 2.0), torch.full((n,), 3.0)]),
        max=torch.stack([torch.full((n,), 7.0), torch.full((n,), 11.0)]),
        rate=torch.stack([torch.full((n,), 0.5), torch.full((n,), 0.25)]),
    )
    context = at(1000.0, 300.0, step=1)
    for unit, expected in (("raw", 1.5), ("mean", 1.5 * 12), ("max", 1.5 * 11)):
        edit = make_edit({4: 1.5}, sae, unit=unit, statistics=statistics)
        assert strengths_of(edit, sae, context, statistics).item() == pytest.approx(expected)


def with_statistics(sae, timesteps=(900.0, 100.0)):
    """Statistics whose mean while firing and largest value are 4 and 7 for all latents at all timesteps."""
    full = torch.ones(len(timesteps), sae.n_latents)
    sae.statistics = LatentStatistics(torch.tensor(timesteps), 2 * full, 7 * full, 0.5 * full)
    return sae


@pytest.mark.parametrize("mode", OPERATIONS)
@pytest.mark.parametrize(("unit", "value"), [("mean", 4.0), ("max", 7.0)])
def test_a_unit_is_for_strengths_that_are_activations(sd, sae, mode, unit, value):
    """The strength of `scale` and of `ablate` is a factor, which has none."""
    sd.pipe.load_sae(with_statistics(sae))
    sd.pipe.steer({3: 0.5 if mode in ("scale", "ablate") else 0.5 * value}, mode=mode)
    raw = sd.run()
    if mode in ("scale", "ablate"):
        with pytest.raises(InputError, match=f"mode='{mode}' is a factor and has no unit; leave unit='{unit}' out."):
            sd.pipe.steer({3: 0.5}, mode=mode, unit=unit)
    else:
        sd.pipe.reset_steering()
        sd.pipe.steer({3: 0.5}, mode=mode, unit=unit)
    assert torch.equal(raw, sd.run())


@pytest.mark.parametrize("mode", [name for name, operation in OPERATIONS.items() if not operation.is_factor])
@pytest.mark.parametrize("unit", ["mean", "max"])
def test_a_unit_that_is_0_at_some_timesteps_is_a_warning(sd, sae, mode, unit):
    statistics = with_statistics(sae, tuple(range(1000, 0, -50))).statistics
    for values in (statistics.mean, statistics.max, statistics.rate):
        values[[1, 3], 4] = 0.0
        values[:12, 6] = 0.0
    sd.pipe.load_sae(sae)
    with pytest.warns(UserWarning, match="is 0 at some timesteps") as caught:
        sd.pipe.steer({3: 1.0, 4: 1.0, 6: 1.0}, mode=mode, unit=unit)
    assert [(str(each.message), each.filename) for each in caught] == [
        (
            f"The {unit} of these latents is 0 at some timesteps, and so is every strength of unit='{unit}' there: "
            "latent 4 at 950, 850, latent 6 at 1000, 950, 900, 850, 800, 750, 700, 650, 4 more; "
            "use unit='raw' for strengths that are not.",
            __file__,
        )
    ]


def test_a_unit_that_is_never_0_is_no_warning(sd, sae, recwarn):
    sd.pipe.load_sae(with_statistics(sae))
    sd.pipe.steer({3: 1.0, 4: 0.0}, unit="max")
    sd.pipe.steer({3: 1.0, 4: 0.0})
    assert not recwarn.list


@pytest.mark.parametrize(
    ("unit", "mean", "largest", "sentence"),
    [
        ("max", [-1.0, 2.0], [-0.5, 3.0], "The max of latent 4 is below 0 at some timesteps and no unit"),
        ("mean", [-1.0, 2.0], [0.5, 3.0], "The mean of latent 4 is below 0 at some timesteps and no unit"),
        ("max", [0.0, 0.0], [0.0, 0.0], "Latent 4 was never active when the statistics were taken"),
        ("mean", [0.0, 0.0], [0.0, 0.0], "Latent 4 was never active when the statistics were taken"),
    ],
)
def test_a_unit_that_would_turn_a_strength_round_or_lose_it_is_refused(sae, unit, mean, largest, sentence):
    spread = torch.ones(2, sae.n_latents)
    rate = torch.tensor(mean)[:, None].ne(0) * spread
    values = torch.tensor(mean)[:, None] * spread, torch.tensor(largest)[:, None] * spread, rate
    statistics = LatentStatistics(torch.tensor([900.0, 100.0]), *values)
    with pytest.raises(InputError, match=sentence):
        make_edit({4: 1.5}, sae, mode="cap", unit=unit, statistics=statistics)
    make_edit({4: 1.5}, sae, mode="cap", statistics=statistics)


def test_strength_kinds(sae):
    table = StrengthTable((900.0, 100.0), (1.0, 5.0))
    edit = make_edit({0: 2, 1: [3.0, 4.0], 2: lambda p: 10 * p, 3: table}, sae)
    context = at(1000.0, 200.0, step=1, rows=4, branches=("uncond", "cond"))
    expected = torch.tensor([[[2.0, 3.0, 5.0, 5.0]], [[2.0, 4.0, 5.0, 5.0]]])
    torch.testing.assert_close(strengths_of(edit, sae, context), expected)


def test_functions_of_every_kind(sae):
    class Rising:
        def __call__(self, progress, factor=2.0):
            return np.float32(factor * progress)

    edit = make_edit({0: math.sqrt, 1: Rising(), 2: partial(max, 0.5), 3: torch.tensor, 4: torch.nn.Identity()}, sae)
    context = at(1000.0, 970.0, 800.0, 0.0, step=1)
    torch.testing.assert_close(strengths_of(edit, sae, context), torch.tensor([[[0.5, 0.5, 0.5, 0.25, 0.25]]]))


def test_functions_are_asked_once_per_step(sae):
    seen = []
    edit = make_edit({0: lambda p: seen.append(p) or 8 * p}, sae)
    context = at(900.0, 700.0, 700.0, 500.0, 500.0, steps=(0, 0, 1, 1, 2), step=3)
    assert strengths_of(edit, sae, context).item() == pytest.approx(8 / 3)
    assert seen == [0.0, 1 / 3, 2 / 3]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 28, 50, 999])
def test_windows_that_meet_hold_every_step_once(sae, count):
    bounds = [0.0, 0.1, 0.3, 1 / 3, 0.6, 2 / 3, 0.7, 1.0]
    edits = [make_edit({0: 1.0}, sae, start=a, stop=b) for a, b in pairwise(bounds)]
    for step in range(count):
        assert sum(edit.in_window(step, count) for edit in edits) == 1


@pytest.mark.parametrize(
    ("start", "stop", "count", "inside"),
    [
        (0.0, 0.6, 10, range(6)),  # 0.6 * 10 is 6 and rounding must not make it less
        (0.0, 0.29, 100, range(29)),  # which is 28.999999999999996 in floating point
        (0.3, 0.4, 4, range(1, 1)),
        (0.25, 0.5, 4, range(1, 2)),
        (1 / 3, 2 / 3, 28, range(9, 18)),
        (0.0, 1.0, 1, range(1)),
        (0.5, 1.0, 1, range(1)),
    ],
)
def test_a_window_holds_these_steps(sae, start, stop, count, inside):
    edit = make_edit({0: 1.0}, sae, start=start, stop=stop)
    assert [step for step in range(count) if edit.in_window(step, count)] == list(inside)


def test_what_a_strength_function_raises_is_raised(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: lambda p: {}["strength"]})
    with pytest.raises(KeyError, match="strength"):
        sd.run()


def test_a_map_gives_every_place_its_strength(sae):
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    edit = make_edit({0: 0.5, 1: StrengthMap((900.0, 100.0), values)}, sae)
    context = at(1000.0, 200.0, step=1)
    expected = torch.stack([torch.full((4,), 0.5), torch.tensor([5.0, 6.0, 7.0, 8.0])], -1)[None]
    torch.testing.assert_close(strengths_of(edit, sae, context, grid=(2, 2)), expected)
    wide = strengths_of(edit, sae, context, grid=(4, 4))[0, :, 1].view(4, 4)
    assert wide[0, 0] == 5 and wide[3, 3] == 8
    torch.testing.assert_close(wide.mean(), values[1].mean())


def test_a_finer_map_is_averaged(sae):
    values = torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(0))
    edit = make_edit({0: 0.5, 1: StrengthMap((900.0, 100.0), values)}, sae)
    averaged = strengths_of(edit, sae, at(1000.0, 200.0, step=1), grid=(4, 4))[0, :, 1].view(4, 4)
    torch.testing.assert_close(averaged, values[1].unflatten(0, (4, 4)).unflatten(2, (4, 6)).mean((1, 3)))


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (16, 16), (6, 6)])
@pytest.mark.parametrize("unit", ["raw", "max"])
def test_maps_of_different_sizes_mean_what_each_means_alone(sae, grid, unit):
    context = at(1000.0, 200.0, step=1, rows=4, branches=("uncond", "cond"))
    statistics = with_statistics(sae).statistics
    statistics.max *= torch.arange(1, sae.n_latents + 1)
    maps = [StrengthMap((900.0, 100.0), torch.rand(2, size, size)) for size in (16, 4, 16, 1, 8)]
    features = {9: 0.5, 1: maps[0], 5: maps[1], 2: [1.0, 2.0], 7: maps[2], 8: maps[3], 3: maps[4]}
    prepared = prepare(make_edit(features, sae, unit=unit, statistics=statistics), sae, statistics, context, None, CPU)
    assert sorted(prepared.features.tolist()) == sorted(features)
    torch.testing.assert_close(prepared.directions, sae.W_dec[prepared.features])
    together = prepared._strengths_now(context, grid).expand(2, grid[0] * grid[1], -1)
    for feature, strength in features.items():
        edit = make_edit({feature: strength}, sae, unit=unit, statistics=statistics)
        alone = strengths_of(edit, sae, context, statistics, grid)
        column = prepared.features.tolist().index(feature)
        torch.testing.assert_close(together[..., column], alone[..., 0].expand(2, grid[0] * grid[1]))


@pytest.mark.parametrize("mode", OPERATIONS)
def test_one_edit_with_maps_of_different_sizes_does_what_two_do(sd, sae, mode):
    fine, coarse = (StrengthMap((500.0,), 4 * torch.rand(1, size, size) - 1) for size in (16, 2))
    sd.pipe.load_sae(sae)
    sd.pipe.steer({5: coarse, 3: fine}, mode=mode)
    together = sd.run()
    sd.pipe.reset_steering()
    sd.pipe.steer({3: fine, 5: coarse}, mode=mode)
    torch.testing.assert_close(together, sd.run(), atol=1e-5, rtol=1e-4)
    if not OPERATIONS[mode].overwrites:  # which looks at all features of an edit together
        sd.pipe.reset_steering()
        sd.pipe.steer({3: fine}, mode=mode)
        sd.pipe.steer({5: coarse}, mode=mode)
        torch.testing.assert_close(together, sd.run(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, np.float32, np.int32])
def test_maps_of_every_type(sae, dtype):
    values = np.eye(4, dtype=dtype)[None] if isinstance(dtype, type) else torch.eye(4, dtype=dtype)[None]
    edit = make_edit({3: StrengthMap((500.0,), values)}, sae)
    on_grid = strengths_of(edit, sae, at(500.0), grid=(2, 2))
    torch.testing.assert_close(on_grid[0, :, 0], torch.tensor([0.5, 0.0, 0.0, 0.5]))


def test_an_edit_does_not_change_with_what_it_was_made_of(sae):
    values, mask, listed, table, tokens = torch.eye(4)[None], np.eye(4, dtype=np.float32), [1.0, 2.0], [3.0], [4]
    edit = make_edit(
        {3: StrengthMap((500.0,), values), 4: listed, 5: StrengthTable((500.0,), table)}, sae, mask=mask, tokens=tokens
    )
    values[:], mask[:], listed[0], table[0], tokens[0] = 7.0, 0.25, 7.0, 7.0, 7
    assert torch.equal(edit.strengths[0].values, torch.eye(4)[None])
    assert torch.equal(edit.mask[0, 0], torch.eye(4)) and edit.tokens == (4,)
    assert edit.strengths[1] == [1.0, 2.0] and list(edit.strengths[2].values) == [3.0]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (12, 12), (10, 10), (4, 4), (3, 3)])
def test_a_mask_of_another_size_covers_the_same_area(sd, sae, size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0))
    prepared = prepare(make_edit({3: 1.0}, sae, mask=mask), sae, None, at(0.0), None, CPU)
    on_grid = prepared._mask_at((8, 8), 1)
    assert on_grid.shape == (1, 64, 1) and float(on_grid.min()) >= 0 and float(on_grid.max()) <= 1
    torch.testing.assert_close(on_grid.mean(), mask.mean())


def test_a_map_edits_places_of_the_image(sd, sae):
    """A map does what masks of single places do, each with its strength."""
    sd.pipe.load_sae(sae, adapter_name="one")
    bare = sd.run()
    values = torch.zeros(1, 8, 8)
    values[0, 1, 2], values[0, 6, 5] = 4.0, -9.0
    sd.pipe.steer({3: StrengthMap((500.0,), values)})
    mapped = sd.run()
    sd.pipe.reset_steering()
    for strength, (row, column) in ((4.0, (1, 2)), (-9.0, (6, 5))):
        mask = torch.zeros(8, 8)
        mask[row, column] = 1
        sd.pipe.steer({3: strength}, mask=mask)
    torch.testing.assert_close(mapped, sd.run(), atol=1e-5, rtol=1e-4)
    assert not torch.equal(mapped, bare)


def test_replace_overwrites_places_that_fire_by_the_nearest_that_do_not(sd, sae):
    with sd.pipe.capture([SITE]) as bare:
        sd.run()
    t = bare[SITE].timestep[0].item()
    x = bare[SITE].rows("cond", t)[0]
    z = sae.encode(x)
    feature = int(((z > 0).sum(0) - 20).abs().argmin())
    bound = float(z[z[:, feature] > 0, feature].median().detach())
    fires = z[:, feature] > bound
    assert 0 < fires.sum() < 64
    places = [(p // 8, p % 8) for p in range(64)]
    expected = x.clone()
    for p in fires.nonzero().flatten().tolist():
        free = [q for q in range(64) if not fires[q]]
        distances = [(places[p][0] - places[q][0]) ** 2 + (places[p][1] - places[q][1]) ** 2 for q in free]
        nearest = [q for q, distance in zip(free, distances, strict=True) if distance == min(distances)]
        assert any(torch.equal(x[q], x[nearest[0]]) for q in nearest)
        expected[p] = x[nearest[0]]
    sd.pipe.load_sae(sae)
    sd.pipe.steer({feature: bound}, mode="replace")
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    torch.testing.assert_close(steered[SITE].rows("cond", t)[0], expected, atol=1e-5, rtol=1e-5)


def test_replace_leaves_an_image_in_which_every_place_fires(sd, sae):
    sd.pipe.load_sae(sae)
    bare = sd.run()
    sd.pipe.steer({3: -1.0}, mode="replace")
    assert torch.equal(bare, sd.run())


def test_preserve_norm_turns_rows_and_does_not_stretch_them(sd, sae):
    sd.pipe.load_sae(sae)
    with sd.pipe.capture([SITE]) as bare:
        sd.run()
    sd.pipe.steer({3: 8.0}, preserve_norm=True)
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    t = bare[SITE].timestep[0].item()
    before, after = (x[SITE].rows("cond", t) for x in (bare, steered))
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    expected = torch.nn.functional.normalize(before + 8 * sae.W_dec[3], dim=-1)
    torch.testing.assert_close(torch.nn.functional.normalize(after, dim=-1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"features": {32: 1.0}}, "Feature 32 is out of range; this SAE has the features 0 to 31."),
        ({"features": {-1: 1.0}}, "Feature -1 is out of range"),
        ({"features": {"a": 1.0}}, "'a' is not a feature"),
        ({"features": {True: 1.0}}, "True is not a feature"),
        ({"features": {}}, "at least one feature"),
        ({"features": [3]}, "steer takes a dict"),
        ({"features": {3: float("nan")}}, "must be finite"),
        ({"features": {3: float("inf")}}, "must be finite"),
        ({"features": {3: [1.0, float("nan")]}}, "must be finite"),
        ({"features": {3: []}}, "must be finite"),
        ({"features": {3: lambda: 1.0}}, "is a function of (); it must take one argument, the progress"),
        ({"features": {3: lambda p, q: 1.0}}, "is a function of (p, q); it must take one argument, the progress"),
        ({"features": {3: "12"}}, "is not a number"),
        ({"preserve_norm": "no"}, "preserve_norm='no' is no choice"),
        ({"features": {3: "strong"}}, "is not a number"),
        ({"features": {3: None}}, "is not a number"),
        ({"features": {3: StrengthTable((1.0,), (float("nan"),))}}, "must be finite"),
        ({"features": {3: StrengthMap((1.0,), torch.full((1, 2, 2), float("inf")))}}, "must be finite"),
        ({"features": {3: StrengthMap((1.0, 2.0), torch.zeros(1, 2, 2))}}, "must be (timesteps, height, width)"),
        ({"features": {3: 10**400}}, "is not a number"),
        ({"features": {3: [1.0, 10**400]}}, "is not a number"),
        ({"features": {3: {1.0: 2.0}}}, "is not a number"),
        ({"features": {3: {1.0, 2.0}}}, "is not a number"),
        ({"features": {3: torch.ones(2, 2)}}, "is not a number"),
        ({"features": {3: np.ones((2, 2))}}, "is not a number"),
        ({"features": {3: StrengthTable((math.nan,), (1.0,))}}, "timesteps that are not finite"),
        ({"features": {3: StrengthMap((math.inf,), torch.ones(1, 2, 2))}}, "timesteps that are not finite"),
        ({"features": {3: StrengthMap(("x",), torch.ones(1, 2, 2))}}, "timesteps that are no numbers"),
        ({"features": {3: StrengthMap((1.0,), torch.ones(1, 2, 2) * 1j)}}, "no tensor of real numbers"),
        ({"features": {3: StrengthTable((1.0, 2.0), (1.0,))}}, "as many values as timesteps"),
        ({"features": {3: StrengthTable((1.0,), "x")}}, "as many values as timesteps"),
        ({"features": {3: StrengthTable(1.0, 1.0)}}, "as many values as timesteps"),
        ({"features": {3: StrengthMap((1.0,), [[["x"]]])}}, "has values that are no tensor"),
        ({"mode": "boost"}, "'boost' is not a mode; choose one of add, set, scale, cap, ablate, replace."),
        ({"branch": "neg"}, "'neg' is not a branch"),
        ({"unit": "percent"}, "'percent' is not a unit"),
        ({"unit": "mean"}, "unit='mean' needs the SAE's statistics"),
        ({"start": 0.6, "stop": 0.6}, "it needs 0 <= start < stop <= 1"),
        ({"start": 0.9, "stop": 0.1}, "it needs 0 <= start < stop <= 1"),
        ({"start": None}, "it needs 0 <= start < stop <= 1"),
        ({"start": "0"}, "it needs 0 <= start < stop <= 1"),
        ({"start": False}, "it needs 0 <= start < stop <= 1"),
        ({"stop": True}, "it needs 0 <= start < stop <= 1"),
        ({"stop": [1.0]}, "it needs 0 <= start < stop <= 1"),
        ({"stop": 1.5}, "it needs 0 <= start < stop <= 1"),
        ({"start": float("nan")}, "it needs 0 <= start < stop <= 1"),
        ({"start": 0.5, "stop": 0.5}, "start=0.5 and stop=0.5 are no fractions of the steps"),
        ({"mask": torch.ones(4)}, "it must be (H, W), (images, H, W)"),
        ({"mask": torch.ones(0, 4)}, "it must be (H, W), (images, H, W)"),
        ({"mask": torch.full((4, 4), 2.0)}, "values outside 0 to 1"),
        ({"mask": torch.full((4, 4), 255)}, "numbers of type int64 other than 0 and 1"),
        ({"mask": torch.full((4, 4), float("nan"))}, "values outside 0 to 1"),
        ({"tokens": [1]}, "tokens are for sites of text"),
        ({"tokens": []}, "is not a list of positions"),
        ({"tokens": "cat"}, "is not a list of positions"),
        ({"tokens": [1.5]}, "entries that are no positions"),
        ({"mask": "left"}, "The mask of type str holds no numbers"),
    ],
)
def test_bad_edits_get_a_sentence_and_leave_the_plan(sd, sae, arguments, sentence):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({1: 4.0})
    before = sd.run()
    with pytest.raises(InputError) as error:
        sd.pipe.steer(**{"features": {3: 1.0}, **arguments})
    text = str(error.value)
    assert sentence in text and text.endswith(".") and "\n" not in text
    assert torch.equal(before, sd.run())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"features": {3: [1.0, 2.0]}}, "A strength has 2 numbers and the batch 1 images"),
        ({"features": {3: lambda p: float("nan")}}, "A strength is nan at progress"),
        ({"features": {3: lambda p: "strong"}}, "A strength is 'strong' at progress 0."),
        ({"features": {3: lambda p: "1"}}, "A strength is '1' at progress"),
        ({"features": {3: lambda p: None}}, "A strength is None at progress"),
        ({"features": {3: lambda p: [p]}}, "A strength is [0."),
        ({"features": {3: lambda p: torch.ones(2)}}, "A strength is tensor([1., 1.]) at progress"),
        ({"features": {3: lambda p: 10**400}}, "; return a finite number."),
        ({"mask": torch.ones(3, 8, 8)}, "The mask has 3 images and the batch 1"),
        ({"mask": torch.ones(8, 32)}, "does not fit a site of 8 x 8"),
    ],
)
def test_what_only_the_call_can_tell_stops_the_call_alone(sd, sae, arguments, sentence):
    sd.pipe.load_sae(sae)
    before = sd.run()
    sd.pipe.steer(**{"features": {3: 1.0}, **arguments})
    with pytest.raises(InputError) as error:
        sd.run()
    assert sentence in str(error.value)
    sd.pipe.reset_steering()
    assert torch.equal(before, sd.run())


def test_edits_of_one_sae_share_one_encoding(sd, sae, monkeypatch):
    sd.pipe.load_sae(sae)
    for feature, mode in ((3, "set"), (5, "scale"), (7, "ablate"), (9, "add")):
        sd.pipe.steer({feature: 0.5}, mode=mode)
    calls = []
    whole = type(sae).encode_only
    monkeypatch.setattr(type(sae), "encode_only", lambda *args: calls.append(1) or whole(*args))
    sd.run()
    assert len(calls) == 4  # one a step, on the cond branch
