"""Steps of real runs, against a count of what the scheduler has finished whenever the denoiser is called."""

import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import Harness
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch.utils._pytree import tree_map

from diffusers_sae import InputError, StrengthMap, StrengthTable
from diffusers_sae.schedule import Schedule, on_training_scale, place_in, step_numbers, timesteps_passed

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from counting_device import DEVICE, counted

CPU = torch.device("cpu")
continuous = partial(
    EulerDiscreteScheduler, timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=80.0
)
karras = partial(DPMSolverMultistepScheduler, use_karras_sigmas=True)
prk = partial(PNDMScheduler, skip_prk_steps=False)
plms = partial(PNDMScheduler, skip_prk_steps=True)


def with_scheduler(kind, scheduler=None, dtype=None):
    harness = Harness(kind)
    if scheduler is not None:
        harness.bare.register_modules(scheduler=scheduler())
        harness.pipe.register_modules(scheduler=harness.bare.scheduler)
    if dtype is not None:
        harness.bare.to(dtype)
    return harness


def steps_by_count(monkeypatch, harness, **call):
    """The step of each cond row's call, and their number, from what the scheduler has finished by then.

    A scheduler of order 2 finishes a step where it is not `state_in_first_order`, and PNDM where it has made a new
    sample to go on from.
    """
    pipe, scheduler = harness.bare, harness.bare.scheduler
    finished, calls, step = [0], [], scheduler.step

    def counting(*args, **kwargs):
        unfinished = getattr(scheduler, "state_in_first_order", False)
        if isinstance(scheduler, PNDMScheduler):
            if scheduler.config.skip_prk_steps:
                unfinished = scheduler.counter == 0
            else:
                unfinished = scheduler.counter < len(scheduler.prk_timesteps) and scheduler.counter % 4 < 3
        finished[0] += not unfinished
        return step(*args, **kwargs)

    denoiser = getattr(pipe, harness.tiny.site.partition(".")[0])
    handle = denoiser.register_forward_pre_hook(lambda module, args: calls.append(finished[0]))
    monkeypatch.setattr(scheduler, "step", counting)
    harness.run(pipe, **call)
    monkeypatch.undo()
    handle.remove()
    in_turn = harness.tiny.branches == ("cond", "uncond") and harness.kind != "Z-Image"
    calls = calls[::2] if in_turn else calls
    return calls, max(calls) + 1


def steps_by_strength(harness, **call):
    """The step that an edit knows at each of the cond row's calls, read from what it adds; and their number.

    The denoiser's output is held, so that no edit comes round by the latents.
    """
    denoiser = getattr(harness.pipe, harness.tiny.site.partition(".")[0])
    handle = denoiser.register_forward_hook(lambda module, args, output: tree_map(torch.ones_like, output))
    sae, seen = harness.sae(), []
    harness.pipe.load_sae(sae)
    with harness.pipe.capture([harness.tiny.site]) as bare:
        harness.run(**call)
    harness.pipe.steer({3: lambda p: seen.append(p) or 100 + 1000 * p})
    with harness.pipe.capture([harness.tiny.site]) as steered:
        harness.run(**call)
    handle.remove()
    site, direction = harness.tiny.site, sae.W_dec[3].detach()
    assert steered[site].timestep.tolist() == bare[site].timestep.tolist()
    change = steered[site].rows("cond").float() - bare[site].rows("cond").float()  # (calls, P, d)
    strengths = change.mean(1) @ direction / direction.norm() ** 2
    count = len(set(seen))
    assert sorted(set(seen)) == [i / count for i in range(count)]
    return [round((s.item() - 100) / 1000 * count) for s in strengths], count


