"""Loaders of training batches, in this process and in others."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffnext.data.flex_loaders import DataLoader, FeatureDataLoader
from diffnext.data.flex_pipelines import Worker
from diffnext.data.records import RecordDataset, RecordError
from tests.data.guide_examples import make_example


def numbers_of(batch):
    """Return the numbers of the examples in a batch."""
    return batch[0]["latents"][:, 0, 0, 0].astype(int).tolist()


def take(loader, count):
    return [loader.next()[0] for _ in range(count)]


def assert_same_batches(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert np.array_equal(batch["latents"], other["latents"])
        assert batch["prompt"] == other["prompt"]
        assert batch["motion_flow"] == other["motion_flow"]


@pytest.fixture
def two_cpus(monkeypatch):
    """Allow two processes on any machine."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)


def test_a_batch_is_a_plain_dict_in_a_list(make_dataset):
    with FeatureDataLoader(make_dataset(5), batch_size=3) as loader:
        batches = loader.next()
    assert isinstance(batches, list)
    (batch,) = batches
    assert type(batch) is dict
    assert list(batch) == ["latents", "prompt", "motion_flow"]
    assert batch["latents"].shape == (3, 2, 3, 4)
    assert batch["latents"].dtype == np.float16
    assert batch["latents"].flags.writeable
    numbers = batch["latents"][:, 0, 0, 0].tolist()
    assert batch["motion_flow"] == numbers
    for number, prompt in zip(numbers, batch["prompt"], strict=True):
        assert prompt in (f"Long caption {number:.0f}.", f"Short {number:.0f}")


def test_next_iteration_and_call_are_the_same(make_dataset):
    folder = make_dataset(5)
    with FeatureDataLoader(folder) as loader, FeatureDataLoader(folder) as other:
        assert iter(loader) is loader
        batches = [loader.next()[0], next(loader)[0], loader()[0]]
        assert_same_batches(batches, take(other, 3))


def test_examples_come_in_the_order_of_the_reference_reader(make_dataset):
    with FeatureDataLoader(make_dataset(5), batch_size=4) as loader:
        numbers = [number for _ in range(5) for number in numbers_of(loader.next())]
    assert numbers == [4, 1, 3, 0, 2, 2, 3, 4, 1, 0, 0, 2, 4, 3, 1, 2, 4, 0, 1, 3]


def test_shard_id_selects_the_shard_and_is_added_to_the_seed(make_dataset):
    folder = make_dataset(20)
    with FeatureDataLoader(folder, shard_id=1, num_shards=2, seed=10, batch_size=10) as loader:
        numbers = numbers_of(loader.next())
    expected = np.arange(10, 20)
    generator = np.random.RandomState(11)
    for i in range(10):
        j = i + generator.randint(0, 10 - i)
        expected[[i, j]] = expected[[j, i]]
    assert numbers == expected.tolist()


def test_without_shuffling_examples_come_in_file_order(make_dataset):
    with FeatureDataLoader(make_dataset(5, max_examples=2), shuffle=False, batch_size=4) as loader:
        assert numbers_of(loader.next()) == [0, 1, 2, 3]
        assert numbers_of(loader.next()) == [4, 0, 1, 2]


def test_both_captions_are_chosen(make_dataset):
    with FeatureDataLoader(make_dataset(16), batch_size=40) as loader:
        prompts = loader.next()[0]["prompt"]
    short = sum(prompt.startswith("Short") for prompt in prompts)
    assert 10 < short < 30


def test_the_choice_of_captions_depends_on_the_seed(make_dataset):
    folder, prompts = make_dataset(16), []
    for seed in (1, 2):
        with FeatureDataLoader(folder, batch_size=16, shuffle=False, seed=seed) as loader:
            prompts.append(loader.next()[0]["prompt"])
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_batches_do_not_depend_on_the_number_of_processes(make_dataset, num_workers):
    folder = make_dataset(11)
    with (
        FeatureDataLoader(folder, batch_size=3) as here,
        FeatureDataLoader(folder, batch_size=3, num_workers=num_workers) as elsewhere,
    ):
        assert_same_batches(take(here, 12), take(elsewhere, 12))


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_the_start_method(make_dataset, two_cpus, start_method):
    folder = make_dataset(11)
    options = {"batch_size": 3, "num_workers": 2, "start_method": start_method}
    with (
        FeatureDataLoader(folder, batch_size=3) as here,
        FeatureDataLoader(folder, **options) as it,
    ):
        assert_same_batches(take(here, 5), take(it, 5))


