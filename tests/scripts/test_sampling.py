"""Samples for benchmarks: the same whatever they are drawn beside, in the layout of the scorer."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from PIL import Image

from diffnext.cli.main import main
from diffnext.evaluation import layouts, sampling
from diffnext.evaluation.layouts import VBenchLayout, safe_name
from diffnext.evaluation.prompts import read_prompts, read_vbench
from diffnext.image_processor import VaeImageProcessor
from diffnext.pipelines import NOVAPipeline
from tests.pipelines.conftest import make_class_pipeline, make_video_pipeline

ROOT = Path(__file__).parents[2]
NOVA_TINY = ROOT / "assets" / "nova-tiny"
PROMPTS = [
    "a red star",
    "two green circles and a blue square",
    "a yellow cross above a red circle",
    "three rings",
    "a red star",
]
GROUPS = ("--prompt_size", "2", "--sample_size", "2")
EXACT = ("--precision", "float64")  # whose rounding is far below the 256 levels of a picture
QUICK = ["--num_pred_steps", "3", "--num_diff_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    path = tmp_path_factory.mktemp("geneval") / "metadata.jsonl"
    lines = [json.dumps({"tag": "own", "include": [], "prompt": text}) for text in PROMPTS]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "nova-video"
    make_video_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def geneval_arguments(metadata, outdir, *options, model=NOVA_TINY):
    words = [
        "evaluate",
        "geneval",
        "--metadata",
        metadata,
        "--ckpt",
        model,
        "--outdir",
        outdir,
        *QUICK,
        *options,
    ]
    return [str(word) for word in words]


def draw_geneval(metadata, outdir, *options, **others):
    assert main(geneval_arguments(metadata, outdir, *options, **others)) == 0
    return contents(outdir)


def draw_vbench(prompts, outdir, *options, model):
    words = ["evaluate", "vbench", "--prompt", prompts, "--ckpt", model, "--outdir", outdir]
    words += QUICK
    words += ["--max_latent_length", "2", "--sample_size", "2", *options]
    assert main([str(word) for word in words]) == 0
    return contents(outdir)


def contents(folder):
    """Hashes of all files but the one that names the settings."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != sampling.SETTINGS_FILE
    }


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def drawn(metadata, tmp_path_factory):
    """Everything in groups of two prompts, two samples each, by one process, without a stop."""
    folder = tmp_path_factory.mktemp("drawn") / "out"
    return draw_geneval(metadata, folder, *GROUPS)


@pytest.fixture(scope="module")
def drawn_exactly(metadata, tmp_path_factory):
    """The same in float64."""
    folder = tmp_path_factory.mktemp("drawn_exactly") / "out"
    return folder, draw_geneval(metadata, folder, *GROUPS, *EXACT)


# --- pictures -----------------------------------------------------------------------------------


def test_geneval_files_lie_as_its_scorer_wants_them(metadata, tmp_path):
    files = draw_geneval(metadata, tmp_path / "out", *GROUPS)
    folders = [f"{index:05}" for index in range(len(PROMPTS))]
    pictures = [f"{folder}/samples/{k:05}.png" for folder in folders for k in range(2)]
    assert sorted(files) == sorted([*pictures, *(f"{folder}/metadata.jsonl" for folder in folders)])
    for folder, prompt in zip(folders, PROMPTS, strict=True):
        (line,) = (tmp_path / "out" / folder / "metadata.jsonl").read_text().splitlines()
        assert json.loads(line) == {"tag": "own", "include": [], "prompt": prompt}
    with Image.open(tmp_path / "out" / pictures[0]) as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"


def test_every_sample_has_noise_of_its_own(drawn):
    pictures = [digest for name, digest in drawn.items() if name.endswith(".png")]
    assert len(set(pictures)) == len(pictures) == 10  # also those of the repeated prompt


def draw_with_pipeline(prompts, generator):
    pipe = NOVAPipeline.from_pretrained(NOVA_TINY, dtype=torch.float64)
    return pipe(
        prompts,
        num_inference_steps=3,
        num_diffusion_steps=2,
        guidance_scale=7.0,
        generator=generator,
        output_type="np",
    ).images


