"""Rules: only the images they hold for are edited, from the moment they are decided."""

import pytest
import torch
from conftest import SITE, random_sae
from tiny import tiny_unet

from diffusers_sae import InputError, Rule

EARLIER = "unet.down_blocks.0.attentions.0"
PROMPTS = ["ab", "cd"]


def sums_at_first_step(sd, sae, features, site=SITE):
    """The rule's sum for each of the two images, in numpy float64."""
    with sd.pipe.capture([site]) as seen:
        sd.run(prompt=PROMPTS)
    rows = seen[site].rows("cond", seen[site].timestep[0].item())
    with torch.no_grad():
        code = sae.encode(rows).double().mean(1).numpy()
    return sum(w * code[:, j] for j, w in features.items())


@pytest.fixture
def split(sd):
    """An SAE, and features and a bound that tell the second prompt's image from the first one's."""
    torch.manual_seed(1)
    sae = random_sae(n_latents=16, k=8)
    features = {j: float(w) for j, w in enumerate(torch.randn(16))}
    first, second = sums_at_first_step(sd, sae, features)
    if first > second:
        features = {j: -w for j, w in features.items()}
    return sae, features, (first + second) / 2 if first < second else -(first + second) / 2


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
def test_only_images_that_the_rule_holds_for_are_edited(sd, split, branch):
    sae, features, above = split
    bare = sd.run(prompt=PROMPTS)
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 5.0}, branch=branch)
    steered = sd.run(prompt=PROMPTS)
    sd.pipe.reset_steering()
    sd.pipe.steer({3: 5.0}, branch=branch, when=Rule(features, above))
    ruled = sd.run(prompt=PROMPTS)
    assert torch.equal(ruled[0], bare[0])
    assert torch.equal(ruled[1], steered[1]) and not torch.equal(ruled[1], bare[1])


def test_every_run_is_decided_anew(sd, split):
    sae, features, above = split
    sd.pipe.load_sae(sae)
    bare = [sd.run(prompt=PROMPTS), sd.run(prompt=PROMPTS[::-1])]
    sd.pipe.steer({3: 5.0}, when=Rule(features, above))
    for old, prompts in zip(bare, (PROMPTS, PROMPTS[::-1]), strict=True):
        changed = [not torch.equal(a, b) for a, b in zip(old, sd.run(prompt=prompts), strict=True)]
        assert changed == sd.pipe.rule_decisions()["default_0", 0].tolist()


def test_a_rule_about_a_later_site_lets_earlier_edits_act_from_the_second_step(sd, split):
    sae, features, above = split
    sd.pipe.load_sae(sae, adapter_name="later")
    sd.pipe.load_sae(random_sae(site={"path": EARLIER}), adapter_name="earlier")
    bare = sd.run(prompt=PROMPTS)
    sd.pipe.steer({3: 5.0}, adapter_name="earlier", when=Rule(features, above, "later"))
    ruled = sd.run(prompt=PROMPTS)
    sd.pipe.reset_steering()
    sd.pipe.steer({3: 5.0}, adapter_name="earlier", start=0.25)  # all of the four steps but the first
    assert torch.equal(ruled[0], bare[0])
    assert torch.equal(ruled[1], sd.run(prompt=PROMPTS)[1])


def test_a_disabled_sae_still_decides(sd, split):
    sae, features, above = split
    sd.pipe.load_sae(sae, adapter_name="eye")
    sd.pipe.load_sae(random_sae(), adapter_name="hand")
    sd.pipe.steer({3: 5.0}, adapter_name="hand", when=Rule(features, above, "eye"))
    ruled = sd.run(prompt=PROMPTS)
    sd.pipe.disable_sae("eye")
    assert torch.equal(ruled, sd.run(prompt=PROMPTS))


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("neon", "when='neon' is not a rule"),
        (Rule({}), "with at least one feature"),
        (Rule([3]), "with at least one feature"),
        (Rule({99: 1.0}), "Feature 99 is out of range"),
        (Rule({3: float("nan")}), "not finite numbers"),
        (Rule({3: 1.0}, above=float("inf")), "not finite numbers"),
        (Rule({3: "high"}), "not finite numbers"),
        (Rule({3: 1.0}, adapter_name="other"), "No SAE is named 'other'"),
    ],
)
def test_bad_rules_get_a_sentence_and_leave_the_plan(sd, sae, rule, sentence):
    sd.pipe.load_sae(sae)
    before = sd.run()
    with pytest.raises(InputError) as error:
        sd.pipe.steer({3: 1.0}, when=rule)
    assert sentence in str(error.value) and str(error.value).endswith(".")
    assert torch.equal(before, sd.run())


