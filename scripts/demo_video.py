"""From two short clips to a NOVA that shows them, on a CPU, through the commands of TRAINING.md.

    python scripts/demo_video.py --output demo_video

1. writes a release folder with fresh weights (diffnext init --tiny),
2. caches two clips of 17 frames as autoencoder latents with two captions: the beginning of the
   sample video, and a camera that moves over the second sample picture,
3. trains with `accelerate launch scripts/train.py`; run again, it continues,
4. makes a clip from each caption, and one from a caption and its first frame, and writes sheets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import codewithgpu
import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw

from demo import ROOT, TRANSFORMER, init_model, make_parser, psnr, train
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.pipelines import NOVAPipeline
from diffnext.utils import export_to_video

CONFIG = ROOT / "configs" / "nova_shapes_t2v.yaml"
CAPTIONS = ("a red balloon rises above a lake", "a camera moves over a coral reef")
NUM_FRAMES = 17
SHOWN = range(0, NUM_FRAMES, 4)
FLOW = 5.0

Clip = list[Image.Image]


def main(argv: list[str] | None = None) -> None:
    """Run all four stages."""
    args = make_parser(__doc__, output="demo_video", size=128, steps=700).parse_args(argv)
    model_dir = args.output / "nova-tiny-video"
    dataset = args.output / "vid_dataset"
    experiment = args.output / "experiment"
    args.output.mkdir(parents=True, exist_ok=True)
    init_model(CONFIG, model_dir)
    clips = [read_clip(args.size), move_camera(args.size)]
    if not (dataset / "METADATA").exists():
        cache_clips(clips, model_dir / "vae", dataset)
    tokens = args.size // 16
    train(
        CONFIG,
        model_dir,
        dataset,
        experiment,
        args,
        f"{TRANSFORMER}.video_base_size=[5,{tokens // 2},{tokens // 2}]",
        "ema.params.decay=0.95",
        f"lr_scheduler.params.warmup_steps={min(20, args.steps // 2)}",
        "optimizer.params.lr=0.001",
        "training.batch_size=2",
    )
    show(clips, experiment / "ema_checkpoints" / f"checkpoint-{args.steps}", args)


def read_clip(size: int) -> Clip:
    """Every third frame of the sample video, the middle square."""
    frames = []
    with imageio.get_reader(ROOT / "assets" / "sample_video.mp4") as reader:
        for index, frame in enumerate(reader):
            if index % 3 == 0 and len(frames) < NUM_FRAMES:
                frames.append(Image.fromarray(frame))
    width, height = frames[0].size
    left = (width - height) // 2
    return [cut(frame, (left, 0, left + height, height), size) for frame in frames]


def move_camera(size: int) -> Clip:
    """A window that moves over the second sample picture."""
    picture = Image.open(ROOT / "assets" / "sample_image2.jpg").convert("RGB")
    side = picture.width * 5 // 8
    starts = np.linspace(0, (picture.width - side) / 2, NUM_FRAMES)
    return [cut(picture, (left, left, left + side, left + side), size) for left in starts]


def cut(picture: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    """A square part of a picture, at another size."""
    return picture.resize((size, size), Image.Resampling.LANCZOS, box)


def to_pixels(clip: Clip) -> torch.Tensor:
    """A clip as (1, 3, F, H, W), -1 to 1."""
    array = np.stack([np.asarray(frame) for frame in clip])
    return torch.as_tensor(array).movedim(-1, 0)[None].float().sub(127.5).div(127.5)


def cache_clips(clips: list[Clip], vae_dir: Path, dataset: Path) -> None:
    """Write the latents' moments as TRAINING.md does."""
    vae = AutoencoderKLOpenSora.from_pretrained(vae_dir).float().eval()
    features = {
        "moments": "bytes",
        "caption": "string",
        "text": "string",
        "shape": ["int64"],
        "flow": "float64",
    }
    dataset.mkdir(parents=True, exist_ok=True)
    writer = codewithgpu.RecordWriter(str(dataset), features)
    for caption, clip in zip(CAPTIONS, clips, strict=True):
        with torch.no_grad():
            moments = vae.encode(to_pixels(clip)).latent_dist.parameters[0].half()
        example = {"caption": caption, "text": caption, "flow": FLOW}
        content = moments.numpy().tobytes()
        writer.write({"shape": tuple(moments.shape), "moments": content, **example})
    writer.close()
    print(f"\nCached {len(clips)} clips in {dataset}")


def show(clips: list[Clip], checkpoint: Path, args: argparse.Namespace) -> None:
    """Make all clips, compare them with the cached ones and write the sheets."""
    pipe = NOVAPipeline.from_pretrained(checkpoint)
    rebuilt = [reconstruct(pipe.vae, clip) for clip in clips]
    options = {
        "num_frames": NUM_FRAMES,
        "num_inference_steps": 16,
        "guidance_scale": 2,
        "motion_flow": FLOW,
    }
    generator = torch.Generator().manual_seed(args.seed)
    made = pipe(list(CAPTIONS), generator=generator, **options).frames
    made = [[Image.fromarray(frame) for frame in clip] for clip in made]
    rows = []
    for index, caption in enumerate(CAPTIONS):
        own = clip_psnr(made[index], rebuilt[index])
        other = clip_psnr(made[index], rebuilt[1 - index])
        print(
            f"{caption!r}: {own:.1f} dB from its own clip, {other:.1f} dB from the other "
            f"(autoencoder alone: {clip_psnr(rebuilt[index], clips[index]):.1f} dB)"
        )
        rows += [
            ("original", clips[index]),
            ("autoencoder", rebuilt[index]),
            (caption, made[index]),
        ]
        export_to_video(
            [np.asarray(frame) for frame in made[index]], str(args.output / f"{index}.mp4")
        )
    make_sheet(rows).save(args.output / "sheet.png")
    continued = pipe(CAPTIONS[0], image=clips[0][0], generator=generator, **options).frames[0]
    continued = [Image.fromarray(frame) for frame in continued]
    first = psnr(continued[0], reconstruct(pipe.vae, clips[0][:1])[0])
    print(f"image to video: the first frame is {first:.1f} dB from the given image")
    rows = [("the given image, and what followed it", clips[0]), (CAPTIONS[0], continued)]
    make_sheet(rows).save(args.output / "sheet_i2v.png")
    print(f"\nWrote {args.output}/sheet.png and sheet_i2v.png, every fourth frame, and two videos")


@torch.no_grad()
def reconstruct(vae: AutoencoderKLOpenSora, clip: Clip) -> Clip:
    """The clip through the autoencoder: the best that any model on its latents can show."""
    y = vae.decode(vae.encode(to_pixels(clip)).latent_dist.mean).sample[0]
    array = (y * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).movedim(0, -1)
    return [Image.fromarray(frame) for frame in array.numpy()]


def clip_psnr(first: Clip, second: Clip) -> float:
    """Mean over the frames of the peak signal-to-noise ratio in dB."""
    return float(np.mean([psnr(*frames) for frames in zip(first, second, strict=True)]))


def make_sheet(rows: list[tuple[str, Clip]]) -> Image.Image:
    """Some frames of each clip in a row, its name below."""
    size = rows[0][1][0].width
    gap, line = 4, 20
    width = len(SHOWN) * (size + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (size + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, clip) in enumerate(rows):
        top = gap + row * (size + line + gap)
        for column, index in enumerate(SHOWN):
            sheet.paste(clip[index], (gap + column * (size + gap), top))
        pen.text((gap, top + size + 3), name, fill="black")
    return sheet


if __name__ == "__main__":
    main()
