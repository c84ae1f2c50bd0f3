"""Training: losses, masks and their random streams."""

import numpy as np
import pytest
import torch

from diffnext.models.embeddings import MaskEmbed
from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
from tests.tiny import make_model, make_prompts


def losses_of(model, x, **inputs):
    torch.manual_seed(3)
    np.random.seed(3)
    prompts = make_prompts(len(x))
    return model.train()({"x": x, "prompt": prompts, **inputs})


def test_images_have_one_loss_and_videos_two():
    image = losses_of(make_model(), torch.randn(2, 4, 8, 12))
    assert list(image) == ["loss"]
    video = losses_of(make_model(frames=3), torch.randn(2, 4, 3, 8, 12), motion_flow=[5, 5])
    assert sorted(video) == ["loss_i2i", "loss_t2i"]


def test_training_leaves_the_batch_as_it_is():
    x = torch.randn(2, 4, 8, 12)
    batch = {"x": x.clone(), "prompt": make_prompts(2)}
    make_model().train()(batch)
    assert list(batch) == ["x", "prompt"]
    assert torch.equal(batch["x"], x)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_gradient_checkpointing_changes_no_bit(level):
    model = make_model(frames=3)
    x = torch.randn(1, 4, 3, 8, 12)

    def gradients(level):
        model.set_gradient_checkpointing(level)
        model.zero_grad()
        sum(losses_of(model, x).values()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(0), gradients(level)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_an_unknown_checkpointing_level_is_refused():
    with pytest.raises(ValueError, match="must be 0, 1, 2 or 3, got 4"):
        make_model().set_gradient_checkpointing(4)


def test_frames_see_no_later_frame():
    model = make_model(frames=3)
    x = torch.randn(1, 4, 3, 8, 12)
    c = torch.randn(1, 5, 64)
    with torch.no_grad():
        states = model.encode_video(x, c).clone()
        x[:, :, 1:] += 1
        changed = model.encode_video(x, c)
    assert torch.equal(states[:2], changed[:2])  # frame 1 reads frame 0
    assert not torch.allclose(states[2], changed[2])


def test_mask_ratio_is_one_draw_between_its_bounds():
    mask_embed = MaskEmbed(8)
    x = torch.randn(2, 1000, 8)
    shares = []
    for _ in range(200):
        mask = mask_embed.draw_mask(x)
        assert mask.known_ids.size(1) == 1000 - mask.hidden[0].sum()
        shares.append(mask.hidden.mean().item())
    assert 0.7 <= min(shares) and max(shares) <= 1.0
    assert np.mean(shares) == pytest.approx(0.867, abs=0.02)


def test_the_mask_consumes_one_numpy_uniform():
    MaskEmbed(8).draw_mask(torch.randn(1, 10, 8))
    after = np.random.rand()
    np.random.seed(0)
    np.random.rand()
    assert after == np.random.rand()


def test_hidden_tokens_do_not_reach_the_states():
    model = make_model()
    mask = model.mask_embed.draw_mask(torch.randn(1, 24, 64))
    tokens = torch.randn(1, 24, 64)
    other = tokens + mask.hidden
    assert not torch.equal(tokens, other)
    masked = [model.mask_embed.apply_mask(t, mask.hidden) for t in (tokens, other)]
    assert torch.equal(*masked)


def test_ddpm_models_learn_the_noise():
    model = make_model()
    model.noise_scheduler = DDPMScheduler()
    loss = losses_of(model, torch.randn(2, 4, 8, 12))["loss"]
    assert loss.item() > 0


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_are_refused(prediction_type):
    model = make_model()
    model.noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    with pytest.raises(ValueError, match=f"'epsilon' or 'flow' to train, got '{prediction_type}'"):
        losses_of(model, torch.randn(1, 4, 8, 12))


def test_the_loss_falls():
    model = make_model()
    x = torch.randn(2, 4, 8, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        loss = model.train()({"x": x, "prompt": make_prompts(2)})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert np.mean(values[-10:]) < 0.8 * np.mean(values[:10])