def test_what_a_spawned_process_needs_can_be_pickled(make_dataset):
    with FeatureDataLoader(make_dataset(3)) as loader:
        pickle.loads(pickle.dumps((loader.dataset, loader._worker)))


def test_loading_leaves_the_global_generators_alone(make_dataset, two_cpus):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    with FeatureDataLoader(make_dataset(5), num_workers=2) as loader:
        take(loader, 3)
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_closing_stops_the_processes(make_dataset, two_cpus):
    loader = FeatureDataLoader(make_dataset(5), num_workers=2)
    loader.next()
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_a_script_ends_without_closing_its_loader(make_dataset):
    code = (
        "from diffnext.data.flex_loaders import FeatureDataLoader\n"
        f"loader = FeatureDataLoader({make_dataset(5)!r}, num_workers=2)\n"
        "print(len(loader.next()))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_loader_continues_the_stream(make_dataset, two_cpus, num_workers):
    folder = make_dataset(11)
    options = {"batch_size": 4, "initial_fill": 5, "num_workers": num_workers}
    with FeatureDataLoader(folder, **options) as loader:
        take(loader, 7)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = take(loader, 6)
    with FeatureDataLoader(folder, **options) as restored:
        take(restored, 2)
        restored.load_state_dict(state)
        assert restored.state_dict() == state
        assert_same_batches(take(restored, 6), expected)


def test_restoring_reads_no_example(make_dataset):
    class CountingDataset(RecordDataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    folder = make_dataset(11)
    with FeatureDataLoader(folder, dataset_getter=CountingDataset, batch_size=2) as loader:
        loader.load_state_dict({**loader.state_dict(), "consumed": 1001})
        loader.next()
        assert loader.dataset.reads == 2
        assert loader.state_dict()["consumed"] == 1003


def test_a_restored_loader_may_have_another_batch_size(make_dataset):
    folder = make_dataset(11)
    with FeatureDataLoader(folder, batch_size=2) as loader:
        take(loader, 3)
        state = loader.state_dict()
        expected = [number for _ in range(3) for number in numbers_of(loader.next())]
    with FeatureDataLoader(folder, batch_size=6) as restored:
        restored.load_state_dict(state)
        assert numbers_of(restored.next()) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, "seed 1337 -> 5"),
        ({"num_shards": 2}, "num_shards 1 -> 2"),
        ({"shuffle": False}, "shuffle True -> False"),
        ({"initial_fill": 3}, "initial_fill 1024 -> 3"),
    ],
)
def test_the_state_of_another_stream_is_refused(make_dataset, options, message):
    folder = make_dataset(11)
    with FeatureDataLoader(folder) as loader, FeatureDataLoader(folder, **options) as other:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(loader.state_dict())


