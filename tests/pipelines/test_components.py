"""A pipeline reads its components when it is called: replaced, removed, shared or copied ones."""

import copy
import pickle

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchHeunDiscreteScheduler
from torch import nn

from diffnext.pipelines.nova.pipeline_train_c2i import NOVATrainC2IPipeline
from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline
from diffnext.utils.json_files import read_json
from tests.pipelines.conftest import MAKERS, QUICK, make_pipeline, make_text_encoder, make_tokenizer
from tests.tiny import make_model, make_vae, make_video_vae

TRAINERS = {
    "text": NOVATrainT2IPipeline,
    "video": NOVATrainT2IPipeline,
    "class": NOVATrainC2IPipeline,
}


@pytest.fixture
def pipe(kind):
    return MAKERS[kind]()


def draw(pipe, kind, **options):
    """Pixels."""
    prompt = 3 if kind == "class" else "a cat"
    options = {"output_type": "pt", "generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, return_dict=False, **options, **QUICK)[0]


def same_components(first, second):
    return all(part is second.components[name] for name, part in first.components.items())


def another(name, kind):
    """Another component of the same sort; it draws something else."""
    torch.manual_seed(5)
    if name == "transformer":
        classes = {"text_token_dim": None, "text_token_len": None} if kind == "class" else {}
        return make_model(seed=3, frames=3 if kind == "video" else 1, **classes)
    if name == "tokenizer":
        return make_tokenizer(words=("cat", "a"))
    vae = make_video_vae if kind == "video" else make_vae
    return {
        "scheduler": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
        "vae": lambda: vae(seed=3),
        "text_encoder": make_text_encoder,
    }[name]()


def replace_by_attribute(pipe, name, component):
    setattr(pipe, name, component)


def replace_by_registering(pipe, name, component):
    pipe.register_modules(**{name: component})


def replace_behind_an_absent_one(pipe, name, component):
    setattr(pipe, name, None)
    setattr(pipe, name, component)


def replace_behind_a_deleted_one(pipe, name, component):
    delattr(pipe, name)
    setattr(pipe, name, component)


COMPONENTS = ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"]


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize(
    "replace",
    [
        replace_by_attribute,
        replace_by_registering,
        replace_behind_an_absent_one,
        replace_behind_a_deleted_one,
    ],
)
def test_a_replaced_component_is_the_next_to_be_used(pipe, kind, name, replace, tmp_path):
    if name not in pipe.components:
        pytest.skip("classes have no text")
    before = draw(pipe, kind)
    component = another(name, kind)
    replace(pipe, name, component)
    after = draw(pipe, kind)
    assert not torch.equal(after, before)
    assert torch.equal(after, draw(type(pipe)(**pipe.components), kind))
    assert pipe.components[name] is component
    assert pipe.config[name][1] == type(component).__name__


@pytest.mark.parametrize("replaced", [None, "scheduler", "vae"])
def test_a_pipeline_made_from_another_has_its_components(pipe, kind, replaced):
    given = {} if replaced is None else {replaced: another(replaced, kind)}
    made = type(pipe).from_pipe(pipe, **given)
    wanted = {**pipe.components, **given}
    assert all(made.components[name] is part for name, part in wanted.items())
    assert torch.equal(draw(made, kind), draw(type(pipe)(**wanted), kind))


def test_a_pipeline_made_from_another_keeps_the_dtypes(pipe, kind):
    pipe.to(torch.float64)
    pipe.vae.to(torch.float32)
    made = type(pipe).from_pipe(pipe)
    assert made.transformer.dtype == torch.float64 and made.vae.dtype == torch.float32
    cast = type(pipe).from_pipe(pipe, dtype=torch.bfloat16)
    assert cast.transformer.dtype == cast.vae.dtype == torch.bfloat16


def test_a_training_pipeline_is_made_from_one_that_draws(pipe, kind):
    trainer = TRAINERS[kind].from_pipe(pipe)
    assert same_components(trainer, pipe)
    assert same_components(type(pipe).from_pipe(trainer), pipe)


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_missing_component_is_named_before_anything_is_drawn(pipe, kind, name, is_deleted):
    if name not in pipe.components:
        pytest.skip("classes have no text")
    calls = []
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.register_forward_pre_hook(lambda *_: calls.append(True))
    if is_deleted:
        delattr(pipe, name)
    else:
        setattr(pipe, name, None)
    message = name.replace("_", "[ _]")
    with pytest.raises(ValueError, match=message):
        draw(pipe, kind)
    assert not calls and pipe.components[name] is None


def test_what_is_not_needed_may_be_missing(pipe, kind):
    """The autoencoder for latents, and what reads texts for states."""
    expected = draw(pipe, kind, output_type="latent")
    del pipe.vae
    assert torch.equal(draw(pipe, kind, output_type="latent"), expected)
    if kind == "class":
        return
    states = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
    del pipe.text_encoder, pipe.tokenizer
    embeds = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    drawn = pipe(**embeds, **options, return_dict=False, **QUICK)[0]
    assert torch.equal(drawn, expected)


def test_an_absent_component_is_absent_in_what_is_saved(pipe, kind, tmp_path):
    del pipe.vae
    pipe.save_pretrained(tmp_path)
    assert type(pipe).from_pretrained(tmp_path).vae is None


def test_a_component_that_was_absent_is_saved(pipe, kind, tmp_path):
    vae = pipe.vae
    pipe.vae = None
    pipe.vae = vae
    pipe.save_pretrained(tmp_path)
    assert isinstance(type(pipe).from_pretrained(tmp_path).vae, type(vae))


def test_a_foreign_autoencoder_is_refused_before_anything_is_drawn():
    layers = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    pipe = make_pipeline(vae=diffusers.AutoencoderKL(block_out_channels=(32,), **layers))
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(True))
    with pytest.raises(ValueError, match="need an autoencoder of this package as vae, got Auto"):
        draw(pipe, "text")
    assert not calls


