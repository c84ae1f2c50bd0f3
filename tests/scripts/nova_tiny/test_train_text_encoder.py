"""The small text encoder of NOVA-tiny: states from which captions can be read."""

import re

import torch
from transformers import AutoTokenizer

import train_text_encoder
from diffnext.models.text_encoders.phi import PhiEncoderModel
from shapes_world.scenes import Description, Mention

OPTIONS = ["--width", "32", "--batch-size", "32"]


def fit(folder, *options):
    return train_text_encoder.main(["--output", str(folder), *OPTIONS, *options])


def test_training_teaches_the_states_what_captions_say(tmp_path, capsys):
    assert fit(tmp_path / "text", "--steps", "400", "--learning-rate", "0.004") == 0
    shares = [float(share) for share in re.findall(r"an error: (\S+)", capsys.readouterr().out)]
    assert len(shares) == 2
    assert shares[0] > 0.1  # of ten facts at once; nothing is told right by chance


def test_the_folder_holds_a_tokenizer_and_an_encoder_that_fit(tmp_path):
    assert fit(tmp_path / "text", "--steps", "1") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text" / "tokenizer")
    encoder = PhiEncoderModel.from_pretrained(tmp_path / "text" / "text_encoder")
    ids = torch.tensor([tokenizer("A red star.")["input_ids"]])
    assert encoder(ids).last_hidden_state.shape == (1, ids.size(1), 32)


def test_the_same_seed_gives_the_same_encoder(tmp_path):
    for name, seed in (("first", "3"), ("second", "3"), ("other", "4")):
        assert fit(tmp_path / name, "--steps", "2", "--seed", seed) == 0
    first, second, other = (
        (tmp_path / name / "text_encoder" / "model.safetensors").read_bytes()
        for name in ("first", "second", "other")
    )
    assert first == second != other


def test_facts_are_told_apart():
    red_star = Description((Mention("star", "red"),), count=3)
    star_red = Description((Mention("star"), Mention("ring", "red")), relation="above")
    facts = train_text_encoder.list_facts([red_star, star_red])
    values = [
        [values[index] for values, index in zip(train_text_encoder.FACTS, row, strict=True)]
        for row in facts.tolist()
    ]
    assert values[0] == ["star", "red", None, None, None, None, 3, None, None, None]
    assert values[1] == ["star", None, None, "ring", "red", None, 1, "above", None, None]


def test_an_existing_folder_is_refused(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    assert fit(tmp_path / "text") == 1
    assert "exists" in capsys.readouterr().err