def read_picture(path):
    with Image.open(path) as file:
        return np.asarray(file)


def test_pictures_are_those_of_the_pipeline(drawn_exactly):
    folder, _ = drawn_exactly
    seed = sampling.sample_seed(1337, 1, 1)
    (image,) = draw_with_pipeline(PROMPTS[1], torch.Generator().manual_seed(seed))
    assert np.array_equal(read_picture(folder / "00001" / "samples" / "00001.png"), image)


@pytest.mark.parametrize("size", ["1", "5"])
def test_exact_arithmetic_makes_groups_of_any_size_alike(size, metadata, drawn_exactly, tmp_path):
    options = ("--sample_size", "2", "--prompt_size", size)
    assert draw_geneval(metadata, tmp_path, *EXACT, *options) == drawn_exactly[1]


def test_more_samples_keep_the_first_ones(metadata, drawn_exactly, tmp_path):
    first = draw_geneval(metadata, tmp_path, *EXACT, "--sample_size", "1")
    assert draw_geneval(metadata, tmp_path, *EXACT, *GROUPS) == drawn_exactly[1]
    assert first.items() <= drawn_exactly[1].items()


def test_vae_batch_size_is_handed_on(metadata, tmp_path, monkeypatch):
    sizes = []
    decode = VaeImageProcessor.decode_latents

    def record(vae, latents, vae_batch_size=1):
        sizes.append((len(latents), vae_batch_size))
        return decode(vae, latents, vae_batch_size)

    monkeypatch.setattr(VaeImageProcessor, "decode_latents", staticmethod(record))
    draw_geneval(metadata, tmp_path, *GROUPS, "--vae_batch_size", "3")
    assert sizes == [(4, 3), (4, 3), (2, 3)]


# --- several processes, stops -------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_share_the_work_and_change_nothing(count, metadata, drawn, tmp_path, monkeypatch):
    written = []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        before = contents(tmp_path)
        after = draw_geneval(metadata, tmp_path, *GROUPS)
        written.append(after.keys() - before.keys())
    assert contents(tmp_path) == drawn
    assert sum(map(len, written)) == len(drawn)
    assert sum(1 for files in written if files) == min(count, 3)  # there are three groups


@pytest.mark.parametrize("stop_at", [1, 2, 6])
def test_a_stopped_run_goes_on(stop_at, metadata, drawn, tmp_path, monkeypatch):
    write = layouts.export_to_image
    calls = []

    def stopping(image, path, **kwargs):
        calls.append(path)
        if len(calls) == stop_at:
            Path(path).write_bytes(b"half a picture")
            raise KeyboardInterrupt
        return write(image, path, **kwargs)

    monkeypatch.setattr(layouts, "export_to_image", stopping)
    assert main(geneval_arguments(metadata, tmp_path, *GROUPS)) == 130
    pictures = [name for name in contents(tmp_path) if Path(name).match("[0-9]*.png")]
    assert len(pictures) == stop_at - 1
    assert draw_geneval(metadata, tmp_path, *GROUPS) == drawn


def test_finished_samples_are_left_alone(metadata, drawn, tmp_path, capsys, monkeypatch):
    draw_geneval(metadata, tmp_path, *GROUPS)
    lost = tmp_path / "00002" / "samples" / "00001.png"
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    capsys.readouterr()
    assert draw_geneval(metadata, tmp_path, *GROUPS) == drawn
    assert "Wrote 1 pictures" in capsys.readouterr().out
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(NOVAPipeline, "from_pretrained", None)  # nothing is loaded for nothing
    draw_geneval(metadata, tmp_path, *GROUPS)
    assert "Wrote 0 pictures" in capsys.readouterr().out