def test_an_sae_that_a_rule_is_about_is_not_deleted_alone(sd, sae):
    sd.pipe.load_sae(sae, adapter_name="eye")
    sd.pipe.load_sae(random_sae(), adapter_name="hand")
    sd.pipe.steer({3: 5.0}, adapter_name="hand", when=Rule({1: 1.0}, adapter_name="eye"))
    with pytest.raises(InputError, match=r"Edits of 'hand' have a rule about 'eye'; delete both SAEs"):
        sd.pipe.delete_saes("eye")
    assert list(sd.pipe.get_list_saes()) == ["eye", "hand"]
    sd.pipe.delete_saes(["eye", "hand"])
    assert sd.pipe.get_list_saes() == {}


def test_a_rule_that_was_never_decided_is_warned_of(sd, sae):
    sd.pipe.load_sae(sae, adapter_name="eye")
    sd.pipe.load_sae(random_sae(site={"path": EARLIER}), adapter_name="hand")
    sd.pipe.steer({3: 5.0}, adapter_name="hand", when=Rule({1: 1.0}, adapter_name="eye"))
    sd.pipe.register_modules(unet=tiny_unet())
    with pytest.warns(UserWarning, match="The edits with rules about 'eye' at .* never acted"):
        sd.run()


def test_a_rule_at_places_acts_where_it_holds(sd, sae):
    with sd.pipe.capture([SITE]) as bare:
        sd.run()
    t = bare[SITE].timestep[0].item()
    before = bare[SITE].rows("cond", t)[0]
    z = sae.encode(before)[:, 5]
    bound = float(z.unique()[len(z.unique()) // 2 :][:2].mean().detach())
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 8.0}, when=Rule({5: 1.0}, bound, at="place"))
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    moved = steered[SITE].rows("cond", t)[0] - before
    holds = z > bound
    assert 0 < holds.sum() < len(z)
    torch.testing.assert_close(moved[holds], (8 * sae.W_dec[3]).expand_as(moved[holds]), atol=1e-5, rtol=1e-4)
    assert not moved[~holds].any()


def test_a_rule_at_places_of_another_site_is_brought_to_the_grid(sd, sae):
    """The mid block's grid is half as fine; each of its places decides over four."""
    watched = "unet.mid_block"
    torch.manual_seed(4)
    sd.pipe.load_sae(random_sae(16, site={"path": watched}), adapter_name="eye")
    sd.pipe.load_sae(sae, adapter_name="hand")
    with sd.pipe.capture([SITE, watched]) as bare:
        sd.run()
    t = bare[SITE].timestep[0].item()
    z = sd.pipe._steering.loaded["eye"].sae.encode(bare[watched].rows("cond", t)[0])
    feature = int((z > 0).float().mean(0).sub(0.5).abs().argmin())
    holds = (z[:, feature] > 0).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    assert 0 < holds.sum() < 64
    sd.pipe.steer({3: 8.0}, adapter_name="hand", when=Rule({feature: 1.0}, 0.0, "eye", at="place"))
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    moved = (steered[SITE].rows("cond", t) - bare[SITE].rows("cond", t))[0]
    assert torch.equal(moved.abs().sum(-1) > 0, holds)


def test_bad_places_of_rules(sd, sae):
    sd.pipe.load_sae(sae)
    with pytest.raises(InputError, match="at='corner' is not where a rule can hold"):
        sd.pipe.steer({3: 1.0}, when=Rule({1: 1.0}, at="corner"))
