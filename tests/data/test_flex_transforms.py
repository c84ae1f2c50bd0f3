"""Transforms and the example pipeline."""

import numpy as np
import pytest

from diffnext.data.flex_pipelines import FeaturePipe, FeatureWorker
from diffnext.data.flex_transforms import ParseAnnotations, ParseLatents, Transform

LONG = "A dog runs on the beach. It is sunny and the sea is calm."


def cached(number, tokens=2, width=3):
    states = np.full((tokens, width), number, dtype=np.float16)
    return {"data": states.tobytes(), "shape": list(states.shape)}


class Draws:
    """A source of chosen numbers that counts how often it is asked."""

    def __init__(self, value):
        self.value = value
        self.count = 0

    def __call__(self):
        self.count += 1
        return self.value


def test_filter_outputs_drops_none():
    assert Transform.filter_outputs(None, 3) == 3
    assert Transform().filter_outputs(1, None, 2) == [1, 2]


def test_moments_are_float16_and_come_before_codes():
    moments = np.arange(6, dtype=np.float16).reshape(1, 2, 3)
    latents = ParseLatents()({"codes": b"", "moments": moments.tobytes(), "shape": [1, 2, 3]})
    assert latents.dtype == np.float16
    assert np.array_equal(latents, moments)


def test_codes_are_int32():
    codes = np.arange(6, dtype=np.int32).reshape(2, 3)
    latents = ParseLatents()({"codes": codes.tobytes(), "shape": (2, 3)})
    assert latents.dtype == np.int32
    assert np.array_equal(latents, codes)


def test_latents_stored_in_another_dtype_are_refused():
    moments = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(
        ValueError, match=r"'moments' of shape \(2, 3\) must be stored as float16, "
    ):
        ParseLatents()({"moments": moments.tobytes(), "shape": [2, 3]})
    with pytest.raises(ValueError, match="'codes' .* int32, 24 bytes, but has 48 bytes"):
        ParseLatents()({"codes": moments.astype(np.int64).tobytes(), "shape": [2, 3]})


def test_an_example_without_latents_or_shape_is_refused():
    with pytest.raises(ValueError, match="needs 'moments' or 'codes'"):
        ParseLatents()({"shape": [1]})
    with pytest.raises(ValueError, match="needs a 'shape'"):
        ParseLatents()({"moments": b""})


@pytest.mark.parametrize(
    ("example", "short"),
    [
        ({"caption": LONG, "text": "A dog."}, "A dog."),
        ({"caption": LONG, "text": ""}, "A dog runs on the beach."),
        ({"caption": LONG}, "A dog runs on the beach."),
        ({"caption": "Is it? Yes! Fine."}, "Is it?"),
        ({"caption": "Version 1.5 is out! Get it."}, "Version 1.5 is out!"),
        ({"caption": "One line.\nAnother."}, "One line."),
        ({"caption": "no stop\nin line one. Two."}, "no stop\nin line one. Two."),
        ({"caption": "Only one sentence."}, "Only one sentence."),
    ],
)
def test_one_draw_below_short_prob_takes_the_short_caption(example, short):
    below, above = Draws(0.29), Draws(0.3)
    transform = ParseAnnotations(short_prob=0.3)
    assert transform(example, below) == (None, short)
    assert transform(example, above) == (None, example["caption"])
    assert below.count == above.count == 1


def test_cached_states_are_not_the_short_caption_of_a_text():
    states = {"data": b"", "shape": []}
    example = {"caption": "One. Two.", "text": states}
    assert ParseAnnotations(short_prob=1)(example) == (None, "One.")


def test_an_empty_caption_stays_empty_without_a_draw():
    draws = Draws(0.0)
    assert ParseAnnotations()({"caption": ""}, draws) == (None, "")
    assert draws.count == 0


def test_a_label_comes_with_the_untouched_caption_without_a_draw():
    draws = Draws(0.0)
    example = {"label": 0, "caption": LONG, "text": "A dog."}
    assert ParseAnnotations()(example, draws) == (0, LONG)
    assert ParseAnnotations()({"label": 7}, draws) == (7, None)
    assert draws.count == 0


def test_cached_captions_honour_short_prob():
    example = {"caption": cached(1, tokens=5), "text": cached(2)}
    transform = ParseAnnotations(short_prob=0.3)
    label, states = transform(example, Draws(0.29))
    assert label is None
    assert np.array_equal(states, np.full((2, 3), 2, dtype=np.float16))
    _, states = transform(example, Draws(0.3))
    assert states.shape == (5, 3)
    assert states.dtype == np.float16


@pytest.mark.parametrize("text", [None, "", {}, {"data": b"", "shape": []}])
def test_a_cached_caption_without_a_cached_text_is_taken_without_a_draw(text):
    draws = Draws(0.0)
    _, states = ParseAnnotations()({"caption": cached(1), "text": text}, draws)
    assert np.array_equal(states, np.ones((2, 3), dtype=np.float16))
    assert draws.count == 0


def test_cached_states_in_another_dtype_are_refused():
    states = np.zeros((2, 3), dtype=np.float32)
    example = {"caption": {"data": states.tobytes(), "shape": [2, 3]}}
    with pytest.raises(ValueError, match="'caption' of shape .* float16, 12 bytes, but has 24"):
        ParseAnnotations()(example)


def test_an_example_without_caption_and_label_is_refused():
    with pytest.raises(ValueError, match="needs a 'caption' or a 'label', got \\['text'\\]"):
        ParseAnnotations()({"text": "A dog."})


def test_numpys_global_generator_is_the_default_source():
    np.random.seed(3)
    expected = [np.random.rand() < 0.5 for _ in range(20)]
    np.random.seed(3)
    captions = [ParseAnnotations()({"caption": LONG, "text": "A dog."})[1] for _ in range(20)]
    assert [caption == "A dog." for caption in captions] == expected
    assert len(set(captions)) == 2


def test_pipe_returns_lists_of_one_element():
    moments = np.ones((2, 2), dtype=np.float16)
    example = {"moments": moments.tobytes(), "shape": [2, 2], "caption": "One.", "flow": 5.0}
    outputs = FeaturePipe().get_outputs(inputs=example)
    assert list(outputs) == ["latents", "prompt", "motion_flow"]
    assert np.array_equal(outputs["latents"], [moments])
    assert outputs["prompt"] == ["One."]
    assert outputs["motion_flow"] == [5.0]


def test_pipe_prefers_the_label_and_omits_an_absent_flow():
    example = {"moments": b"\0\0", "shape": [1], "caption": "One.", "label": 0}
    outputs = FeaturePipe().get_outputs(example)
    assert list(outputs) == ["latents", "prompt"]
    assert outputs["prompt"] == [0]


def test_worker_choices_depend_on_seed_and_position_only():
    example = {"moments": b"\0\0", "shape": [1], "caption": LONG, "text": "A dog."}

    def choices(seed, positions):
        worker = FeatureWorker()
        worker.seed = seed
        return [worker.process(example, position)["prompt"][0] for position in positions]

    forward = choices(1, range(30))
    np.random.seed(0)
    assert choices(1, reversed(range(30))) == forward[::-1]
    assert choices(2, range(30)) != forward
    assert 5 < forward.count("A dog.") < 25