def test_other_settings_do_not_mix_in_one_folder(metadata, tmp_path, capsys):
    draw_geneval(metadata, tmp_path, *GROUPS)
    words = geneval_arguments(metadata, tmp_path, *GROUPS, "--guidance_scale", "3")
    assert main(words) == 1
    assert "holds samples of guidance_scale 7.0, not 3.0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on(metadata, drawn, tmp_path):
    words = geneval_arguments(metadata, tmp_path, *GROUPS)
    command = [sys.executable, "-m", "diffnext", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/samples/[0-9]*.png")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(contents(tmp_path)) < len(drawn)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(tmp_path) == drawn


@pytest.mark.slow
def test_two_launched_processes_draw_the_same(metadata, drawn, tmp_path):
    words = geneval_arguments(metadata, tmp_path, *GROUPS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "diffnext", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(tmp_path) == drawn


# --- one generator for all ----------------------------------------------------------------------


def test_compat_draws_from_one_generator_in_order(metadata, tmp_path):
    draw_geneval(metadata, tmp_path, *GROUPS, *EXACT, "--compat")
    generator = torch.Generator().manual_seed(1337)
    for start in (0, 2, 4):
        batch = [prompt for prompt in PROMPTS[start : start + 2] for _ in range(2)]
        for index, image in enumerate(draw_with_pipeline(batch, generator)):
            name = f"{start + index // 2:05}/samples/{index % 2:05}.png"
            assert np.array_equal(read_picture(tmp_path / name), image)


def test_compat_draws_all_again_and_alone(metadata, tmp_path, capsys, monkeypatch):
    first = draw_geneval(metadata, tmp_path, *GROUPS, "--compat")
    assert draw_geneval(metadata, tmp_path, *GROUPS, "--compat") == first
    assert capsys.readouterr().out.count("Wrote 10 pictures") == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(geneval_arguments(metadata, tmp_path, "--compat")) == 1
    assert "--compat draws in one process, but there are 2" in capsys.readouterr().err


# --- prompts ------------------------------------------------------------------------------------


def encode(prompts, output, *options, model=NOVA_TINY):
    words = ["--ckpt", model, "--prompts", prompts, "--output", output, "--device", "cpu"]
    assert main(["encode", *(str(word) for word in [*words, *options])]) == 0
    return output


def test_encoded_prompts_draw_what_texts_draw(metadata, drawn, tmp_path):
    states = encode(metadata, tmp_path / "prompts.pth")
    files = draw_geneval(metadata, tmp_path / "out", *GROUPS, "--prompt", states)
    assert files == drawn


def test_encoded_prompts_have_the_documented_form(tmp_path):
    records = [
        {"id": 0, "prompt": "a star", "dense_prompt": "a red star", "tag": "color"},
        {"id": 1, "prompt": "", "dense_prompt": "", "tag": "scene"},
        {"id": 2, "prompt": "rings", "dense_prompt": "ring " * 100, "tag": "scene"},
    ]
    source = write_json(tmp_path / "prompts.json", records)
    path = encode(source, tmp_path / "new" / "prompts_rewrite.pth", "--prompt_key", "dense_prompt")
    content = torch.load(path, weights_only=True)
    assert list(content) == ["prompts", "tags", "texts"]
    assert content["tags"] == ["color", "scene", "scene"]
    assert content["texts"] == ["a star", "", "rings"]
    assert [tuple(state.shape) for state in content["prompts"]] == [(3, 64), (0, 64), (24, 64)]
    pipe = NOVAPipeline.from_pretrained(NOVA_TINY, dtype=torch.float32)
    wanted = pipe.encode_prompt("a red star")[0, :3]
    assert torch.allclose(content["prompts"][0], wanted, atol=1e-5)
    assert os.listdir(path.parent) == [path.name]


def test_names_given_twice_are_read_once(tmp_path):
    path = tmp_path / "prompts.pth"
    states = [torch.zeros(2, 4), torch.zeros(3, 4)]
    doubled = {"tags": ["color", "color", "scene", "scene"], "texts": ["a", "a", "b", "b"]}
    torch.save({"prompts": states, **doubled}, path)
    prompts = read_vbench(path)
    assert prompts.texts == ("a", "b") and prompts.tags == ("color", "scene")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("was-here",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompts": [Evil()]}, "holds more than tensors"),
        ([torch.zeros(2, 4)], "a list of text states under 'prompts'"),
        ({"prompts": []}, "a list of text states under 'prompts'"),
        ({"prompts": ["a"]}, r"prompt 0 must be floating point \(k, d\), got str"),
        ({"prompts": [torch.zeros(4)]}, r"prompt 0 must be floating point \(k, d\), got \(4,\)"),
        ({"prompts": [torch.zeros(1, 4)], "texts": ["a", "b"]}, "got 2 for 1"),
        ({"prompts": [torch.zeros(1, 4)] * 2, "texts": ["a", "b", "c", "d"]}, "got 4 for 2"),
        ({"prompts": [torch.zeros(1, 4)], "tags": [1]}, "'tags' must be a list of texts"),
    ],
)
def test_other_embedding_files_are_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "prompts.pth")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.pth")
    assert os.listdir(tmp_path) == ["prompts.pth"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[]", "at least one prompt"),
        ("p.json", '{"prompt": "a"}', "must hold a list"),
        ("p.json", '["a"]', "prompt 0 must be an object, got 'a'"),
        ("p.json", '[{"prompt": 3}]', "prompt 0 must have a text 'prompt', got 3"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "prompt 1 must have a text 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{', "is not JSON in UTF-8"),
        ("p.json", '[{"prompt": "\\ud800"}]', "prompt 0 is not Unicode text"),
        ("p.pth", "not a file of torch", "holds more than tensors, or is damaged"),
    ],
)
def test_other_prompt_files_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def refuse_geneval(capsys, *arguments):
    assert main(geneval_arguments(*arguments)) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_prompts_that_are_not_those_of_the_metadata_are_refused(metadata, tmp_path, capsys):
    few = write_json(tmp_path / "few.json", [{"prompt": "a red star"}])
    other = write_json(tmp_path / "other.json", [{"prompt": text} for text in reversed(PROMPTS)])
    states = tmp_path / "few.pth"
    torch.save({"prompts": [torch.zeros(2, 64)]}, states)
    for path, text in ((few, "has 1 prompts"), (states, "has 1 prompts"), (other, "prompt 1 is")):
        message = refuse_geneval(capsys, metadata, tmp_path / "out", "--prompt", path)
        assert text in message and str(metadata) in message
    assert not (tmp_path / "out").exists()


