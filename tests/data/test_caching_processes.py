"""Processes of a build: those that decode and may fail, and builds that share an output folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from diffnext.data.caching import building
from diffnext.data.caching import claims as claims_module
from diffnext.data.caching.building import build_cache
from diffnext.data.caching.claims import Claims
from diffnext.data.caching.errors import CacheError
from diffnext.data.caching.settings import FrameSampling
from tests.data.caching_inputs import (
    make_settings,
    numbered_frames,
    save_video_vae,
    write_pictures,
    write_video,
)

# A decoder that follows the word in a file; the real one reads every other file.
FAKE_AV = """
import os, signal, sys, time
sys.path.remove(os.path.dirname(__file__))
del sys.modules["av"]
from av import *
import av
real_open = av.open

class Strange(BaseException):
    pass

def open(file, *args, **kwargs):
    content = file.read()
    file.seek(0)
    if content == b"hang":
        time.sleep(1000)
    elif content == b"hang deep":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        while True:
            hash(b"x" * 10**8)
    elif content == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif content == b"abort":
        os.abort()
    elif content == b"exit":
        os._exit(3)
    elif content == b"memory":
        held = bytearray(2**33)
    elif content == b"strange":
        raise type("Strange", (Exception,), {})("stranger than fiction")
    elif content == b"once" and not os.path.exists(os.environ["ONCE"]):
        os.mkdir(os.environ["ONCE"])
        os.kill(os.getpid(), signal.SIGKILL)
    elif content.endswith(b"changes"):
        os.utime(file.fileno(), (1, 1))
    return real_open(file, *args, **kwargs)

av.open = open
"""
BAD_DECODERS = {
    "hang": "was not decoded within 2 s",
    "hang deep": "was not decoded within 2 s",
    "crash": "its decoder crashed: SIGSEGV",
    "abort": "its decoder crashed: SIGABRT",
    "exit": "its decoder crashed: exit code 3",
    "memory": "memory",
    "strange": "stranger than fiction",
    "once": "cannot be decoded",  # the second time
}


def read_records(folder):
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".data", ".index") or path.name == "METADATA"
    }


def test_decoders_that_hang_crash_or_take_all_memory_cost_one_item(tmp_path, monkeypatch):
    pytest.importorskip("av")
    video_vae = save_video_vae(tmp_path / "vae")
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a", "m", "z"):
        write_video(source / f"{name}.mp4", numbered_frames(6))
        (source / f"{name}.txt").write_text(name)
    changes = {"kind": "videos", "frames": FrameSampling(num_frames=5, stride=1), "time_limit": 2}
    build_cache(make_settings(source, tmp_path / "good", video_vae, **changes))
    for number, content in enumerate(BAD_DECODERS):
        (source / f"{'bny'[number % 3]}{number}.mp4").write_text(content)
        (source / f"{'bny'[number % 3]}{number}.txt").write_text(content)
    changing = (source / "a.mp4").read_bytes() + b"changes"
    (source / "c.mp4").write_bytes(changing)
    (source / "c.txt").write_text("c")
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "av.py").write_text(FAKE_AV)
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    monkeypatch.setattr(sys, "path", [str(fake), *sys.path])
    start = time.monotonic()
    report = build_cache(make_settings(source, tmp_path / "bad", video_vae, **changes))
    assert time.monotonic() - start < 60
    assert report.skipped == len(BAD_DECODERS) + 1 and report.examples == 3
    with pytest.raises(CacheError, match=r"was built: 1 changed \(c\.mp4\);"):
        build_cache(make_settings(source, tmp_path / "bad", video_vae, **changes))
    lines = map(json.loads, (tmp_path / "bad" / "skipped.jsonl").read_text().splitlines())
    reasons = {line["source"]: line["reason"] for line in lines}
    for number, (content, reason) in enumerate(BAD_DECODERS.items()):
        assert reason in reasons[f"{'bny'[number % 3]}{number}.mp4"], content
    assert reasons["c.mp4"] == "was changed while it was read"
    assert read_records(tmp_path / "bad") == read_records(tmp_path / "good")
    assert not [p for p in psutil.Process().children() if "readers" in " ".join(p.cmdline())]


def test_a_decoder_that_is_not_installed_ends_the_build(tmp_path, monkeypatch):
    video_vae = save_video_vae(tmp_path / "vae")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "av.py").write_text("raise ImportError('none here')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "fake"), *sys.path])
    settings = make_settings(
        tmp_path / "in", tmp_path / "out", video_vae, kind="videos",
        frames=FrameSampling(num_frames=5),
    )  # fmt: skip
    with pytest.raises(CacheError, match="pip install 'av"):
        build_cache(settings)


def test_decoding_processes_that_cannot_start_end_the_build(tmp_path, vae, monkeypatch):
    write_pictures(tmp_path / "in", 1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CacheError, match="a decoding process cannot be started"):
        build_cache(make_settings(tmp_path / "in", tmp_path / "out", vae))


# --- builds that share a folder -------------------------------------------------------------------


def start_build(source, output, vae, *options, **environment):
    command = [sys.executable, "-m", "diffnext", "cache", "images", str(source)]
    command += ["--output", str(output), "--vae", str(vae), "--size", "32", "--workers", "1"]
    return subprocess.Popen(
        [*command, "--chunk-size", "2", "--shard-size", "7", "--quiet", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_chunks(output, count, process):
    chunks = output / ".building" / "chunks"
    while process.poll() is None:
        if chunks.is_dir() and len([p for p in chunks.iterdir() if p.name.isdecimal()]) >= count:
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_builds_killed_ten_times_and_several_at_once_write_the_same_bytes(tmp_path, vae):
    write_pictures(tmp_path / "in", 60)
    (tmp_path / "in" / "0031.png").write_bytes(b"")
    straight = start_build(tmp_path / "in", tmp_path / "one", vae)
    assert straight.wait(120) == 0, straight.stderr.read()
    killed = 0
    while killed < 10:
        first = start_build(tmp_path / "in", tmp_path / "two", vae)
        second = start_build(tmp_path / "in", tmp_path / "two", vae)
        wait_for_chunks(tmp_path / "two", 1 + 2 * killed, first)
        for process in (first, second):
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
    last = [start_build(tmp_path / "in", tmp_path / "two", vae) for _ in range(2)]
    for process in last:
        assert process.wait(120) == 0, process.stderr.read()
        assert "59 examples" in process.stdout.read()
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two


def leave_claim(folder, name, owner, host, age):
    """What a process leaves that was killed some seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    alive = folder / f"{owner}.alive"
    alive.write_text(json.dumps({"host": host, "pid": 1, "started": 0.0}))
    (folder / f"{name}.claim").write_text(owner)
    for path in (alive, folder / f"{name}.claim"):
        os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize(
    "host, age, is_free",
    [
        ("another", 10, False),  # a machine that showed a moment ago that it is alive
        ("another", 1000, True),  # one that went down
        (None, 10, True),  # a process of this machine that is gone
    ],
)
def test_claims_outlive_their_process_for_a_while(tmp_path, host, age, is_free):
    leave_claim(tmp_path, "chunk", "owner", host or claims_module._machine(), age)
    with Claims(tmp_path) as claims:
        assert claims.take("chunk") is is_free
        assert claims.take("another")


