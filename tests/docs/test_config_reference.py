"""The configuration reference is what the code says."""

import make_config_reference
from diffnext.config.schema import TrainConfig, iterate_schema


def test_the_committed_page_is_up_to_date():
    assert make_config_reference.PAGE.read_text() == make_config_reference.render()


def test_every_key_is_listed_under_its_section():
    text = make_config_reference.render()
    for item in iterate_schema(TrainConfig):
        section, _, name = item.path.rpartition(".")
        if item.section is None:
            table = text.split(f"## `{section}`\n" if section else "## The run\n")[1].split(
                "\n## "
            )[0]
            assert f"| `{name}` |" in table


def test_an_outdated_page_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "configuration.md"
    page.write_text("# Configuration")
    monkeypatch.setattr(make_config_reference, "PAGE", page)
    assert make_config_reference.main(["--check"]) == 1
    assert "is out of date" in capsys.readouterr().err
    assert make_config_reference.main([]) == 0
    assert make_config_reference.main(["--check"]) == 0
