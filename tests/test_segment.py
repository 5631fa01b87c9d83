"""Clusters of patch tokens against scikit-learn's and scipy's, mIoU on images made to be told apart, and mistakes."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.cluster import AgglomerativeClustering
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from lmim.__main__ import main
from lmim.data.datasets import open_source
from lmim.data.transforms import eval_mask
from lmim.eval import clusters, segment
from lmim.eval.results import read_results
from lmim.objective import LatentMIM
from lmim.options import Config
from tests.conftest import REPOSITORY, TINY, free_port, process_environment
from tests.ranks import tiny_config

COUNTS = [2, 3, 4, 5, 9]


@pytest.fixture(scope="module")
def model() -> LatentMIM:
    config = tiny_config([])
    model = LatentMIM(config.model, config.objective)
    model.init_weights(3)
    return model.eval()


@pytest.fixture(scope="module")
def tokens(model) -> np.ndarray:
    """The tokens (14, 14, D) of a real image, at twice its size."""
    file = io.BytesIO(open_source("embedded:eval").images[0].read())
    image = np.array(Image.open(file).convert("RGB").resize((56, 56)))
    found = clusters.patch_tokens(model.online, torch.from_numpy(image).permute(2, 0, 1)[None], 1)
    return found[0].numpy()


# --- clusters --------------------------------------------------------------------------------------------------------


def merge_slowly(points: np.ndarray, count: int, linkage: str) -> np.ndarray:
    """Merge the two nearest clusters until `count` are left, distances taken anew from the points."""
    members = [[i] for i in range(len(points))]

    def distance(a: list[int], b: list[int]) -> float:
        if linkage == "average":
            return float(np.mean([np.linalg.norm(points[i] - points[j]) for i in a for j in b]))
        between = np.sum((points[a].mean(axis=0) - points[b].mean(axis=0)) ** 2)
        return float(len(a) * len(b) / (len(a) + len(b)) * between)  # growth of the sum of squares

    while len(members) > count:
        pairs = [(i, j) for i in range(len(members)) for j in range(i)]
        i, j = min(pairs, key=lambda pair: distance(members[pair[0]], members[pair[1]]))
        members[j] += members.pop(i)
    labels = np.zeros(len(points), np.int64)
    for number, of in enumerate(members):
        labels[of] = number
    return labels


@pytest.mark.parametrize("linkage", ["ward", "average"])
def test_clusters_are_those_of_the_definition(linkage):
    points = np.random.default_rng(1).normal(size=(26, 3)) * [3, 1, 1]
    for count, labels in zip([3, 5], clusters.tree_clusters(points, [3, 5], linkage), strict=True):
        assert adjusted_rand_score(labels, merge_slowly(points, count, linkage)) == 1


@pytest.mark.parametrize("linkage", ["ward", "average"])
def test_clusters_of_an_encoders_tokens_are_scikit_learns_and_scipys(tokens, linkage):
    from scipy.cluster.hierarchy import cut_tree
    from scipy.cluster.hierarchy import linkage as merge

    points = tokens.reshape(-1, tokens.shape[-1])
    tree = merge(points, linkage)
    for count, labels in zip(COUNTS, clusters.tree_clusters(points, COUNTS, linkage), strict=True):
        assert len(np.unique(labels)) == count
        expected = AgglomerativeClustering(count, linkage=linkage).fit_predict(points.astype(np.float64))
        assert adjusted_rand_score(labels, expected) == 1
        assert adjusted_rand_score(labels, cut_tree(tree, count)[:, 0]) == 1
    if linkage == "ward":
        maps = clusters.ward_clusters(torch.from_numpy(tokens), COUNTS)
        assert [m.shape for m in maps] == [tokens.shape[:2]] * len(COUNTS)
        assert (maps[1].ravel() == clusters.tree_clusters(points, COUNTS, linkage)[1]).all()


def test_the_largest_part_of_a_cluster_that_is_split_keeps_its_number(tokens):
    cuts = clusters.tree_clusters(tokens.reshape(-1, tokens.shape[-1]), COUNTS, "ward")
    assert (cuts[0] == 0).sum() >= (cuts[0] == 1).sum()
    for count, before, after in zip(COUNTS[1:], cuts, cuts[1:], strict=False):
        assert sorted(set(after.tolist())) == list(range(count))
        for label in range(before.max() + 1):
            parts, sizes = np.unique(after[before == label], return_counts=True)
            assert label in parts and sizes[parts == label] == sizes.max()
    # whatever the order in which numbers of clusters are given
    assert (clusters.tree_clusters(tokens.reshape(-1, 32), COUNTS[::-1], "ward")[2] == cuts[2]).all()


def test_fewer_points_than_clusters_and_points_alike():
    assert clusters.tree_clusters(np.zeros((1, 4)), [3], "ward")[0].tolist() == [0]
    assert clusters.tree_clusters(np.ones((6, 4)), [3], "average")[0].tolist() == [0] * 6
    assert sorted(clusters.tree_clusters(np.eye(2), [5], "ward")[0].tolist()) == [0, 1]


def test_variance_between_clusters_by_hand():
    points = np.array([[0.0], [2.0], [10.0], [12.0]])  # mean 6, squares 36 + 16 + 16 + 36; within: four times 1
    assert clusters.explained_share(points, np.array([0, 0, 1, 1])) == pytest.approx(1 - 4 / 104)
    assert clusters.explained_share(np.ones((3, 2)), np.zeros(3, np.int64)) == 1


def test_principal_colours_are_scikit_learns_components(tokens):
    points = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    components = PCA(3, svd_solver="full").fit_transform(points)
    colours = clusters.principal_colours(tokens).reshape(-1, 3)
    for channel in range(3):
        inside = (colours[:, channel] > 0) & (colours[:, channel] < 1)
        assert inside.mean() > 0.9
        assert abs(np.corrcoef(colours[inside, channel], components[inside, channel])[0, 1]) > 1 - 1e-6


def test_tsne_keeps_neighbours_together_and_takes_some_of_many(monkeypatch):
    monkeypatch.setattr(clusters, "TSNE_POINTS", 90)
    groups = np.repeat([0, 1, 2], 60)
    points = np.eye(8)[groups] * 9 + np.random.default_rng(0).normal(size=(180, 8))
    place, chosen = clusters.tsne_points(points.astype(np.float32))
    assert place.shape == (90, 2) and len(set(chosen.tolist())) == 90
    distance = np.linalg.norm(place[:, None] - place, axis=2) + np.eye(90) * 1e9
    assert (groups[chosen][distance.argmin(axis=1)] == groups[chosen]).mean() > 0.95


@pytest.mark.parametrize(("width", "height"), [(40, 23), (23, 40), (31, 31), (97, 200)])
@pytest.mark.parametrize("size", [16, 56])
def test_a_mask_is_seen_where_the_image_is(width, height, size):
    mask = np.random.default_rng(width).integers(0, 255, (height, width)).astype(np.uint8)
    short = min(width, height)
    resized = (size, int(size * height / short)) if width <= height else (int(size * width / short), size)
    left, top = (round((side - size) / 2) for side in resized)
    found = eval_mask(mask, size, size)
    rows, columns = ([math.floor(Fraction(2 * (start + i) + 1, 2) * side / of) for i in range(size)] for start, side, of
                     in ((top, height, resized[1]), (left, width, resized[0])))  # fmt: skip
    assert (found == mask[np.ix_(rows, columns)]).all()
    # Pillow's rounding errors fall to the other side where a pixel's centre is on the border of two
    pillow = Image.fromarray(mask).resize(resized, Image.Resampling.NEAREST)
    assert (found == np.array(pillow.crop((left, top, left + size, top + size)))).mean() > 0.9


# --- mIoU ------------------------------------------------------------------------------------------------------------


class ColourEncoder(torch.nn.Module):
    """Says of a patch its mean colour; stands for an encoder that tells regions apart."""

    patch_size, grid_size, blocks = 4, 7, (None,)

    def forward_intermediates(self, images, indices):
        mean = F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)
        return [torch.cat([mean[:, :1], mean], dim=1)]


RED, BLUE, GREEN = (220, 30, 30), (30, 30, 220), (30, 200, 30)


def write_pair(folder: Path, name: str, bands: list[tuple[int, tuple[int, int, int], int]], side: int = 56) -> None:
    """Write an image of bands (rows, colour, class) and its mask."""
    image, mask, top = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8), 0
    for rows, colour, number in bands:
        image[top : top + rows], mask[top : top + rows] = colour, number
        top += rows
    for part, content in (("images", image), ("masks", mask)):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(folder / part / f"{name}.png")


def measure(folder: Path, monkeypatch, **options) -> dict:
    config = Config()
    config.run.folder = str(folder / "run")
    Path(config.run.folder).mkdir(exist_ok=True)
    options = dict(images=str(folder / "images"), masks=str(folder / "masks"), size=56, pictures=0) | options
    for key, value in options.items():
        setattr(config.segment, key, value)
    monkeypatch.setattr(segment, "open_encoder", lambda *_: ColourEncoder())
    return segment.evaluate_checkpoint(config, folder, "online")


def test_miou_per_image_and_of_the_data_set(tmp_path, monkeypatch):
    # in `a` red is class 1, in `b` it is class 2: each image is told apart well, but not both by one clustering
    write_pair(tmp_path, "a", [(28, RED, 1), (28, BLUE, 2)])
    write_pair(tmp_path, "b", [(28, RED, 2), (28, BLUE, 1)])
    found = measure(tmp_path, monkeypatch, clusters=[2])
    assert found["miou_per_image"] == {"2": 1.0, "as_mask": 1.0} and found["classes"] == 2
    assert found["miou_data_set"] == pytest.approx(1 / 3, abs=1e-5)  # half of either class is the other's: 1 of 3
    # where colours mean the same in both, one clustering does for all
    write_pair(tmp_path, "b", [(12, GREEN, 7), (20, BLUE, 2), (24, RED, 1)])
    found = measure(tmp_path, monkeypatch, clusters=[3])
    assert found["miou_data_set"] == found["miou_per_image"]["as_mask"] == 1.0
    assert found["iou_by_class"] == {"1": 1.0, "2": 1.0, "7": 1.0} and found["images"] == 2
    assert found["explained"] == {"3": 1.0}


def test_clusters_that_are_too_few_cost_their_classes(tmp_path, monkeypatch):
    write_pair(tmp_path, "a", [(28, RED, 0), (16, (200, 30, 60), 1), (12, BLUE, 2)])
    found = measure(tmp_path, monkeypatch, clusters=[2])
    # red and nearly red fall together: 28 of 44 rows for class 0, none for class 1, all for class 2
    assert found["miou_per_image"]["2"] == pytest.approx((28 / 44 + 0 + 1) / 3, abs=1e-5)
    assert found["miou_per_image"]["as_mask"] == 1.0


def test_pixels_to_be_ignored_count_on_neither_side(tmp_path, monkeypatch):
    write_pair(tmp_path, "a", [(20, RED, 1), (8, RED, 255), (28, BLUE, 2)])
    assert measure(tmp_path, monkeypatch, clusters=[2])["miou_per_image"]["2"] == 1.0
    found = measure(tmp_path, monkeypatch, clusters=[2], ignore=-1)  # 255 is a class then, and gets no cluster
    assert found["miou_per_image"]["2"] == pytest.approx((20 / 28 + 0 + 1) / 3, abs=1e-5)


def test_masks_in_folders_wide_images_and_a_broken_one(tmp_path, monkeypatch, caplog):
    for name in ("cats/a", "dogs/a"):
        image, mask = np.zeros((56, 112, 3), np.uint8), np.full((56, 112), 5, np.uint8)
        image[:, :56], image[:, 56:], mask[:, 56:] = RED, BLUE, 6
        for part, content in (("images", image), ("masks", mask)):
            (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(tmp_path / part / f"{name}.png")
    (tmp_path / "images/cats/b.png").write_bytes(b"broken")
    found = measure(tmp_path, monkeypatch, clusters=[2], count=0)
    assert (found["images"], found["skipped"], found["miou_data_set"]) == (2, 1, 1.0)
    assert "skipped an image" in caplog.text


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Five embedded images with made-up masks: what is brighter than the mean."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    images = open_source("embedded:eval").images
    for number in range(5):
        (folder / f"images/{number}.png").write_bytes(images[number].read())
        grey = np.array(Image.open(folder / f"images/{number}.png").convert("L"))
        Image.fromarray((grey > grey.mean()).astype(np.uint8)).save(folder / f"masks/{number}.png")
    return folder


def command(weights: Path, folder: Path, *settings: str) -> list[str]:
    return ["eval", "segment", "configs/quickstart.yaml", *TINY, f"run.folder={folder}", "segment.size=28",
            "--checkpoint", str(weights), *settings]  # fmt: skip


@pytest.mark.launch
@pytest.mark.slow
def test_the_command_runs_alone_and_on_ranks_alike(weights, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    rows = []
    for ranks in (0, 2):
        folder = tmp_path / f"ranks{ranks}"
        folder.mkdir()
        arguments = command(weights, folder, f"segment.images={photos}/images", f"segment.masks={photos}/masks",
                            "segment.pictures=2", "segment.linkage=average")  # fmt: skip
        if ranks:
            launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", str(ranks), "--master-port",
                        str(free_port()), "-m", "lmim"]  # fmt: skip
            environment = process_environment() | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([*launcher, *arguments], cwd=REPOSITORY, env=environment, capture_output=True,
                                  text=True, timeout=250)  # fmt: skip
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        else:
            assert main(arguments) == 0
            printed = capsys.readouterr().out
        (row,) = read_results(folder)
        rows.append(row)
        assert row["pictures"] == ["segment/panels.png", "segment/0.png", "segment/1.png"]
        found = json.loads(printed.strip().splitlines()[-1])
        assert {key: found[key] for key in row["figures"]} == row["figures"]
        assert found["images"] == 5 and set(found["miou_per_image"]) == {"3", "4", "5", "as_mask"}
        for name in row["pictures"]:
            assert min(Image.open(folder / name).size) > 100
    assert rows[0]["figures"] == rows[1]["figures"]
    assert 0.2 < rows[0]["figures"]["miou_per_image"]["as_mask"] < 1


def test_shards_serve_as_images_and_pictures_go_anywhere(weights, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    settings = [f"data.eval={shards}/eval", "segment.count=3", "segment.clusters=[2,6]", "segment.layer=0"]
    settings += ["segment.size=56", f"segment.out={tmp_path}/pictures"]
    assert main(command(weights, tmp_path / "no-run", *settings)) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (found["images"], found["grid"], set(found["explained"])) == (3, 14, {"2", "6"})
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4 and "miou_data_set" not in found
    assert not (tmp_path / "no-run").exists()
    # rows of one image each lie below one another in the sheet
    tall, single = (Image.open(path).size for path in found["pictures"][:2])
    assert tall[0] == single[0] and tall[1] > 2.5 * single[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["segment.images=/nowhere"], ["segment.images (/nowhere) does not exist"]),
        (["segment.images={d}/masks", "segment.masks={d}/nowhere"], ["segment.masks", "nowhere) is no folder"]),
        (["segment.images={d}/images", "segment.masks={d}/other"], ["segment.masks", "0.png is missing"]),
        (["segment.images={d}/images", "segment.masks={d}/small"], ["0.png has 9 x 8 px", "28 x 28"]),
        (["segment.images={d}/empty"], ["segment.images", "holds no images"]),
        (["segment.images={d}/text.png"], ["text.png", "none of the 1 images that were chosen could be read"]),
        (["segment.images=", "data.eval="], ["segment.images and data.eval are empty"]),
        (["segment.size=30"], ["segment.size (30)", "28 or 32"]),
        (["segment.size=800"], ["segment.size (800) gives 40000 patches", "take up to 564"]),
        (["segment.layer=-3"], ["segment.layer (-3)", "-2 to 1"]),
        (["segment.linkage=wards"], ["segment.linkage (wards)", "ward, average"]),
        (["segment.clusters=[]"], ["segment.clusters is empty"]),
        (["segment.clusters=[0]"], ["segment.clusters", "above 0"]),
        (["segment.images={d}/images", "segment.masks={d}/void"], ["all pixels are 255", "segment.ignore"]),
    ],
)
def test_mistakes_end_in_one_line(weights, photos, tmp_path, capsys, monkeypatch, settings, words):
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree(photos, tmp_path / "d")
    for name in ("other", "small", "void", "empty"):
        (tmp_path / "d" / name).mkdir()
    for number in range(5):
        Image.new("L", (9, 8)).save(tmp_path / f"d/small/{number}.png")
        Image.new("L", (28, 28), 255).save(tmp_path / f"d/void/{number}.png")
    (tmp_path / "d/text.png").write_text("no image")
    filled = [setting.format(d=tmp_path / "d") for setting in settings]
    assert main(command(weights, tmp_path, "segment.pictures=0", *filled)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    for word in ["error: segment.", *words]:
        assert word in line, line