RUNS = {
    "SD, DDIM": ("Stable Diffusion", None, {}),
    "SD, DDPM": ("Stable Diffusion", DDPMScheduler, {"num_inference_steps": 7}),
    "SD, Euler": ("Stable Diffusion", EulerDiscreteScheduler, {"num_inference_steps": 6}),
    "SD, ancestral": ("Stable Diffusion", EulerAncestralDiscreteScheduler, {}),
    "SD, LMS": ("Stable Diffusion", LMSDiscreteScheduler, {}),
    "SD, DPM++": ("Stable Diffusion", karras, {"num_inference_steps": 9}),
    "SD, DPM++ singlestep": ("Stable Diffusion", DPMSolverSinglestepScheduler, {}),
    "SD, UniPC": ("Stable Diffusion", UniPCMultistepScheduler, {}),
    "SD, LCM": ("Stable Diffusion, LCM", LCMScheduler, {}),
    "SD, Heun": ("Stable Diffusion", HeunDiscreteScheduler, {"num_inference_steps": 5}),
    "SD, KDPM2": ("Stable Diffusion", KDPM2DiscreteScheduler, {"num_inference_steps": 5}),
    "SD, KDPM2 ancestral": ("Stable Diffusion", KDPM2AncestralDiscreteScheduler, {}),
    "SD, PLMS": ("Stable Diffusion", plms, {"num_inference_steps": 6}),
    "SD, Runge-Kutta": ("Stable Diffusion", prk, {"num_inference_steps": 6}),
    "SD img2img, DDIM": ("Stable Diffusion img2img", None, {"num_inference_steps": 10, "strength": 0.35}),
    "SD img2img, one step": ("Stable Diffusion img2img", None, {"num_inference_steps": 10, "strength": 0.1}),
    "SD img2img, Euler": ("Stable Diffusion img2img", EulerDiscreteScheduler, {"strength": 0.5}),
    "SD img2img, Heun": ("Stable Diffusion img2img", HeunDiscreteScheduler, {"strength": 0.75}),
    "SD img2img, PLMS": ("Stable Diffusion img2img", plms, {"num_inference_steps": 8, "strength": 0.6}),
    "SD inpaint": ("Stable Diffusion inpaint", None, {"strength": 0.5}),
    "SDXL, EDM": ("SDXL", EDMEulerScheduler, {"num_inference_steps": 8}),
    "SDXL, EDM DPM++": ("SDXL", EDMDPMSolverMultistepScheduler, {}),
    "SDXL, continuous": ("SDXL", continuous, {"num_inference_steps": 8}),
    "SDXL, IPNDM": ("SDXL", IPNDMScheduler, {}),
    "SDXL, first part": ("SDXL", None, {"num_inference_steps": 10, "denoising_end": 0.65}),
    "SDXL, first part, Euler": (
        "SDXL",
        EulerDiscreteScheduler,
        {"num_inference_steps": 10, "denoising_end": 0.65},
    ),
    "SDXL, last part": ("SDXL img2img", None, {"num_inference_steps": 10, "denoising_start": 0.65}),
    "SDXL, middle part": (
        "SDXL img2img",
        None,
        {"num_inference_steps": 10, "denoising_start": 0.35, "denoising_end": 0.75},
    ),
    "SDXL, middle part, Heun": (
        "SDXL img2img",
        HeunDiscreteScheduler,
        {"num_inference_steps": 10, "denoising_start": 0.35, "denoising_end": 0.75},
    ),
    "Kandinsky 2.2 img2img": ("Kandinsky 2.2 img2img", None, {"num_inference_steps": 6, "strength": 0.5}),
    "Kandinsky 2.2 combined": ("Kandinsky 2.2 combined", None, {}),
    "unCLIP": ("Stable unCLIP img2img", None, {}),
    "PixArt": ("PixArt-Sigma", None, {"num_inference_steps": 5}),
    "SD3": ("Stable Diffusion 3", None, {}),
    "SD3, Heun": ("Stable Diffusion 3", FlowMatchHeunDiscreteScheduler, {}),
    "SD3 img2img": ("Stable Diffusion 3 img2img", None, {"num_inference_steps": 6, "strength": 0.5}),
    "Flux": ("Flux", partial(FlowMatchEulerDiscreteScheduler, shift=3.0), {"num_inference_steps": 12}),
    "Flux, true guidance": ("Flux, true guidance", None, {}),
    "Flux img2img": ("Flux img2img", None, {"num_inference_steps": 6, "strength": 0.5}),
    "Chroma": ("Chroma", None, {}),
    "Sana": ("Sana", None, {}),
    "Qwen-Image": ("Qwen-Image", None, {}),
    "Z-Image": ("Z-Image", None, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_that_the_scheduler_finishes(monkeypatch, name):
    kind, scheduler, call = RUNS[name]
    harness = with_scheduler(kind, scheduler)
    expected = steps_by_count(monkeypatch, harness, **call)
    assert steps_by_strength(harness, **call) == expected


@pytest.mark.parametrize("steps", [28, 50])
@pytest.mark.parametrize("kind", ["Flux", "Flux, true guidance"])
def test_timesteps_that_round_to_one_another_are_told_apart(kind, steps):
    """As FLUX.2 shifts them, and its pipeline rounds them to bfloat16."""
    shifted = partial(FlowMatchEulerDiscreteScheduler, shift=12.0)
    harness = with_scheduler(kind, shifted, torch.bfloat16)
    assert steps_by_strength(harness, num_inference_steps=steps) == (list(range(steps)), steps)
    rounded = harness.pipe.scheduler.timesteps.bfloat16()
    assert len(set(rounded.tolist())) < steps


@pytest.mark.parametrize(
    ("kind", "scheduler", "dtype", "steps"),
    [
        ("Flux, true guidance", partial(FlowMatchEulerDiscreteScheduler, shift=12.0), torch.bfloat16, 28),
        ("Stable Diffusion", HeunDiscreteScheduler, None, 4),
        ("Stable Diffusion img2img", None, None, 8),
    ],
)
def test_a_compiled_denoiser_finds_the_same_steps(kind, scheduler, dtype, steps):
    images = []
    for compiled in (False, True):
        harness = with_scheduler(kind, scheduler, dtype)
        harness.pipe.load_sae(harness.sae())
        harness.pipe.steer({3: lambda p: 20 * p**4}, start=0.5, branch="both")
        name = harness.tiny.site.partition(".")[0]
        if compiled:
            torch._dynamo.reset()
            setattr(harness.pipe, name, torch.compile(getattr(harness.pipe, name), backend="eager", fullgraph=True))
        images.append(harness.run(num_inference_steps=steps))
    torch.testing.assert_close(images[0].float(), images[1].float(), atol=1e-4, rtol=1e-3)


def schedule(*timesteps, passed=None, given=lambda t, dtype: t, dtype=torch.float32):
    timesteps = torch.tensor(timesteps, dtype=dtype)
    return Schedule(timesteps, passed or range(len(timesteps)), given, CPU)


def test_the_first_call_decides_where_a_run_begins():
    run = schedule(900.0, 700.0, 500.0, 300.0, passed=range(1, 3))
    assert not run.settle(torch.tensor(700.0))
    assert run.settle(torch.tensor(900.0)) and run.passed == range(0, 2)
    assert run.settle(torch.tensor([500.0])) and run.passed == range(2, 4)
    assert run.settle(300) and run.passed == range(3, 4)


@pytest.mark.parametrize("timestep", [500.0, torch.tensor(500.0)])
def test_a_run_that_is_underway_begins_nowhere_else(timestep):
    run = Schedule(torch.tensor([900.0, 700.0, 500.0, 500.0]), range(4), lambda t, dtype: t, CPU, underway=True)
    assert run.begun
    assert [run.find(timestep, first)[0] for first in (True, False, True)] == [2, 2, 3]


def flow_on(device, shift):
    """A run of 50 steps on a device, as Flux gives its timesteps to a transformer in bfloat16."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps.to(device)
    run = Schedule(timesteps, range(50), lambda t, dtype: t.to(dtype) / 1000, device)
    return run, [t.expand(2).to(torch.bfloat16) / 1000 for t in timesteps]


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_an_accelerator_finds_every_step_and_is_waited_for_once(shift):
    with counted() as counts:
        run, given = flow_on(DEVICE, shift)
        assert not run.settle(given[0])
        counts.clear()
        found = [run.find(t, first)[1] for t in given for first in (True, False)]
        assert not counts.waits and counts.launches.total() <= 1 + 4 * 49 + 1
        assert [int(position) for position in found] == [i for i in range(50) for _ in range(2)]
        run.check()


@pytest.mark.parametrize("shift", [1.0, 12.0])
def test_an_accelerator_says_in_the_end_that_a_timestep_was_on_no_schedule(shift):
    with counted():
        run, given = flow_on(DEVICE, shift)
        for t in (given[0], given[1], given[-1] / 2):
            run.find(t, True)
        with pytest.raises(InputError, match="a timestep that is not ahead on the schedule of this run"):
            run.check()
        with pytest.raises(InputError, match="is not ahead on the schedule of this run"):
            run.settle(given[0] + 1)


def test_progress_tells_equal_timesteps_apart():
    run = schedule(900.0, 700.0, 700.0, 300.0)
    found = [run.find(t, first)[0] for t, first in ((900, True), (700, True), (700, False), (700, True), (300, True))]
    assert found == [0, 1, 1, 2, 3]


def test_a_view_of_the_schedulers_tensor_tells_its_place_among_equal_ones():
    run = schedule(900.0, 700.0, 700.0, 300.0)
    assert [run.find(t, True)[0] for t in run.timesteps] == [0, 1, 2, 3]


@pytest.mark.parametrize("timestep", [699, 700.001, torch.tensor(701.0), torch.tensor([900.0]), float("nan")])
def test_a_timestep_that_is_not_ahead_is_refused(timestep):
    run = schedule(900.0, 800.0, 700.0)
    run.find(torch.tensor(900.0), True), run.find(torch.tensor(800.0), True)
    with pytest.raises(InputError, match=r"^The denoiser was called at the timestep .* report the pipeline"):
        run.find(timestep, True)
    assert run.find(700, True)[0] == 2


def test_a_pipeline_in_another_unit_is_refused_and_not_steered(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 4.0})
    halve = lambda module, args: (args[0], args[1] / 2 + 0.25, *args[2:])  # noqa: E731
    sd.pipe.unet.register_forward_pre_hook(halve, prepend=True)
    with pytest.raises(InputError, match="is not ahead on the schedule of this run"):
        sd.run()


@pytest.mark.parametrize(
    ("take", "place"),
    [
        (lambda t: t[2], 2),
        (lambda t: t[1].expand(6), 1),
        (lambda t: t[2:], 2),
        (lambda t: t[[1]], None),
        (lambda t: t[1] + 0, None),
        (lambda t: t[1:], None),
        (lambda t: t[0].view(torch.int32), None),
        (lambda t: 750.0, None),
    ],
)
def test_a_view_of_the_schedulers_tensor_tells_its_place(take, place):
    timesteps = torch.tensor([999.0, 750.0, 250.0])
    assert place_in(timesteps, take(timesteps)) == place


@pytest.mark.parametrize(
    ("scheduler", "steps", "numbers"),
    [
        (DDIMScheduler(), 3, [0, 1, 2]),
        (HeunDiscreteScheduler(), 3, [0, 0, 1, 1, 2]),
        (plms(), 4, [0, 0, 1, 2, 3]),
        (prk(), 5, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]),
    ],
)
def test_step_numbers_of_a_whole_run(scheduler, steps, numbers):
    scheduler.set_timesteps(steps)
    assert list(step_numbers(scheduler, range(len(scheduler.timesteps)))) == numbers


def test_a_scheduler_may_say_its_steps_and_scale_itself():
    own = SimpleNamespace(step_numbers=[2, 2, 1, 1, 0, 0], on_training_scale=True, timesteps=torch.zeros(6))
    assert step_numbers(own, range(2, 6)) == (1, 1, 0, 0) and on_training_scale(own)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_run_without_a_count_is_taken_from_what_it_announces(scheduler):
    pipe = SimpleNamespace(scheduler=scheduler())
    pipe.scheduler.set_timesteps(10)
    whole = len(pipe.scheduler.timesteps)
    assert timesteps_passed(pipe, {}) == range(whole)
    assert timesteps_passed(pipe, {}, total=10) == range(whole)
    assert timesteps_passed(pipe, {}, total=4) == range(6 * pipe.scheduler.order, whole)
    assert timesteps_passed(pipe, {}, loop=pipe.scheduler.timesteps[3:]) == range(3, whole)


TRAINING_SCALE = {
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "ConsistencyDecoderScheduler", "DDIMInverseScheduler",
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler", "PNDMScheduler", "PiflowScheduler", "RePaintScheduler", "SASolverScheduler",
    "TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler", "VQDiffusionScheduler",
}  # fmt: skip
OTHER_SCALE = {
    "BlockRefinementScheduler", "CMStochasticIterativeScheduler", "CosineDPMSolverMultistepScheduler",
    "DDPMWuerstchenScheduler", "DiscreteDDIMScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EntropyBoundScheduler", "IPNDMScheduler", "KarrasVeScheduler", "MiniMaxH3Scheduler", "SCMScheduler",
    "ScoreSdeVeScheduler", "ScoreSdeVpScheduler",
}  # fmt: skip


def set_schedules(name):
    """The scheduler with timesteps of several numbers of steps, where it can be made of what is installed."""
    arguments = {"VQDiffusionScheduler": {"num_vec_classes": 8}}.get(name, {})
    try:
        scheduler = getattr(diffusers.schedulers, name)(**arguments)
    except (ImportError, TypeError):
        return
    shifted = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
    for steps in (1, 2, 8, 50):
        try:
            scheduler.set_timesteps(steps, **shifted)
        except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError):
            continue
        yield scheduler


def test_no_scheduler_of_diffusers_is_forgotten():
    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    known = {
        n for n in names if isinstance(s := getattr(diffusers.schedulers, n), type) and SchedulerMixin in s.__mro__
    }
    assert known - TRAINING_SCALE - OTHER_SCALE <= {"AmusedScheduler", "RFD4ProteinaScheduler"}


@pytest.mark.parametrize("name", sorted(TRAINING_SCALE | OTHER_SCALE))
def test_the_scale_of_every_scheduler_is_told(name):
    verdicts = [on_training_scale(scheduler) for scheduler in set_schedules(name)]
    if not verdicts:
        pytest.skip("needs a package that is not here")
    assert verdicts == [name in TRAINING_SCALE] * len(verdicts)


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize(
    ("make", "training"),
    [
        (continuous, False),
        (partial(continuous, use_karras_sigmas=True), False),
        (partial(EulerDiscreteScheduler, use_karras_sigmas=True), True),
        (partial(EulerDiscreteScheduler, use_beta_sigmas=True), True),
        (partial(EulerDiscreteScheduler, timestep_spacing="trailing"), True),
        (partial(EulerDiscreteScheduler, interpolation_type="log_linear"), True),
        (partial(EulerDiscreteScheduler, rescale_betas_zero_snr=True), True),
        (partial(EulerDiscreteScheduler, timestep_spacing="leading", steps_offset=0), True),
        (partial(HeunDiscreteScheduler, use_karras_sigmas=True), True),
        (karras, True),
        (partial(DPMSolverMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction"), True),
        (partial(FlowMatchEulerDiscreteScheduler, shift=12.0), True),
        (partial(FlowMatchEulerDiscreteScheduler, invert_sigmas=True), True),
        (partial(FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True), True),
    ],
)
def test_the_scale_does_not_hang_on_a_schedulers_settings(make, training, steps):
    scheduler = make()
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, ImportError):
        pytest.skip("the scheduler has no such schedule here")
    assert on_training_scale(scheduler) == training


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, continuous, IPNDMScheduler])
@pytest.mark.parametrize(
    "edit",
    [
        {"features": {3: StrengthTable((900.0, 100.0), (1.0, 2.0))}},
        {"features": {3: StrengthMap((900.0,), torch.ones(1, 2, 2))}},
    ],
)
def test_what_is_looked_up_by_timestep_is_refused_on_another_scale(scheduler, edit):
    harness = with_scheduler("SDXL", scheduler)
    harness.pipe.load_sae(harness.sae())
    harness.pipe.steer(**edit)
    with pytest.raises(InputError, match=r"is looked up by timestep, and those of \w+Scheduler do not count from 0"):
        harness.run(num_inference_steps=2)
    harness.pipe.reset_steering()
    assert torch.equal(harness.run(num_inference_steps=2), harness.run(harness.bare, num_inference_steps=2))


@pytest.mark.parametrize(
    ("call", "edit", "why"),
    [
        ({}, {"stop": 0.2}, "from start=0 to stop=0.2 holds none of the run's 4 steps"),
        ({}, {"start": 0.3, "stop": 0.4}, "from start=0.3 to stop=0.4 holds none of the run's 4 steps"),
        ({"guidance_scale": 1.0}, {"branch": "uncond"}, "the run had no branch uncond, for which branch='uncond' is"),
        ({"guidance_scale": 1.0}, {"branch": "contrast"}, "the run had no branch uncond, for which branch='contrast'"),
    ],
)
def test_an_edit_that_cannot_act_warns_once_per_run(sd, sae, call, edit, why):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 1.0, 5: 2.0}, **edit)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"An edit of 'default_0' \(latents 3, 5\) did not act") as seen:
            sd.run(**call)
        assert len(seen) == 1 and why in str(seen[0].message)


@pytest.mark.parametrize(
    ("call", "edit"),
    [({}, {"stop": 0.25}), ({}, {"branch": "contrast"}), ({"guidance_scale": 1.0}, {"branch": "both"}), ({}, {})],
)
def test_an_edit_that_acts_does_not_warn(sd, sae, call, edit):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 1.0}, **edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.run(**call)
