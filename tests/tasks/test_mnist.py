import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import p2pfl
from p2pfl.data.sources import SOURCES, read
from p2pfl.errors import ConfigError, DataError
from p2pfl.params import Layout
from p2pfl.tasks import load_task
from p2pfl.tasks.partition import dealt, drawn

needs_data = pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no MNIST files")

OPTIONS = {"nodes": 16, "partition": {"name": "dirichlet", "alpha": 0.1}, "seed": 0}


@pytest.fixture(scope="module")
def sixteen():
    return load_task("mnist", **OPTIONS)


def images_of(rows):
    """Each image with its class, as bytes."""
    return [image.numpy().tobytes() + bytes([label]) for image, label in zip(rows[0], rows[1].tolist(), strict=True)]


def official(part, shape):
    return np.frombuffer(read(SOURCES["mnist"], [part])[part], dtype=np.uint8, offset=16 if "images" in part else 8).reshape(shape)


def test_dealt_rows_are_each_used_once_and_alike_at_every_node():
    classes = np.repeat(np.arange(4), [50, 31, 17, 2])
    parts = dealt(classes, 6, seed=3)
    counts = np.array([np.bincount(classes[rows], minlength=4) for rows in parts])

    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert sorted(len(rows) for rows in parts) == [16, 16, 17, 17, 17, 17]
    assert (counts.max(axis=0) - counts.min(axis=0)).tolist() == [1, 1, 1, 1]
    assert [rows.tolist() for rows in parts] == [rows.tolist() for rows in dealt(classes, 6, seed=3)]
    assert [rows.tolist() for rows in parts] != [rows.tolist() for rows in dealt(classes, 6, seed=4)]


def test_drawn_rows_are_without_repetition_and_follow_the_seed():
    rows = drawn(100, 30, seed=1)

    assert len(set(rows.tolist())) == 30
    assert rows.tolist() == sorted(rows.tolist()) == drawn(100, 30, seed=1).tolist() != drawn(100, 30, seed=2).tolist()
    assert drawn(100, 100, seed=1).tolist() == list(range(100))


def test_a_missing_file_is_answered_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("P2PFL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with pytest.raises(DataError) as caught:
        load_task("mnist")
    assert str(caught.value) == (
        f"train-images-idx3-ubyte is not in {tmp_path}/mnist nor in {tmp_path}/cache/p2pfl/mnist: "
        "run `p2pfl data fetch mnist`, or set P2PFL_DATA to a folder with mnist/"
    )


def test_files_that_are_not_the_original_are_refused(tmp_path):
    for name in SOURCES["mnist"].md5:
        (tmp_path / name).write_bytes(b"\0" * 16)

    with pytest.raises(DataError, match="train-images-idx3-ubyte has MD5 4ae71336e44bf9bf79d2752e234818a5, the original 6bbc9ace"):
        load_task("mnist", data=str(tmp_path))


def test_what_cannot_be_is_refused_by_key_all_at_once():
    with pytest.raises(ConfigError) as caught:
        load_task("mnist", model="transformer", hidden=-1, samples=60_001)
    assert caught.value.findings == (
        "task.model = 'transformer': one of cnn, perceptron",
        "task.hidden = -1: expected 0 or more",
        "task.samples = 60001: expected 2 to 60000",
    )

    with pytest.raises(ConfigError, match=r"task\.hidden = 64: is for model: perceptron; here it is cnn"):
        load_task("mnist", hidden=64)


@needs_data
def test_every_official_test_image_is_tested_on_once_by_nodes_that_see_the_same_mix(sixteen):
    tested = [pair for site in sixteen.sites for pair in images_of(site.test)]
    images, labels = official("t10k-images-idx3-ubyte", (10_000, -1)), official("t10k-labels-idx1-ubyte", -1)
    counts = torch.stack([site.test[1].bincount(minlength=10) for site in sixteen.sites])

    assert sorted(tested) == sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True))
    assert [len(site.test[1]) for site in sixteen.sites] == [625] * 16
    assert counts.sum(dim=0).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert int((counts.max(dim=0).values - counts.min(dim=0).values).max()) == 1
    assert sixteen.notes == ()


