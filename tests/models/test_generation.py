"""Generation: equal results for equal requests, and clear errors."""

import collections
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffnext.models.guidance_scaler import GuidanceScaler
from diffnext.pipelines.nova.sampling import GenerationRun, denoise, draw_order, embed_steps
from diffnext.schedulers.denoising_run import DenoisingRun
from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.tiny import generation_inputs, make_model, make_prompts


def test_same_seed_gives_the_same_latents():
    model = make_model()
    first = model(generation_inputs())["x"]
    assert torch.equal(first, model(generation_inputs())["x"])
    assert first.shape == (2, 4, 1, 8, 12)
    assert not torch.equal(first, model(generation_inputs(seed=1))["x"])


def test_per_sample_generators_make_samples_independent_of_their_neighbours():
    model = make_model()
    prompts = make_prompts(3)
    null = model.text_embed.weight[:7]

    def generate(rows, scheduler):
        model.sample_scheduler = scheduler
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        inputs = generation_inputs(batch=len(rows), generator=generators)
        inputs["prompt"] = [prompts[row] for row in rows] + [null] * len(rows)
        return model(inputs)["x"]

    for scheduler in (FlowMatchEulerDiscreteScheduler(), DDPMScheduler()):
        together = generate([0, 1, 2], scheduler)
        for row in range(3):
            alone = generate([row], scheduler)
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


def recorded_frames(model, **options):
    """What a generation looks like after each of its sets."""
    frames = []

    def record(frame, step, latents):
        frames.append(latents)
        return latents

    model(generation_inputs(on_step=record, **options))
    return frames


def test_every_token_is_predicted_once():
    model = make_model()
    empty = torch.zeros(2, 4, 8, 12)
    frames = [empty, *recorded_frames(model, num_preds=[3, 0, 21])]
    patchify = model.image_encoder.patch_embed.patchify
    pairs = zip(frames, frames[1:], strict=False)
    changed = [(patchify(after) != patchify(before)).any(-1) for before, after in pairs]
    assert [one.sum(1).tolist() for one in changed] == [[3, 3], [21, 21]]
    assert sum(one.long() for one in changed).eq(1).all()


def test_prediction_order_is_stable_under_ties():
    order = draw_order(1, 4096, torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.half))
    scores = torch.rand(
        1, 4096, 1, generator=torch.Generator().manual_seed(0), dtype=torch.half
    ).flatten()
    assert len(scores.unique()) < 4096  # half precision does have ties
    pairs = zip(order.flatten().tolist(), order.flatten().tolist()[1:], strict=False)
    assert all((scores[a], a) < (scores[b], b) for a, b in pairs)


def test_inputs_stay_as_they_are():
    model = make_model(frames=3)
    inputs = generation_inputs(max_latent_length=3, motion_flow=[2.0, 3.0])
    inputs["latents"] = [torch.randn(2, 4, 8, 12)]
    inputs["x"] = torch.randn(2, 4, 8, 12)
    inputs["c"] = [torch.randn(4, 1, 64)]
    before = copy.deepcopy({key: inputs[key] for key in inputs if key != "generator"})
    model(inputs)
    assert set(inputs) == set(before) | {"generator"}
    for key, value in before.items():
        torch.testing.assert_close(inputs[key], value, atol=0, rtol=0)


def test_given_frames_are_seen_and_kept():
    model = make_model(frames=4)
    first = model(generation_inputs(max_latent_length=4, motion_flow=5))["x"]
    given = list(first[:, :, :2].unbind(2))
    order = generation_inputs(max_latent_length=4, motion_flow=5, latents=given)
    continued = model(order)["x"]
    assert continued.shape == first.shape
    assert torch.equal(continued[:, :, :2], first[:, :, :2])


def video_states(model, frames, c):
    """States the video encoder gives to image generation, one frame after the other."""
    states = []
    hook = model.image_encoder.register_forward_pre_hook(lambda _, args: states.append(args[1]))
    given = list(frames.unbind(2))
    inputs = generation_inputs(
        batch=len(frames),
        guidance_scale=1.0,
        c=[c],
        latents=given[:-1],
        max_latent_length=len(given),
    )
    inputs.pop("prompt")
    model.eval()(inputs)
    hook.remove()
    return states[0]


@pytest.mark.parametrize("options", [{}, {"rotary_pos_embed": True}, {"video_mixer_rank": 8}])
@torch.no_grad()
def test_cached_frames_equal_teacher_forcing(options):
    model = make_model(frames=3, **options)
    frames = torch.randn(2, 4, 3, 8, 12)
    c = torch.randn(2, 5, 64)
    forced = model.encode_video(frames, c).unflatten(0, (2, 3))[:, 2]
    torch.testing.assert_close(video_states(model, frames, c), forced, atol=1e-5, rtol=1e-5)


def test_generation_after_training_and_training_after_generation():
    model = make_model(frames=3)

    def train(frames):
        x = torch.randn(1, 4, frames, 8, 12)
        losses = model.train()({"x": x, "prompt": make_prompts(1), "motion_flow": [5]})
        sum(losses.values()).backward()

    with torch.inference_mode():
        model(generation_inputs(max_latent_length=3, motion_flow=5))
    train(3)
    train(2)  # another length: nothing of the first may be left
    model.eval()(generation_inputs(max_latent_length=3, motion_flow=5))