def test_a_second_pipeline_of_the_same_model_changes_nothing_in_the_first(pipe, kind):
    before = draw(pipe, kind)
    for name in set(pipe.components) - {"transformer"}:
        second = type(pipe)(**{**pipe.components, name: another(name, kind)})
        assert not torch.equal(draw(second, kind), before)
        assert torch.equal(draw(pipe, kind), before)
    bare = type(pipe)(pipe.transformer, pipe.scheduler)
    with pytest.raises(ValueError):
        draw(bare, kind)
    TRAINERS[kind](**pipe.components)
    assert torch.equal(draw(pipe, kind), before)


def tensors(part):
    if isinstance(part, nn.Module):
        return {t.data_ptr() for t in (*part.parameters(), *part.buffers()) if t.numel()}
    return {id(part)}


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_draws_the_same_and_shares_nothing(pipe, kind, copied):
    expected = draw(pipe, kind)
    twin = copied(pipe)
    assert torch.equal(draw(twin, kind), expected)
    for name, part in pipe.components.items():
        assert tensors(part).isdisjoint(tensors(twin.components[name]))
    with torch.no_grad():
        for parameter in twin.transformer.parameters():
            parameter.zero_()
    twin.scheduler.set_timesteps(7)
    assert torch.equal(draw(pipe, kind), expected)


def test_a_copy_of_the_model_is_the_model_alone(pipe, kind):
    """As for an average of weights: it brings no text encoder, and nothing that was drawn."""
    before = pickle.dumps(pipe.transformer)
    draw(pipe, kind)
    assert len(pickle.dumps(copy.deepcopy(pipe.transformer))) < len(before) + 2**10