def test_states_of_another_model_are_refused_before_drawing(metadata, tmp_path, capsys):
    for shape in ((2, 32), (25, 64)):
        torch.save({"prompts": [torch.zeros(2, 64)] * 4 + [torch.zeros(shape)]}, tmp_path / "p.pth")
        message = refuse_geneval(capsys, metadata, tmp_path / "out", "--prompt", tmp_path / "p.pth")
        assert f"k <= 24, got {shape} for prompt 4" in message
    assert not (tmp_path / "out").exists()


def test_wrong_commands_are_explained(metadata, tmp_path, capsys):
    assert "there is no prompt file" in refuse_geneval(capsys, tmp_path / "none", tmp_path / "out")
    options = ("--prompt_size", "0")
    assert "prompt_size must be greater than or equal to 1, got 0" in refuse_geneval(
        capsys, metadata, tmp_path / "out", *options
    )
    message = refuse_geneval(capsys, metadata, tmp_path / "out", "--device", "cpux")
    assert "device 'cpux' cannot be used" in message
    words = geneval_arguments(metadata, tmp_path / "out", model=tmp_path / "no-model")
    assert main(words) == 1
    assert "there is no folder" in capsys.readouterr().err
    make_class_pipeline().save_pretrained(tmp_path / "classes")
    words = geneval_arguments(metadata, tmp_path / "out", model=tmp_path / "classes")
    assert main(words) == 1
    assert "is a NOVAC2IPipeline" in capsys.readouterr().err
    for missing in ("--metadata", "--ckpt", "--outdir"):
        words = geneval_arguments(metadata, tmp_path / "out")
        del words[words.index(missing) : words.index(missing) + 2]
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2 and missing in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(geneval_arguments(metadata, ""))
    assert "--outdir: must not be empty" in capsys.readouterr().err


# --- videos -------------------------------------------------------------------------------------


HOSTILE = [
    ("cat", "scene"),
    ("dog / cat \\ mat", "scene"),
    ("../../escape", "scene"),
    ("..", "../up"),
    ("", ""),
    ("the mat, " * 60, "scene"),
    ("the mat, " * 60 + "red", "scene"),
    ("eine Kätze 猫 🐈 \u202e abc", "color"),
    ("line\nbreak\ttab\x00nul", "color"),
    ("dog _ cat _ mat", "scene"),  # as the second, once that is made safe
    ("cat", "color"),  # the same text in another group
    ("cat", "scene"),  # a repeat
    ("cat.mp4", "scene"),
]