@needs_data
def test_every_training_image_is_at_one_node_and_shared_out_by_the_rule(sixteen):
    images = hashlib.md5(usedforsecurity=False)
    for pair in sorted(pair for site in sixteen.sites for pair in images_of(site.train)):
        images.update(pair)
    expected = hashlib.md5(usedforsecurity=False)
    pixels, labels = official("train-images-idx3-ubyte", (60_000, -1)), official("train-labels-idx1-ubyte", -1)
    for pair in sorted(image.tobytes() + bytes([label]) for image, label in zip(pixels, labels, strict=True)):
        expected.update(pair)

    assert images.digest() == expected.digest()
    # Dirichlet 0.1 and seed 0
    sizes = [1715, 1430, 2821, 494, 5613, 2057, 6758, 4154, 3982, 6971, 3876, 699, 7762, 2907, 858, 7903]
    assert [len(site.train[1]) for site in sixteen.sites] == sizes
    assert [site.name for site in sixteen.sites][::15] == ["node-00", "node-15"]


@needs_data
def test_images_are_kept_once_as_bytes(sixteen):
    storages = {tensor.untyped_storage().data_ptr(): tensor for site in sixteen.sites for tensor in (site.train[0], site.test[0])}

    assert {tensor.dtype for tensor in storages.values()} == {torch.uint8}
    assert sorted(tensor.untyped_storage().nbytes() for tensor in storages.values()) == [10_000 * 784, 60_000 * 784]
    assert sixteen.sites[0].train[0].shape[1:] == (1, 28, 28)


@needs_data
def test_the_same_seed_gives_the_same_rows_and_samples_are_fewer():
    one, other, third = (load_task("mnist", samples=320, nodes=4, seed=seed) for seed in (1, 1, 2))

    assert sum(len(site.train[1]) for site in one.sites) == 320
    assert sum(len(site.test[1]) for site in one.sites) == 10_000
    assert [images_of(site.train) for site in one.sites] == [images_of(site.train) for site in other.sites]
    assert [images_of(site.test) for site in one.sites] == [images_of(site.test) for site in other.sites]
    assert sorted(p for site in one.sites for p in images_of(site.train)) != sorted(
        p for site in third.sites for p in images_of(site.train)
    )


@needs_data
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 16 * 25 + 16 + 32 * 16 * 9 + 32 + 288 * 10 + 10),
        ({"model": "perceptron"}, 784 * 32 + 32 + 32 * 10 + 10),
        ({"model": "perceptron", "hidden": 0}, 784 * 10 + 10),
    ],
)
def test_models_have_the_parameters_that_they_are_said_to_have(options, size):
    task = load_task("mnist", samples=20, **options)

    assert Layout.of(task.model()).size == size
    assert task.model()(task.sites[0].test[0][:3]).shape == (3, 10)
    assert len(task.sites) == 10


@needs_data
def test_a_row_of_pixels_becomes_the_image(sixteen):
    images, _ = sixteen.sites[3].test
    raw = images[:5].reshape(5, 784).numpy().astype(np.float64)

    assert torch.equal(sixteen.sites[3].prepare(raw), images[:5])
    assert len(sixteen.features) == 784
    probabilities = sixteen.probabilities(sixteen.model()(images[:5]))
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(5))
    raw[2, 30] = 0.5
    with pytest.raises(DataError, match=r"row 2, pixel_1_2 = 0\.5: expected a whole number from 0 to 255"):
        sixteen.sites[3].prepare(raw)
    with pytest.raises(DataError, match=r"features of shape \[5, 783\]: expected rows of 784 pixels"):
        sixteen.sites[3].prepare(raw[:, 1:])


@needs_data
def test_pixels_are_standardised_by_the_published_mean_and_deviation(sixteen):
    pixels = torch.cat([site.train[0] for site in sixteen.sites]).double() / 255

    assert (round(float(pixels.mean()), 4), round(float(pixels.std()), 4)) == (0.1307, 0.3081)


@pytest.mark.slow
@needs_data
def test_the_mean_model_is_tested_on_the_official_test_images(tmp_path):
    experiment = {
        "task": {"name": "mnist", "samples": 160},
        "nodes": 4,
        "algorithm": {"name": "dpsgd", "local_steps": 2, "batch_size": 8},
        "rounds": 2,
        "stop": None,
        "baselines": [],
    }
    run = p2pfl.simulate(experiment, out=tmp_path / "run")
    models = list(run.models.values())
    mean = p2pfl.load(run, "node-0")
    torch.nn.utils.vector_to_parameters(torch.stack(models).mean(dim=0), mean.parameters())
    pixels, labels = official("t10k-images-idx3-ubyte", (10_000, 1, 28, 28)), official("t10k-labels-idx1-ubyte", -1)
    with torch.no_grad():
        right = int((mean(torch.from_numpy(pixels.copy())).argmax(dim=1).numpy() == labels).sum())

    assert run.summary["row_by_row"] is None
    assert run.summary["mean_model"]["accuracy"] == right / 10_000
    assert {path.name for path in Path(tmp_path / "run" / "models").iterdir()} == {f"node-{i}.safetensors" for i in range(4)}