def test_a_model_can_change_dtype_between_calls():
    model = make_model(frames=3)
    model(generation_inputs(max_latent_length=2))
    latents = model.to(torch.float64)(generation_inputs(max_latent_length=2))["x"]
    assert latents.dtype == torch.float64


def test_rotary_angles_survive_half_precision():
    model = make_model(rotary_pos_embed=True)
    rope = model.image_encoder.rope
    exact = rope.get_func(rope.get_pos(1, 1, (64, 64))).cos
    model.half()
    assert torch.equal(rope.get_func(rope.get_pos(1, 1, (64, 64))).cos, exact)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": 3}, "batch_size is 3, but x has 2 samples"),
        ({"x": torch.zeros(2, 4, 9, 12)}, r"must be multiples of 2, got \(2, 4, 9, 12\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_model()(generation_inputs(**{"x": torch.zeros(2, 4, 8, 12), **overrides}))


def test_num_preds_must_cover_the_frame():
    with pytest.raises(ValueError, match="sum to the 24 tokens of a frame, got 23"):
        make_model()(generation_inputs(num_preds=[2, 21]))


def test_condition_rows_must_match_the_batch():
    with pytest.raises(ValueError, match="need 4 condition rows, got 3"):
        make_model()(generation_inputs(prompt=make_prompts(3)))


def test_more_given_frames_than_the_video_has_are_refused():
    latents = [torch.zeros(2, 4, 8, 12)] * 2
    with pytest.raises(ValueError, match="2 latent frames are given, but max_latent_length is 1"):
        make_model()(generation_inputs(latents=latents))


def test_given_frames_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"must be \(2, 4, 8, 12\), got \(1, 4, 8, 12\)"):
        make_model()(generation_inputs(latents=[torch.zeros(1, 4, 8, 12)]))


def test_a_model_without_any_condition_is_refused():
    inputs = generation_inputs()
    inputs.pop("prompt")
    with pytest.raises(ValueError, match="a prompt or ready condition tokens are needed"):
        make_model()(inputs)


@pytest.mark.parametrize("minimum", [0, 0.5, 2.0])
def test_guidance_may_grow_through_one(minimum):
    latents = make_model()(generation_inputs(min_guidance_scale=minimum))["x"]
    assert torch.isfinite(latents).all()


def test_image_guidance_without_guidance_changes_nothing():
    model = make_model()
    plain = model(generation_inputs(guidance_scale=1.0))["x"]
    extra = model(generation_inputs(guidance_scale=1.0, image_guidance_scale=2.0))["x"]
    assert torch.equal(plain, extra)


def test_spatiotemporal_guidance_changes_nothing_beyond_rounding():
    model = make_model()
    plain = model(generation_inputs())["x"]
    extra = model(generation_inputs(spatiotemporal_guidance_scale=0.7))["x"]
    torch.testing.assert_close(plain, extra, atol=1e-4, rtol=1e-4)


def test_image_guidance_of_a_video_runs():
    model = make_model(frames=3)
    inputs = generation_inputs(max_latent_length=2, image_guidance_scale=1.5, motion_flow=5)
    assert model(inputs)["x"].shape == (2, 4, 2, 8, 12)


def test_one_motion_value_serves_every_sample():
    model = make_model(frames=3)
    single = model(generation_inputs(max_latent_length=2, motion_flow=4, fps=12))["x"]
    listed = model(generation_inputs(max_latent_length=2, motion_flow=[4, 4], fps=[12, 12]))["x"]
    assert torch.equal(single, listed)


def test_truncated_guidance_equals_none_below_the_timestep():
    model = make_model()
    always = model(generation_inputs(guidance_trunc=2000))["x"]
    inputs = generation_inputs(guidance_scale=1.0)
    inputs["prompt"] = make_prompts(4)[:2]
    torch.testing.assert_close(always, model(inputs)["x"], atol=1e-5, rtol=1e-5)


def test_a_guidance_interval_is_guidance_where_it_reaches():
    model = make_model()
    guided = model(generation_inputs(num_diffusion_steps=5))["x"]
    everywhere = model(generation_inputs(num_diffusion_steps=5, guidance_interval=(0, 1000)))["x"]
    assert torch.equal(everywhere, guided)
    nowhere = model(generation_inputs(num_diffusion_steps=5, guidance_interval=(1001, 1002)))["x"]
    inputs = generation_inputs(num_diffusion_steps=5, guidance_scale=1.0)
    inputs["prompt"] = make_prompts(4)[:2]
    torch.testing.assert_close(nowhere, model(inputs)["x"], atol=1e-5, rtol=1e-5)
    middle = model(generation_inputs(num_diffusion_steps=5, guidance_interval=(300, 700)))["x"]
    assert not torch.allclose(middle, guided) and not torch.allclose(middle, nowhere)