def test_vbench_files_lie_as_its_scorer_wants_them(video_model, tmp_path):
    records = [{"prompt": "a cat", "tag": "scene"}, {"prompt": "the dog, on", "tag": "color"}]
    source = write_json(tmp_path / "prompts.json", records)
    files = draw_vbench(source, tmp_path / "out", model=video_model)
    names = ["color/the dog, on-0.mp4", "color/the dog, on-1.mp4"]
    assert sorted(files) == [*names, "scene/a cat-0.mp4", "scene/a cat-1.mp4"]
    assert len(set(files.values())) == 4
    path = tmp_path / "out" / "scene" / "a cat-0.mp4"
    assert imageio.get_reader(path).get_meta_data()["fps"] == 12
    frames = imageio.mimread(path)
    assert len(frames) == 5 and frames[0].shape == (64, 96, 3)


def test_hostile_prompts_stay_in_their_folder_and_apart(video_model, tmp_path):
    records = [{"prompt": text, "tag": tag} for text, tag in HOSTILE]
    source = write_json(tmp_path / "prompts.json", records)
    one = ("--sample_size", "1", "--max_latent_length", "1")
    before = contents(tmp_path)
    files = draw_vbench(source, tmp_path / "out", *one, model=video_model)
    outside = {name for name in contents(tmp_path) if not name.startswith("out/")}
    assert outside == before.keys()
    assert len(files) == len(HOSTILE) - 1  # one is a repeat
    assert all(name.count("/") == 1 for name in files)
    assert {"scene/cat-0.mp4", "color/cat-0.mp4", "_/_-0.mp4"} <= files.keys()
    assert "color/eine Kätze 猫 🐈 \u202e abc-0.mp4" in files
    assert "scene/dog _ cat _ mat-0.mp4" in files
    assert draw_vbench(source, tmp_path / "out", *one, model=video_model) == files


def test_videos_do_not_depend_on_processes_or_repeats(video_model, tmp_path, monkeypatch):
    records = [{"prompt": text, "tag": "scene"} for text in ("a cat", "a cat", "a dog", "red")]
    source = write_json(tmp_path / "prompts.json", records)
    options = ("--prompt_size", "1", "--sample_size", "1")
    whole = draw_vbench(source, tmp_path / "a", *options, model=video_model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        draw_vbench(source, tmp_path / "b", *options, model=video_model)
    assert contents(tmp_path / "b") == whole and len(whole) == 3


def test_motion_and_length_reach_the_model(video_model, tmp_path):
    source = write_json(tmp_path / "prompts.json", [{"prompt": "a cat", "tag": "scene"}])
    one = ("--sample_size", "1")
    first = draw_vbench(source, tmp_path / "a", *one, model=video_model)
    assert draw_vbench(source, tmp_path / "b", *one, "--flow", "9", model=video_model) != first
    draw_vbench(source, tmp_path / "c", *one, "--max_latent_length", "3", model=video_model)
    assert len(imageio.mimread(tmp_path / "c" / "scene" / "a cat-0.mp4")) == 9


def test_a_video_model_gives_geneval_its_first_frames(metadata, video_model, tmp_path):
    files = draw_geneval(metadata, tmp_path, "--sample_size", "1", model=video_model)
    assert len([name for name in files if name.endswith(".png")]) == len(PROMPTS)


def test_videos_need_names(video_model, tmp_path):
    source = write_json(tmp_path / "prompts.json", [{"prompt": "a cat"}])
    with pytest.raises(ValueError, match="has no tags, which name the videos"):
        read_vbench(source)


def test_long_names_fit_and_differ():
    texts = ["ä" * 200, "ä" * 200 + "b"]
    names = [safe_name(text) for text in texts]
    assert len(set(names)) == 2
    layout = VBenchLayout("out", texts, ["scene"] * 2)
    assert all(len(layout.path(index, 12345).name.encode()) <= 255 for index in range(2))