def test_a_chunk_is_not_built_again_after_another_process_finished(tmp_path, vae, monkeypatch):
    """One looks for missing chunks; by the time it has the claim of one, all is finished."""
    write_pictures(tmp_path / "in", 3)
    settings = make_settings(tmp_path / "in", tmp_path / "out", vae, workers=1)
    missing = building._missing_chunks
    looks = []

    def look_early(work):
        found = missing(work)
        looks.append(found)
        if len(looks) == 2:
            build_cache(settings)
            monkeypatch.setattr(building._ChunkBuilder, "add", lambda *args: pytest.fail("again"))
        return found

    monkeypatch.setattr(building, "_missing_chunks", look_early)
    assert build_cache(settings).examples == 3
    assert not (tmp_path / "out" / ".building").exists()


def test_one_process_has_a_claim(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("chunk") and not other.take("chunk")
        one.give_back("chunk")
        assert other.take("chunk") and not one.take("chunk")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("leave", ["nothing", "another claim"])
def test_a_claim_that_is_given_back_while_it_is_taken_over(tmp_path, monkeypatch, leave):
    """Its process gives it back and another takes it, or somebody removes the whole folder."""
    leave_claim(tmp_path / "claims", "chunk", "owner", claims_module._machine(), 10)
    rename = os.rename

    def rename_late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        if leave == "another claim":
            os.unlink(source)
            assert other.take("chunk")
        rename(source, target)
        if leave == "nothing":
            shutil.rmtree(tmp_path / "claims")

    with Claims(tmp_path / "claims") as claims, Claims(tmp_path / "claims") as other:
        monkeypatch.setattr(os, "rename", rename_late)
        assert claims.take("chunk") is (leave == "nothing")
        assert other.take("chunk") is False
    assert os.listdir(tmp_path / "claims") == []


def test_a_build_takes_over_from_a_machine_that_went_down(tmp_path, vae, monkeypatch):
    write_pictures(tmp_path / "in", 9)
    build_cache(make_settings(tmp_path / "in", tmp_path / "one", vae))
    leave_claim(tmp_path / "two" / ".building" / "claims", "chunk-00000001", "node7", "node7", 119)
    monkeypatch.setattr(claims_module, "DEAD_AFTER", 120.5)
    start = time.monotonic()
    build_cache(make_settings(tmp_path / "in", tmp_path / "two", vae))
    assert time.monotonic() - start > 1  # it waited
    assert read_records(tmp_path / "two") == read_records(tmp_path / "one")
    assert not (tmp_path / "two" / ".building").exists()


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_a_full_disk_names_the_file_and_leaves_a_build_that_goes_on(tmp_path, vae, blocks):
    """A limit on the size of files lets the same calls fail."""
    write_pictures(tmp_path / "in", 30)
    build = start_build(tmp_path / "in", tmp_path / "one", vae)
    assert build.wait(60) == 0, build.stderr.read()
    code = f'ulimit -f {blocks}; exec "$@"'
    command = [str(tmp_path / "two") if a == str(tmp_path / "one") else a for a in build.args]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # Python would leave it cut off
    result = subprocess.run(
        ["sh", "-c", code, "sh", *command], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1
    assert str(tmp_path / "two") in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    build = start_build(tmp_path / "in", tmp_path / "two", vae)
    assert build.wait(60) == 0
    assert read_records(tmp_path / "two") == read_records(tmp_path / "one")
