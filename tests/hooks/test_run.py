"""A run has its own state: runs overlap, nest and share modules, and each gives the bits that it gives alone."""

import threading

import pytest
import torch
from conftest import SITE, Harness, random_sae
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from tiny import make, tiny_unet

from diffusers_sae import SAESteeringPipeline, Site
from diffusers_sae.hooks import current_run

STEERED = {3: 6.0}


def own_scheduler(pipe):
    return type(pipe.scheduler).from_config(pipe.scheduler.config)


def stock_beside(pipe, **components):
    """A stock pipeline over the same modules, with a scheduler of its own."""
    parts = {**pipe.components, "scheduler": own_scheduler(pipe), **components}
    stock = type(pipe)(**parts, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture
def embedded(sd):
    """Arguments with the prompt's embeddings in its place, since tokenizers are not made for threads."""
    embeds, negative = sd.bare.encode_prompt("ab", "cpu", 1, True, "")
    return {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}


def in_threads(*jobs):
    """What functions return that run at the same time."""
    results = [None] * len(jobs)

    def work(i):
        with torch.no_grad():
            results[i] = jobs[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def edited_at(sd, sae, steps, rows=slice(1, 2), unet=None, pipe=None, prompt="ab", **call):
    """Images of the bare pipeline with the change added by hand at some steps."""
    module = (unet or sd.bare.unet).get_submodule(SITE.removeprefix("unet."))
    count = [0]

    def add(module, args, output):
        x = output[0].clone()
        if count[0] in steps:
            x[rows] += 6.0 * sae.W_dec.detach()[3, :, None, None]
        count[0] += 1
        return (x, *output[1:])

    handle = module.register_forward_hook(add)
    images = sd.run(pipe or sd.bare, prompt=prompt, **call)
    handle.remove()
    return images


def after_step(step, act):
    """A callback that acts after one step."""

    def callback(pipe, i, timestep, tensors):
        if i == step:
            act(pipe)
        return tensors

    return callback


def test_a_stock_pipeline_in_another_thread_is_not_steered(sd, sae, embedded):
    stock = stock_beside(sd.bare)
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    bare, steered = sd.run(stock, **embedded), sd.run(**embedded)
    assert not torch.equal(bare, steered)
    found = in_threads(
        lambda: [sd.run(**embedded) for _ in range(6)], lambda: [sd.run(stock, **embedded) for _ in range(6)]
    )
    assert all(torch.equal(images, steered) for images in found[0])
    assert all(torch.equal(images, bare) for images in found[1])


@pytest.mark.parametrize("copied", ["copy", "from_pipe"])
def test_two_pipelines_over_the_same_modules_in_two_threads(sd, sae, embedded, copied):
    import copy

    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    twin = copy.copy(sd.pipe) if copied == "copy" else SAESteeringPipeline.from_pipe(sd.pipe)
    twin.register_modules(scheduler=own_scheduler(sd.pipe))
    twin.unload_sae()
    twin.load_sae(sae)
    twin.steer({5: -4.0}, branch="both")
    alone = [sd.run(pipe, **embedded) for pipe in (sd.pipe, twin)]
    found = in_threads(*(lambda p=pipe: [sd.run(p, **embedded) for _ in range(6)] for pipe in (sd.pipe, twin)))
    for expected, runs in zip(alone, found, strict=True):
        assert all(torch.equal(expected, images) for images in runs)


@pytest.mark.parametrize("inner", ["stock", "another", "itself"])
def test_a_run_inside_a_callback_is_a_run_of_its_own(sd, sae, embedded, inner):
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    steered = sd.run(**embedded)
    other = {
        "stock": stock_beside(sd.bare),
        "another": SAESteeringPipeline.from_pipe(stock_beside(sd.bare)),
        "itself": sd.pipe,
    }[inner]
    if inner == "another":
        other.load_sae(sae)
        other.steer({5: -4.0})
    alone, seen = sd.run(other, **embedded), []

    def act(pipe):
        assert current_run() is None
        kept, other.scheduler = other.scheduler, own_scheduler(sd.bare)
        seen.append(sd.run(other, **embedded))
        other.scheduler = kept

    with sd.pipe.capture([SITE]) as activations:
        outer = sd.run(callback_on_step_end=after_step(1, act), **embedded)
    assert torch.equal(seen[0], alone) and torch.equal(outer, steered)
    calls = 4 if inner != "itself" else 8
    assert activations[SITE].calls == calls
    images = activations[SITE].image - activations[SITE].image[0]
    assert images.tolist() == [0] * 4 + ([] if inner != "itself" else [1] * 8) + [0] * 4


def test_captures_of_two_threads_hold_their_own_calls(sd, embedded):
    other = SAESteeringPipeline.from_pipe(stock_beside(sd.bare))

    def capture(pipe, steps):
        with pipe.capture([SITE]) as activations:
            for _ in range(4):
                sd.run(pipe, num_inference_steps=steps, **embedded)
        return activations[SITE]

    alone = [capture(sd.pipe, 4), capture(other, 3)]
    found = in_threads(lambda: capture(sd.pipe, 4), lambda: capture(other, 3))
    for expected, seen in zip(alone, found, strict=True):
        assert torch.equal(expected.tensor, seen.tensor) and torch.equal(expected.timestep, seen.timestep)


PLANS = {
    "steer": (False, lambda pipe: pipe.steer(STEERED), (2, 3)),
    "reset_steering": (True, lambda pipe: pipe.reset_steering(), (0, 1)),
    "disable_sae": (True, lambda pipe: pipe.disable_sae(), (0, 1)),
    "unload_sae": (True, lambda pipe: pipe.unload_sae(), (0, 1)),
    "nothing": (True, lambda pipe: None, (0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_change_of_plan_in_a_callback_acts_from_the_next_step_on(sd, sae, name):
    before, act, steps = PLANS[name]
    sd.pipe.load_sae(sae)
    if before:
        sd.pipe.steer(STEERED)
    images = sd.run(callback_on_step_end=after_step(1, act))
    assert torch.equal(images, edited_at(sd, sae, steps))


def test_a_steering_block_opened_and_closed_in_a_callback(sd, sae):
    sd.pipe.load_sae(sae)
    steering = sd.pipe.steering(STEERED)

    def callback(pipe, i, timestep, tensors):
        if i == 0:
            steering.__enter__()
        if i == 2:
            steering.__exit__(None, None, None)
        return tensors

    assert torch.equal(sd.run(callback_on_step_end=callback), edited_at(sd, sae, (1, 2)))


def test_enabling_and_loading_in_a_callback(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    sd.pipe.disable_sae()
    images = sd.run(callback_on_step_end=after_step(2, lambda pipe: pipe.enable_sae()))
    assert torch.equal(images, edited_at(sd, sae, (3,)))
    sd.pipe.unload_sae()

    def load(pipe):
        pipe.load_sae(sae)
        pipe.steer(STEERED, stop=0.75)

    assert torch.equal(sd.run(callback_on_step_end=after_step(0, load)), edited_at(sd, sae, (1, 2)))


def test_an_sae_loaded_in_a_callback_counts_the_steps_of_the_whole_run(sd, sae):
    seen = []

    def load(pipe):
        pipe.load_sae(sae)
        pipe.steer({3: lambda done: seen.append(done) or 0.0})

    sd.run(callback_on_step_end=after_step(1, load))
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.filterwarnings("ignore:The SAE was trained at")
def test_a_capture_of_an_input_holds_it_as_it_was_edited(sd, sae):
    site = Site(SITE, kind="input")
    with sd.pipe.capture([site]) as bare:
        sd.run()
    sd.pipe.load_sae(sae, site)
    sd.pipe.steer(STEERED)
    with sd.pipe.capture([site]) as steered:
        sd.run()
    t = bare[site].timestep[0].item()
    change = steered[site].rows("cond", t) - bare[site].rows("cond", t)
    torch.testing.assert_close(change, (6.0 * sae.W_dec[3]).expand_as(change), atol=1e-5, rtol=1e-5)


def test_a_capture_opened_and_closed_in_a_callback(sd):
    with sd.pipe.capture([SITE]) as whole:
        sd.run()
    capture = sd.pipe.capture([SITE])
    seen = []

    def callback(pipe, i, timestep, tensors):
        if i == 0:
            seen.append(capture.__enter__())
        if i == 2:
            capture.__exit__(None, None, None)
        return tensors

    sd.run(callback_on_step_end=callback)
    assert torch.equal(seen[0][SITE].tensor, whole[SITE].tensor[2:6])
    assert seen[0][SITE].timestep.tolist() == whole[SITE].timestep[2:6].tolist()


def test_rules_that_are_decided_stay_decided_when_the_plan_changes(sd, sae):
    from diffusers_sae import Rule

    earlier = "unet.down_blocks.0.attentions.0"
    sd.pipe.load_sae(sae, adapter_name="late")
    sd.pipe.load_sae(random_sae(site={"path": earlier}), adapter_name="early")
    sd.pipe.steer(STEERED, "late")
    with sd.pipe.capture([earlier]) as seen:
        steered = sd.run()
    rows = torch.cat([seen[earlier].rows("cond", t.item()) for t in seen[earlier].timestep[::2]])
    means = sd.pipe._steering.loaded["early"].sae.encode(rows).mean(1)  # (steps, n)
    drop, feature = (means[0] - means[1:].amax(0)).max(0)
    assert drop > 0
    rule = Rule({int(feature): 1.0}, float(means[0, feature] - drop / 2), "early")  # which holds at the first step only
    sd.pipe.reset_steering()
    sd.pipe.steer(STEERED, "late", when=rule)
    images = sd.run(callback_on_step_end=after_step(0, lambda pipe: pipe.steer({5: 0.0}, "late")))
    assert torch.equal(images, steered) and sd.pipe.rule_decisions()["late", 0].tolist() == [True]


class Recorder(PipelineCallback):
    """As users write them: a class whose tensors the pipeline asks for, with state of its own."""

    @property
    def tensor_inputs(self):
        return ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert current_run() is None
        self.seen = [*getattr(self, "seen", []), callback_kwargs["latents"].clone()]
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_callbacks_of_diffusers_classes_keep_their_inputs_and_state(sd, sae, several):
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    recorder = Recorder()
    images = sd.run(callback_on_step_end=MultiPipelineCallbacks([recorder]) if several else recorder)
    assert len(recorder.seen) == 4 and torch.equal(images, sd.run())


def test_a_callback_given_by_position_and_a_legacy_one():
    harness = Harness("PixArt-Sigma")
    harness.pipe.load_sae(harness.sae())
    harness.pipe.steer(STEERED)
    seen = []
    images = harness.run(callback=lambda i, t, latents: seen.append(current_run()), callback_steps=1)
    assert seen == [None] * 4 and torch.equal(images, harness.run())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "module", "strength"])
def test_an_error_anywhere_leaves_the_thread_without_a_run(sd, sae, error, where):
    bare = sd.run()
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    steered = sd.run()

    def fail(*_):
        raise error

    handle = sd.bare.unet.mid_block.register_forward_hook(fail) if where == "module" else None
    if where == "strength":
        sd.pipe.steer({5: fail})
    with pytest.raises(error):
        sd.run(**({"callback_on_step_end": fail} if where == "callback" else {}))
    if handle is not None:
        handle.remove()
    assert current_run() is None and torch.equal(sd.run(sd.bare), bare)
    if where == "strength":
        sd.pipe.reset_steering()
        sd.pipe.steer(STEERED)
    assert torch.equal(sd.run(), steered)


def test_an_interrupted_run_leaves_the_pipeline_as_it_was(sd, sae):
    bare = sd.run()
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    steered = sd.run()
    sd.run(callback_on_step_end=after_step(1, lambda pipe: setattr(pipe, "_interrupt", True)))
    assert current_run() is None and torch.equal(sd.run(sd.bare), bare) and torch.equal(sd.run(), steered)


@pytest.mark.parametrize("ran", [False, True])
def test_another_unet_gets_its_own_branches_and_steps(sd, sae, ran):
    torch.manual_seed(7)
    other = tiny_unet()
    stock = stock_beside(sd.bare, unet=other)
    sd.pipe.load_sae(sae, adapter_name="old")
    if ran:
        sd.run()
    sd.pipe.unet = other
    sd.pipe.load_sae(sae, adapter_name="new")
    sd.pipe.steer(STEERED, "new", stop=0.5)
    expected = edited_at(sd, sae, (0, 1), slice(2, 4), unet=other, pipe=stock, prompt=["ab", "cd"])
    with sd.pipe.capture([SITE, Site("unet.mid_block")]) as activations:
        assert torch.equal(sd.run(prompt=["ab", "cd"]), expected)
    seen = activations["unet.mid_block"]
    assert seen.branch == ["uncond", "uncond", "cond", "cond"] * 4
    assert seen.timestep[::4].tolist() == sd.pipe.scheduler.timesteps.tolist()
    sd.pipe.steer(STEERED, "old")
    with pytest.warns(UserWarning, match="'old' at .* never acted, since the pipeline has another unet now"):
        sd.run()


def test_another_text_encoder_reads_the_right_branch(sd):
    layer = "text_encoder.encoder.layers.0"
    other = make("Stable Diffusion")
    with torch.no_grad():
        for parameter in other.text_encoder.parameters():
            parameter.add_(0.01)
    with sd.pipe.capture([layer]):
        sd.run()
    sd.pipe.text_encoder = other.text_encoder
    with sd.pipe.capture([layer]) as seen:
        sd.run(prompt="ab", negative_prompt="cd")
    with SAESteeringPipeline.from_pipe(other).capture([layer]) as alone:
        sd.run(SAESteeringPipeline.from_pipe(other), prompt="ab")  # which captures nothing of another pipeline
    assert alone[layer].calls == 0
    assert seen[layer].branch == ["cond", "uncond"]
