from pathlib import Path

import numpy as np
import pytest
import torch

import check_memory
from diffnext.engine.memory import (
    ENGINES,
    BatchShape,
    LiveBytes,
    ParameterCounts,
    StepMemory,
    estimate_memory,
    make_meta_model,
    set_worst_mask,
    simulate_step,
)
from diffnext.models.capture import Programs, record_calls
from tests.tiny import make_model

CONFIG = {
    "image_dim": 4,
    "image_size": [64, 96],
    "image_stride": 8,
    "text_token_dim": 64,
    "text_token_len": 7,
    "image_base_size": [4, 6],
    "video_base_size": [1, 2, 3],
    "arch": ["vit_d2w64", "vit_d4w64", "mlp_d2w64"],
}
VIDEO = {**CONFIG, "video_base_size": [3, 2, 3]}
CLASSES = {**CONFIG, "text_token_dim": None, "text_token_len": None}
COUNTS = ParameterCounts(total=1000, trainable=800, unwrapped=100, largest_block=50, buffers=10)
STEP = StepMemory(activations=5000, with_gradients=6000)


def batch(size=2, frames=1):
    return BatchShape(size=size, frames=frames, latent_size=(8, 12))


def simulate(config=CONFIG, level=0, shape=None, **arguments):
    model = make_meta_model(config, gradient_checkpointing=level)
    return simulate_step(model, shape or batch(), **arguments)


def test_simulated_bytes_are_those_of_a_real_step():
    model = make_model().train()
    set_worst_mask(model)
    inputs = {"x": torch.randn(2, 4, 8, 12), "prompt": torch.randn(2, 7, 64)}
    model(inputs)["loss"].backward()  # fills the tables that are kept from step to step
    model.zero_grad()
    with LiveBytes(model) as live:
        model(inputs)["loss"].backward()
    simulated = simulate()
    assert simulated.activations == pytest.approx(live.most_other, rel=0.02)
    assert simulated.with_gradients == pytest.approx(live.most, rel=0.02)


@pytest.mark.parametrize("work", ["drawing", "recorded"])
def test_simulated_bytes_are_those_of_a_real_drawing(work):
    arch = ("vit_d2w64", "vit_d4w64", "mlp_d2w64")
    case = check_memory.Case(arch, 128, 2, work=work, sets=4)
    model = check_memory.make_drawing_model(case)
    programs = Programs(record_calls)
    model.programs = programs if work == "recorded" else None
    with LiveBytes(model) as live:
        check_memory.draw(model, case, check_memory.make_run())
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    peak, kept = check_memory.simulate_drawing(case)
    assert peak - weights == pytest.approx(live.most, rel=0.02)
    assert kept == programs.nbytes
    assert (kept > 0) == (work == "recorded")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("config", [CONFIG, VIDEO, CLASSES], ids=["text", "video", "classes"])
def test_every_model_and_engine_can_be_simulated(config, engine):
    frames = config["video_base_size"][0]
    step = simulate(config, shape=batch(frames=frames), engine=engine, dtype=torch.bfloat16)
    assert 0 < step.activations <= step.with_gradients


def test_activations_grow_with_the_batch():
    small = simulate(shape=batch(8)).activations
    large = simulate(shape=batch(16)).activations
    assert large == pytest.approx(2 * small, rel=0.05)


def test_each_checkpointing_level_saves_memory():
    steps = [simulate(level=level, shape=batch(16)) for level in range(4)]
    activations = [step.activations for step in steps]
    assert activations == sorted(activations, reverse=True)
    assert len(set(activations)) == 4


def test_half_precision_saves_memory_and_cuda_keeps_norms_in_float32():
    full = simulate(shape=batch(16)).activations
    on_cpu = simulate(shape=batch(16), dtype=torch.bfloat16, device_type="cpu").activations
    on_cuda = simulate(shape=batch(16), dtype=torch.bfloat16, device_type="cuda").activations
    assert on_cpu < on_cuda < full


def test_a_simulation_of_a_huge_model_takes_no_memory_for_it():
    arch = ["vit_d16w1536", "vit_d32w1536", "mlp_d6w1536"]
    model = make_meta_model({**CONFIG, "arch": arch})
    assert ParameterCounts.of(model).total > 1.4e9
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_simulation_leaves_random_states_and_training_alone():
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    simulate()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    model = make_model().train()
    loss = model({"x": torch.randn(2, 4, 8, 12), "prompt": torch.randn(2, 7, 64)})["loss"]
    loss.backward()
    assert torch.isfinite(loss)


def test_frozen_parts_have_no_gradients():
    model = make_meta_model(CONFIG, frozen_modules=("video_encoder",))
    counts = ParameterCounts.of(model)
    frozen = sum(p.numel() for p in model.video_encoder.parameters())
    assert counts.trainable == counts.total - frozen


def test_blocks_are_what_fsdp2_gathers():
    model = make_meta_model(CONFIG)
    counts = ParameterCounts.of(model)
    blocks = [*model.video_encoder.blocks, *model.image_encoder.blocks, *model.image_decoder.blocks]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert counts.unwrapped == counts.total - sum(sizes)
    assert counts.largest_block == max(sizes)


def estimate(engine, processes, **arguments):
    return estimate_memory(
        engine, processes, counts=COUNTS, step=STEP, dtype=torch.bfloat16, **arguments
    )


ESTIMATES = {
    "float32 weights and two moments": ("ddp", 1, {"weights": 4010, "optimizer": 6400}),
    "gradients come as activations go": ("ddp", 1, {"peak": 4010 + 6400 + 6000}),
    "buckets are a second copy": ("ddp", 8, {"buffers": 3200, "gradients": 3200}),
    "ZeRO-2 alone has masters, too": ("zero2", 1, {"weights": 2010, "optimizer": 12 * 800}),
    "ZeRO-2 shards the rest": ("zero2", 8, {"optimizer": 12 * 100, "gradients": 2 * 100}),
    "FSDP2 shards weights, too": ("fsdp2", 8, {"weights": 4 * 125 + 10, "optimizer": 8 * 100}),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_each_engine_holds_its_share(name):
    engine, processes, expected = ESTIMATES[name]
    found = estimate(engine, processes)
    assert {field: getattr(found, field) for field in expected} == expected


def test_the_peak_of_ddp_does_not_depend_on_the_number_of_processes():
    assert estimate("ddp", 128).peak == estimate("ddp", 8).peak


def test_gradients_count_in_full_when_they_are_accumulated():
    assert estimate("ddp", 1, is_accumulating=True).peak == 4010 + 6400 + 3200 + 5000


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_components_and_ema_add_to_the_peak(engine):
    plain = estimate(engine, 8)
    both = estimate(engine, 8, frozen_bytes=100, ema_bytes=11)
    assert (both.frozen, both.ema, both.peak) == (100, 11, plain.peak + 111)


def test_an_optimizer_without_moments_needs_none():
    assert estimate("ddp", 1, optimizer_states=0).optimizer == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("level", [0, 3])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(level):
    case = check_memory.Case(check_memory.SMALL, 256, 16, level=level)
    measured = check_memory.run_child(case)
    assert check_memory.simulate(case) == pytest.approx(measured, rel=0.15)