@pytest.mark.parametrize("options", [{}, {"rotary_pos_embed": True}])
def test_reused_guidance_leaves_the_sets_that_have_their_own(options):
    model = make_model(**options)
    frames = {reuse: recorded_frames(model, guidance_reuse=reuse) for reuse in (1, 2, 3)}
    # The first set is the one of full guidance, the second depends on older states.
    torch.testing.assert_close(frames[2][0], frames[1][0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(frames[2][1], frames[1][1], atol=1e-5)
    assert not torch.allclose(frames[3][-1], frames[2][-1], atol=1e-5)


def test_reused_guidance_runs_the_unguided_passes_less_often():
    model = make_model()
    rows = []
    model.image_encoder.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model(generation_inputs(guidance_reuse=3, num_preds=[2] * 7 + [10]))
    assert rows == [4, 2, 2, 4, 2, 2, 4, 2]


def test_reused_guidance_needs_a_set():
    with pytest.raises(
        ValueError, match="guidance_reuse must be greater than or equal to 1, got 0"
    ):
        make_model()(generation_inputs(guidance_reuse=0))


def test_rows_that_are_not_predicted_cannot_leak():
    model = make_model()
    z = torch.randn(1, 2, 64)
    run = GenerationRun(DenoisingRun(FlowMatchEulerDiscreteScheduler(), 3))
    steps = embed_steps(model, run.scheduler, z)
    noise = torch.randn(1, 4, 8, 12)
    ids = torch.tensor([[[0], [7]]])
    with torch.no_grad():
        clean = denoise(model, GuidanceScaler(), run, steps, z, noise, ids)
        noise[:, :, 6:, 10:] = float("inf")  # token 23
        assert torch.equal(denoise(model, GuidanceScaler(), run, steps, z, noise, ids), clean)


def _flipped(value):
    return value.flip(-1)


def _hook(layer):
    layer.register_forward_hook(lambda *args: _flipped(args[2]))


def _pre_hook(layer):
    layer.register_forward_pre_hook(lambda _, args: tuple(map(_flipped, args)))


def _replaced(layer):  # as accelerate does for offloading
    layer.forward = lambda x, forward=layer.forward: forward(_flipped(x))


def _other_class(layer):  # as adapters and quantisation do
    name = f"Flipped{type(layer).__name__}"
    forward = lambda self, x: _flipped(super(type(self), self).forward(x))  # noqa: E731
    layer.__class__ = type(name, (type(layer),), {"forward": forward})


@pytest.mark.parametrize("change", [_hook, _pre_hook, _replaced, _other_class])
@pytest.mark.parametrize(
    "name",
    ["head", "blocks.1.norm1.norm", "blocks.0.norm2", "blocks.0.proj.fc1", "blocks.1.proj.fc2"],
)
def test_changed_layers_of_the_head_are_called(name, change):
    model = make_model()
    before = model(generation_inputs())["x"]
    layer = model.image_decoder.get_submodule(name)
    change(layer)
    assert not torch.equal(model(generation_inputs())["x"], before)


def test_weights_are_read_at_each_generation():
    model = make_model()
    before = model(generation_inputs())["x"]
    layer = model.image_decoder.blocks[0].proj.fc1
    kept, layer.weight = layer.weight, torch.nn.Parameter(2 * layer.weight.detach())
    assert not torch.equal(model(generation_inputs())["x"], before)
    layer.weight = kept
    assert torch.equal(model(generation_inputs())["x"], before)


def test_diffusers_schedulers_sample_the_same():
    import diffusers

    model = make_model()
    ours = model(generation_inputs())["x"]
    model.sample_scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(model(generation_inputs())["x"], ours)
    model.sample_scheduler = DDPMScheduler()
    ours = model(generation_inputs(num_diffusion_steps=4))["x"]
    model.sample_scheduler = diffusers.DDPMScheduler(clip_sample=False)
    theirs = model(generation_inputs(num_diffusion_steps=4))["x"]
    torch.testing.assert_close(theirs, ours)


def test_a_class_conditional_model_generates():
    model = make_model(text_token_dim=None, text_token_len=None)
    inputs = generation_inputs(c=[model.label_embed(torch.tensor([1, 2, 1000, 1000]))])
    inputs.pop("prompt")
    assert model(inputs)["x"].shape == (2, 4, 1, 8, 12)


class HostTraffic(TorchDispatchMode):
    """Counts the operations that wait for a device, or carry values from or to the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "_to_copy")

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in self.NAMES:
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


def host_traffic(frames=1, **options):
    if frames > 1:
        options |= {"max_latent_length": frames, "motion_flow": 5}
    model = make_model(frames=frames)
    with HostTraffic() as traffic:
        model(generation_inputs(**options))
    return traffic.counts


def test_sets_and_frames_add_no_traffic_between_host_and_device():
    assert host_traffic(num_preds=[4] * 6) == host_traffic(num_preds=[8] * 3)
    assert host_traffic(frames=5) == host_traffic(frames=3)


def test_a_diffusion_step_is_read_by_the_host_once_a_generation():
    few, many = (host_traffic(num_preds=[8] * 3, num_diffusion_steps=n) for n in (3, 9))
    assert many - few == {"_local_scalar_dense": 6}  # the table of the schedule
