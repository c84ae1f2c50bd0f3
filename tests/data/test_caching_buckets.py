"""`--buckets`: datasets of several aspects from one folder of mixed pictures."""

import pytest

from diffnext.cli.cache import main
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.geometry import bucket_sizes
from diffnext.data.records import RecordDataset
from tests.data.caching_inputs import draw_picture, save_vae


def test_the_sizes_of_1024_are_those_of_the_page():
    wide = [(704, 1408), (768, 1344), (832, 1280), (896, 1152), (960, 1088)]
    upright = [(w, h) for h, w in reversed(wide)]
    assert bucket_sizes(1024) == (*wide, (1024, 1024), *upright)


@pytest.mark.parametrize("side", [96, 128, 256, 480, 512, 600, 720, 768, 1024, 1536])
def test_sizes_are_alike_in_pixels_and_go_from_1_to_2_to_2_to_1(side):
    sizes = bucket_sizes(side)
    assert len(set(sizes)) == len(sizes) >= 3
    (square,) = [height for height, width in sizes if height == width]
    assert abs(square - side) <= 64
    for height, width in sizes:
        assert height % 32 == 0 and width % 32 == 0
        assert 0.5 <= height / width <= 2
        assert 0.85 <= height * width / square**2 <= 1.15
        assert (width, height) in sizes


def test_a_side_below_a_token_is_refused():
    with pytest.raises(CacheError, match="buckets must be at least 64 pixels, got 48"):
        bucket_sizes(48)


def test_mixed_pictures_become_a_dataset_for_each_aspect(tmp_path):
    (tmp_path / "in").mkdir()
    for number, size in enumerate([(96, 96), (100, 60), (160, 96), (60, 100)]):
        picture = draw_picture(number, *size)
        picture.save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text("a disc")
    vae, output = save_vae(tmp_path / "vae"), tmp_path / "out"
    arguments = ["images", str(tmp_path / "in"), "--output", str(output), "--vae", str(vae)]
    assert main([*arguments, "--buckets", "64", "--quiet", "--workers", "1"]) == 0
    counts = {}
    for folder in sorted(output.iterdir()):
        if (folder / "METADATA").exists():
            with RecordDataset(folder) as dataset:
                counts[folder.name] = len(dataset)
    assert counts == {"32x64": 2, "64x32": 1, "64x64": 1}


@pytest.mark.parametrize("sizes", [[], ["--size", "64", "--buckets", "64"]])
def test_either_sizes_or_buckets_are_needed(tmp_path, sizes, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["images", "in", "--output", str(tmp_path / "out"), "--vae", "vae", *sizes])
    assert stopped.value.code == 2
    assert "--size" in capsys.readouterr().err