def test_the_state_of_another_dataset_is_refused(make_dataset):
    loader, other = FeatureDataLoader(make_dataset(11)), FeatureDataLoader(make_dataset(12))
    with pytest.raises(ValueError, match="num_examples 11 -> 12"):
        other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bacth_size": 2}, TypeError, "'bacth_size'; did you mean 'batch_size'"),
        ({"partition_id": 0}, TypeError, "unknown loader argument 'partition_id'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": "2"}, TypeError, "batch_size must be a whole number, got '2'"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be a whole number"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0"),
        ({"queue_depth": 0}, ValueError, "queue_depth must be at least 1"),
        ({"initial_fill": 0}, ValueError, "initial_fill must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"timeout": -1}, ValueError, "timeout must be a number of at least 0, got -1"),
        ({"timeout": "1"}, ValueError, "timeout must be a number of at least 0, got '1'"),
        ({"batch_size": 10**12}, ValueError, "batch_size 1000000000000 does not fit in memory: "),
        ({"queue_depth": 10**12, "num_workers": 1}, ValueError, "queue_depth 1000000000000 the"),
        ({"start_method": "thread"}, ValueError, "start_method must be one of"),
        ({"max_examples": 4}, ValueError, "max_examples must be the 5 examples"),
        ({"num_shards": 4, "shard_id": 3}, ValueError, "fill only 3 of 4 shards"),
        ({"num_shards": 2, "shard_id": 2}, ValueError, "shard_id must lie in"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(make_dataset, options, error, message):
    with pytest.raises(error, match=message):
        FeatureDataLoader(make_dataset(5), **options)


def test_a_batch_larger_than_the_dataset_repeats_examples(make_dataset):
    with FeatureDataLoader(make_dataset(2), batch_size=5, shuffle=False) as loader:
        assert loader.next()[0]["motion_flow"] == [0, 1, 0, 1, 0]


def test_arguments_of_the_original_without_effect_are_accepted(make_dataset):
    with FeatureDataLoader(make_dataset(5), max_examples=5, prefetch_count=50) as loader:
        assert len(loader.next()) == 1


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="METADATA"):
        FeatureDataLoader(tmp_path)


def test_a_truncated_dataset_is_refused_at_construction(make_dataset):
    folder = make_dataset(5)
    with open(Path(folder) / "00000.data", "r+b") as file:
        file.truncate(100)
    with pytest.raises(RecordError, match="truncated: example"):
        FeatureDataLoader(folder)


def test_a_dataset_of_codes_is_refused_at_construction(make_dataset):
    example = {"codes": np.zeros(4, np.int32), "shape": (4,), "label": 1}
    folder = make_dataset([example], {"codes": "bytes", "shape": ["int64"], "label": "int64"})
    with pytest.raises(ValueError, match="VQ 'codes', which no training pipeline can use"):
        FeatureDataLoader(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_record_is_an_error_of_next(make_dataset, tmp_path, two_cpus, num_workers):
    folder = Path(make_dataset(5, max_examples=3)).rename(tmp_path / "two\nlines")
    data_path = Path(folder) / "00001.data"
    content = bytearray(data_path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = b"\xff" * 8  # start of example 4
    data_path.write_bytes(content)
    with FeatureDataLoader(folder, shuffle=False, num_workers=num_workers) as loader:
        take(loader, 4)
        message = r"^example 4 \(number 1 in .*\n.*00001.data\) is"
        for _ in range(2):
            with pytest.raises(RecordError, match=message):
                loader.next()


def test_datasets_share_the_files_that_a_process_may_open(make_dataset):
    with FeatureDataLoader([make_dataset(2), make_dataset(3)]) as loader:
        assert [part._max_open_files for part in loader.datasets] == [128, 128]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_latents_of_another_dtype_are_an_error_of_next(make_dataset, two_cpus, num_workers):
    examples = [make_example(number) for number in range(3)]
    examples[1]["moments"] = examples[1]["moments"].astype(np.float32)
    with FeatureDataLoader(
        make_dataset(examples), shuffle=False, num_workers=num_workers
    ) as loader:
        loader.next()
        with pytest.raises(RecordError, match=r"^example 1 .*00000.data\): 'moments' .* float16"):
            loader.next()


def test_an_example_without_caption_and_label_is_an_error_of_next(make_dataset):
    features = {"moments": "bytes", "shape": ["int64"]}
    examples = [{"moments": b"\0\0", "shape": (1,)}]
    with FeatureDataLoader(make_dataset(examples, features)) as loader:
        with pytest.raises(RecordError, match="example 0 .* needs a 'caption' or a 'label'"):
            loader.next()


def test_latents_of_several_shapes_need_lists(make_dataset):
    folder = make_dataset([make_example(0), make_example(1, shape=(2, 5, 4))])
    options = {"shuffle": False, "batch_size": 2}
    with FeatureDataLoader(folder, **options) as loader:
        expected = r"\(2, 3, 4\) and \(2, 5, 4\) in one batch; pass contiguous=False"
        with pytest.raises(RecordError, match=expected) as failure:
            loader.next()
    assert "example 0 " in str(failure.value)
    assert "example 1 " in str(failure.value)
    with FeatureDataLoader(folder, contiguous=False, **options) as loader:
        latents = loader.next()[0]["latents"]
    assert [array.shape for array in latents] == [(2, 3, 4), (2, 5, 4)]
    assert all(array.flags.writeable for array in latents)


def test_cached_captions_and_labels_become_prompts(make_dataset):
    states = np.ones((3, 2), dtype=np.float16)
    features = {
        "moments": "bytes",
        "shape": ["int64"],
        "caption": {"data": "bytes", "shape": ["int64"]},
    }
    example = {
        "moments": b"\0\0",
        "shape": (1,),
        "caption": {"data": states, "shape": states.shape},
    }
    with FeatureDataLoader(make_dataset([example], features)) as loader:
        (prompt,) = loader.next()[0]["prompt"]
    assert np.array_equal(prompt, states)
    assert prompt.flags.writeable

    features = {"moments": "bytes", "shape": ["int64"], "label": "int64"}
    example = {"moments": b"\0\0", "shape": (1,), "label": 0}
    with FeatureDataLoader(make_dataset([example], features), batch_size=2) as loader:
        batch = loader.next()[0]
    assert batch["prompt"] == [0, 0]
    assert "motion_flow" not in batch


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_is_an_error_and_the_stream_can_go_on(make_dataset, two_cpus):
    folder = make_dataset(7)
    with FeatureDataLoader(folder, batch_size=2) as reference:
        expected = take(reference, 50)
    with FeatureDataLoader(folder, batch_size=2, num_workers=2, timeout=20) as loader:
        take(loader, 3)
        with pytest.raises(RuntimeError, match="worker|no batch"):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            take(loader, 40)
        batches_taken = loader.state_dict()["consumed"] // 2
        assert 3 <= batches_taken < 43
        following = take(loader, 5)
    assert_same_batches(following, expected[batches_taken : batches_taken + 5])


class StuckDataset(RecordDataset):
    """Never returns an example."""

    def __getitem__(self, index):
        multiprocessing.Event().wait()


def test_a_stuck_process_is_an_error_after_the_timeout(make_dataset):
    loader = FeatureDataLoader(
        make_dataset(3), dataset_getter=StuckDataset, num_workers=1, timeout=0.5
    )
    with pytest.raises(RuntimeError, match="no batch at position 0 .*timed out"):
        loader.next()


class NumberWorker(Worker):
    """A pipeline of another project."""

    def get_outputs(self, example, uniform=None):
        return {"latents": [np.array(example["flow"])], "draw": [uniform()]}


def test_another_pipeline_can_be_loaded(make_dataset):
    with DataLoader(make_dataset(4), NumberWorker, batch_size=4, shuffle=False) as loader:
        first, second = loader.next()[0], loader.next()[0]
    assert first["latents"].tolist() == [0, 1, 2, 3]
    assert len(set(first["draw"] + second["draw"])) == 8


class ListDataset(list):
    """A dataset with nothing but a length and examples."""

    def __init__(self, path):
        super().__init__(
            {**make_example(n), "moments": make_example(n)["moments"].tobytes()} for n in range(3)
        )


def test_another_dataset_can_be_loaded(tmp_path):
    options = {"shuffle": False, "batch_size": 3, "dataset_getter": ListDataset}
    with FeatureDataLoader(tmp_path, **options) as loader:
        assert numbers_of(loader.next()) == [0, 1, 2]
        loader.dataset[1]["moments"] = b""
        with pytest.raises(RecordError, match="example 1 of .*: 'moments' of shape"):
            loader.next()


# Several datasets

SHAPES = [(2, 3, 4), (2, 4, 3), (2, 6, 6)]
SIZES = [12, 8, 5]
MIXED = {"batch_size": 2, "initial_fill": 5}


@pytest.fixture
def three(make_dataset):
    """Folders of datasets of three shapes; the number of an example also shows its dataset."""
    return [
        make_dataset([make_example(100 * place + n, shape) for n in range(size)])
        for place, (shape, size) in enumerate(zip(SHAPES, SIZES, strict=True))
    ]


def weighted(folders, *weights):
    return [{"folder": f, "weight": w} for f, w in zip(folders, weights, strict=True)]


def datasets_of(batches):
    """The place of the dataset that each batch is from."""
    places = [{number // 100 for number in numbers_of([batch])} for batch in batches]
    for batch, place in zip(batches, places, strict=True):
        assert len(place) == 1 and batch["latents"].shape[1:] == SHAPES[min(place)]
    return [min(place) for place in places]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_one_shape_come_in_the_proportion_of_the_weights(three, two_cpus, num_workers):
    with FeatureDataLoader(weighted(three, 2, 1, 1), num_workers=num_workers, **MIXED) as loader:
        places = datasets_of(take(loader, 400))
    assert [places.count(place) for place in range(3)] == [200, 100, 100]
    assert [places[:200].count(place) for place in range(3)] == [100, 50, 50]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, [12, 8, 5]),
        ((0.25, 0.25, 0.5), [25, 25, 50]),
        ((1e-3, 0.003, 1e-3), [20, 60, 20]),
        ((3, 1, 1), [60, 20, 20]),
    ],
)
def test_weights_are_the_numbers_of_examples_unless_given(three, weights, expected):
    folders = three if weights is None else weighted(three, *weights)
    with FeatureDataLoader(folders, **MIXED) as loader:
        places = datasets_of(take(loader, sum(expected)))
    assert [places.count(place) for place in range(3)] == expected


def test_each_dataset_is_passed_over_in_its_own_order(three):
    with FeatureDataLoader(weighted(three, 2, 1, 1), **MIXED) as loader:
        numbers = [number for _ in range(80) for number in numbers_of(loader.next())]
    for place, (folder, size) in enumerate(zip(three, SIZES, strict=True)):
        own = [number for number in numbers if number // 100 == place]
        with FeatureDataLoader(folder, **MIXED) as alone:
            expected = [number for _ in range(80) for number in numbers_of(alone.next())]
        assert own == expected[: len(own)]
        assert len(set(own[:size])) == size


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 7, 40])
def test_a_restored_loader_continues_with_the_next_dataset(three, two_cpus, num_workers, taken):
    options = {**MIXED, "num_workers": num_workers}
    with FeatureDataLoader(weighted(three, 2, 1, 1), **options) as loader:
        take(loader, taken)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = take(loader, 9)
        assert loader.last_examples(2) == loader.last_examples(4)[2:]
    with FeatureDataLoader(weighted(three, 2.0, 1, 1.0), **MIXED) as restored:
        restored.load_state_dict(state)
        assert restored.state_dict() == state
        assert_same_batches(take(restored, 9), expected)


def test_all_shards_read_from_the_same_dataset_at_a_time(three):
    options = {**MIXED, "num_shards": 2}
    places, seen = [], []
    for shard_id in range(2):
        with FeatureDataLoader(weighted(three, 2, 1, 1), shard_id=shard_id, **options) as loader:
            batches = take(loader, 60)
        places.append(datasets_of(batches))
        seen.append({number for batch in batches for number in numbers_of([batch])})
    assert places[0] == places[1]
    assert not seen[0] & seen[1]
    expected = {100 * place + number for place, size in enumerate(SIZES) for number in range(size)}
    assert seen[0] | seen[1] == expected


def test_a_dataset_of_fewer_examples_than_shards_is_read_by_several(three):
    seen = set()
    for shard_id in range(8):
        options = {**MIXED, "shard_id": shard_id, "num_shards": 8}
        with FeatureDataLoader(weighted(three, 2, 1, 1), **options) as loader:
            seen |= {number for batch in take(loader, 40) for number in numbers_of([batch])}
    assert {number for number in seen if number >= 200} == {200, 201, 202, 203, 204}


def test_a_list_of_one_dataset_is_that_dataset(make_dataset, caplog):
    folder = make_dataset(11)
    logs, states = [], []
    for dataset in (folder, Path(folder), [folder], weighted([folder], 3)):
        caplog.clear()
        with (
            caplog.at_level("INFO"),
            FeatureDataLoader(folder, batch_size=3) as expected,
            FeatureDataLoader(dataset, batch_size=3) as loader,
        ):
            assert_same_batches(take(expected, 6), take(loader, 6))
            states.append(loader.state_dict())
        logs.append(caplog.messages[1])
    assert states == [states[0]] * 4 and logs == [logs[0]] * 4
    assert list(states[0]["order"])[:2] == ["num_examples", "shard_id"]


@pytest.fixture
def sizes_folder(three, tmp_path):
    """A folder of two datasets as the cache builder leaves it."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, source in zip(("24x32", "32x24"), three, strict=False):
        Path(source).rename(folder / name)
    (folder / "manifest.json").write_text(
        json.dumps({"datasets": {"24x32": 12, "32x24": 8}, "counts": {"items": 20}})
    )
    return folder


def test_a_folder_of_several_sizes_stands_for_all_of_them(sizes_folder, three):
    with FeatureDataLoader(sizes_folder, **MIXED) as loader:
        places = datasets_of(take(loader, 20))
        assert [places.count(place) for place in range(3)] == [12, 8, 0]
        assert [len(dataset) for dataset in loader.datasets] == [12, 8]
    both = weighted([sizes_folder, three[2]], 1, 3)
    with FeatureDataLoader(both, **MIXED) as loader:
        places = datasets_of(take(loader, 80))
    assert [places.count(place) for place in range(3)] == [12, 8, 60]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (lambda a, b: [], "must name a dataset"),
        (lambda a, b: [a, 5], "must list folders, or {folder: ..., weight: ...}, not 5"),
        (lambda a, b: [{"path": a}], "must list folders"),
        (lambda a, b: [{"folder": a, "weigth": 1}], "must list folders"),
        (lambda a, b: [{"folder": a, "weight": 0}, b], "must have weights above 0, not 0 for"),
        (lambda a, b: [{"folder": a, "weight": float("nan")}], "weights above 0, not nan"),
        (lambda a, b: [{"folder": a, "weight": "2"}], "must have weights above 0, not '2'"),
        (lambda a, b: [{"folder": a, "weight": 1}, b], "a weight for each dataset, or for none"),
        (lambda a, b: [a, b, f"{a}/../{Path(a).name}"], "is named twice"),
        (lambda a, b: [a, f"{b}/none"], "there is no folder .*/none"),
        (lambda a, b: f"{a}/METADATA", "/METADATA is not a dataset"),
    ],
)
def test_a_wrong_list_of_datasets_is_refused_at_construction(make_dataset, datasets, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FeatureDataLoader(datasets(make_dataset(3), make_dataset(3)))


@pytest.mark.parametrize("name", ["../24x32", "/etc", "linked", "", ".", ".."])
def test_a_manifest_cannot_lead_out_of_its_folder(sizes_folder, name):
    (sizes_folder / "linked").symlink_to(sizes_folder / "24x32")
    (sizes_folder / "manifest.json").write_text(json.dumps({"datasets": {name: 3}}))
    with pytest.raises(RecordError, match="its manifest lists .*, which is not a folder in it"):
        FeatureDataLoader(sizes_folder)


def test_the_state_of_other_weights_or_of_one_dataset_is_refused(three):
    with FeatureDataLoader(weighted(three, 2, 1, 1), **MIXED) as loader:
        for other in (weighted(three, 1, 1, 1), weighted(three[:2], 2, 1), three[0]):
            with FeatureDataLoader(other, **MIXED) as changed:
                with pytest.raises(ValueError, match="another order of examples"):
                    loader.load_state_dict(changed.state_dict())
                with pytest.raises(ValueError, match="another order of examples"):
                    changed.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_name_the_dataset_among_several(three, two_cpus, num_workers):
    data = Path(three[1]) / "00000.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    with FeatureDataLoader(weighted(three, 2, 1, 1), num_workers=num_workers, **MIXED) as loader:
        loader.next()
        with pytest.raises(RecordError, match=rf"^example \d \(number \d in {data}\) is corrupt"):
            loader.next()


def test_examples_of_several_datasets_are_named(three):
    with FeatureDataLoader(weighted(three, 2, 1, 1), shuffle=False, batch_size=1) as loader:
        take(loader, 3)
        assert loader.last_examples(3) == [0, 0, 0]
        assert loader.describe_last(2) == ", ".join(
            f"example 0 (number 0 in {folder}/00000.data)" for folder in three[1:]
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_cut_short_while_it_is_read_is_an_error(make_dataset, two_cpus, num_workers):
    folder = make_dataset([make_example(number, (2, 64, 64)) for number in range(30)])
    options = {"num_workers": num_workers, "shuffle": False, "queue_depth": 1}
    with FeatureDataLoader(folder, **options) as loader:
        take(loader, 2)
        os.truncate(f"{folder}/00000.data", 4096)
        with pytest.raises(RecordError, match=f"{folder}/00000.data was changed, replaced or"):
            take(loader, 25)


@pytest.mark.slow
def test_spawned_processes_do_not_read_the_index_again(make_dataset, two_cpus):
    folder = make_dataset(11)
    with FeatureDataLoader(folder, batch_size=3) as here:
        expected = take(here, 3)
    options = {"batch_size": 3, "num_workers": 1, "start_method": "spawn"}
    with FeatureDataLoader(folder, **options) as loader:
        (Path(folder) / "00000.index").unlink()
        (Path(folder) / "METADATA").unlink()
        assert_same_batches(take(loader, 3), expected)