def test_a_cast_holds_for_the_next_drawing(pipe, kind):
    before = draw(pipe, kind)
    assert draw(pipe.to(torch.bfloat16), kind).dtype == torch.bfloat16
    pipe.transformer.to(torch.float64)
    pipe.vae = another("vae", kind).to(torch.float64)
    assert draw(pipe, kind).dtype == torch.float64
    assert before.dtype == torch.float32


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_offloaded_components_can_be_replaced(pipe, kind, name):
    if name not in pipe.components:
        pytest.skip("classes have no text")
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, torch.device("cpu"))
    draw(pipe, kind)
    for component in (another(name, kind), cpu_offload(another(name, kind), torch.device("cpu"))):
        setattr(pipe, name, component)
        fresh = MAKERS[kind]()
        setattr(fresh, name, another(name, kind))
        assert torch.equal(draw(pipe, kind), draw(fresh, kind))


def test_models_offloaded_one_by_one_can_be_replaced(pipe, kind):
    pipe.enable_model_cpu_offload(device="cpu")
    draw(pipe, kind)
    pipe.vae = another("vae", kind)
    fresh = MAKERS[kind](vae=another("vae", kind))
    assert torch.equal(draw(pipe, kind), draw(fresh, kind))
    assert torch.equal(draw(pipe, kind), draw(fresh, kind))


# Folders, fewer bits, other layouts of weights


def test_diffusers_says_which_class_loads_a_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    name = f"{type(pipe).__module__}.{type(pipe).__name__}"
    assert name.startswith("diffnext.pipelines.")
    with pytest.raises(AttributeError, match=f"diffusers has no attribute {name}"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert read_json(tmp_path / "model_index.json")["_class_name"] == name
    assert not hasattr(diffusers, type(pipe).__name__)


def test_a_saved_folder_loads_as_a_training_pipeline(pipe, kind, tmp_path):
    pipe.save_pretrained(tmp_path)
    trainer = TRAINERS[kind].from_pretrained(tmp_path)
    assert type(trainer) is TRAINERS[kind]
    assert set(trainer.components) == set(pipe.components)


def test_a_quantised_pipeline_is_not_saved_by_halves(pipe, tmp_path):
    pipe.quantize("int8")
    with pytest.raises(ValueError, match="a quantised model cannot be saved: load it again"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_quantised_pipeline_draws_and_is_not_quantised_again(pipe, kind):
    pipe.quantize("int8")
    before = draw(pipe, kind)
    with pytest.raises(ValueError, match="a quantised model cannot be quantised again"):
        pipe.quantize()
    assert torch.equal(draw(pipe, kind), before)
    assert torch.equal(draw(type(pipe).from_pipe(pipe), kind), before)
    with pytest.raises(ValueError, match="a quantised model cannot be cast"):
        pipe.transformer.to(torch.bfloat16)


def test_graphs_need_a_gpu(pipe):
    with pytest.raises(ValueError, match="cuda_graphs=True needs a model on a GPU, .* on cpu"):
        pipe.compile(cuda_graphs=True)
    assert not pipe.transformer.image_decoder.is_compiled


def test_a_prepacked_pipeline_draws_copies_and_saves(pipe, kind, tmp_path):
    expected = draw(pipe, kind)
    pipe.prepack()
    pipe.prepack()
    packed = draw(pipe, kind)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(draw(copy.deepcopy(pipe), kind), packed)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    torch.testing.assert_close(draw(loaded, kind), expected, atol=1e-4, rtol=1e-4)


def test_tokenizers_of_another_vocabulary_are_refused_before_anything_is_drawn():
    words = tuple(f"w{index}" for index in range(40))
    pipe = make_pipeline(tokenizer=make_tokenizer(words=words))
    with pytest.raises(ValueError, match="below 20"):
        pipe("w39 w38", **QUICK)


def test_schedulers_of_other_families_can_be_put_in_turn(pipe, kind):
    before = draw(pipe, kind)
    own = pipe.scheduler
    pipe.scheduler = DDPMScheduler()
    draw(pipe, kind)
    pipe.scheduler = own
    assert torch.equal(draw(pipe, kind), before)
