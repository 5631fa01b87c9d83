"""Label propagation against DINO's dense statement of it, on made-up videos; the folder layout and its mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from lmim.__main__ import main
from lmim.dist import discover
from lmim.eval import davis
from lmim.eval.masks import read_mask, write_mask
from lmim.eval.results import read_results
from lmim.objective import LatentMIM
from lmim.options import Config, DavisConfig
from tests.conftest import REPOSITORY, TINY, free_port, process_environment
from tests.ranks import tiny_config

HEIGHT, WIDTH, SIDE, FRAMES = 64, 128, 16, 7
COLOURS = ((200, 40, 40), (40, 60, 210))


def make_data_set(folder: Path, videos: tuple[str, ...] = ("one", "two"), objects: int = 2) -> Path:
    """Write videos of squares that move over a ramp of grey, with their masks, in DAVIS's layout."""
    for part in ("JPEGImages/480p", "Annotations/480p", "ImageSets/2017"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_text("\n".join(videos) + "\n")
    for which, name in enumerate(videos):
        for kind in ("JPEGImages", "Annotations"):
            (folder / kind / "480p" / name).mkdir()
        for number in range(FRAMES):
            image = np.tile(np.linspace(90, 160, WIDTH).astype(np.uint8)[None, :, None], (HEIGHT, 1, 3))
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            for one in range(objects):
                top, left = 4 + 28 * one + number, 8 + (3 + which) * number + 16 * one
                image[top : top + SIDE, left : left + SIDE] = COLOURS[one]
                mask[top : top + SIDE, left : left + SIDE] = one + 1
            Image.fromarray(image).save(folder / f"JPEGImages/480p/{name}/{number:05d}.jpg", quality=95)
            write_mask(folder / f"Annotations/480p/{name}/{number:05d}.png", mask)
    return folder


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("davis") / "DAVIS")


def colour_features(image: torch.Tensor, patch: int = 2) -> torch.Tensor:
    """Return the mean colour of every patch, its middle grey taken off, in place of an encoder's tokens."""
    mean = F.avg_pool2d(image.float()[None], patch)[0].permute(1, 2, 0)
    return torch.cat([mean - mean.mean(dim=2, keepdim=True), torch.full_like(mean[..., :1], 40)], dim=2)


def dense_propagation(features: list[torch.Tensor], first: torch.Tensor, o: DavisConfig) -> list[torch.Tensor]:
    """Return DINO's soft labels: the whole affinity of every frame, and a mask for the neighbourhood, in fp64."""
    h, w, _ = features[0].shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    near = ((y.reshape(-1, 1) - y.reshape(1, -1)).abs() <= o.neighbourhood) & (
        (x.reshape(-1, 1) - x.reshape(1, -1)).abs() <= o.neighbourhood
    )
    flat = [F.normalize(frame.double().reshape(h * w, -1), dim=1) for frame in features]
    labels = [first.double().flatten(1)]
    for number in range(1, len(features)):
        used = [0, *range(max(1, number - o.past_frames), number)]
        affinity = torch.cat([torch.exp(flat[i] @ flat[number].T / o.temperature) * (near.T if o.neighbourhood else 1)
                              for i in used])  # fmt: skip
        least = affinity.topk(o.top_k, dim=0).values[-1]
        affinity[affinity < least] = 0
        affinity = affinity / affinity.sum(dim=0, keepdim=True)
        labels.append(torch.cat([labels[i] for i in used], dim=1) @ affinity)
    return [of.reshape(-1, h, w) for of in labels[1:]]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(neighbourhood=2), dict(neighbourhood=1, top_k=40), dict(neighbourhood=0), dict(past_frames=0),
     dict(past_frames=2, top_k=1, temperature=0.7), dict(neighbourhood=3, temperature=0.01)],
)  # fmt: skip
def test_propagation_is_the_dense_statement(options):
    config = DavisConfig(**options)
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(6, 11, 8, generator=draw)
    frames = [base.roll(i, 1) + 0.7 * torch.randn(6, 11, 8, generator=draw) for i in range(11)]
    first = F.one_hot(torch.randint(0, 3, (6, 11), generator=draw), 3).permute(2, 0, 1).float()
    found = list(davis.propagate(iter(frames), first, config))
    expected = dense_propagation(frames, first, config)
    assert len(found) == len(expected) == 10
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=0)
    assert min((ours.sum(0) - 1).abs().max() for ours in found) < 1e-5


def test_frames_are_read_one_by_one_and_few_are_kept():
    """The features of frame n are asked for after the labels of frame n − 1 were taken, and old frames are let go."""
    alive = []

    def features():
        for _ in range(30):
            frame = torch.rand(4, 4, 3)
            alive.append(weakref.ref(frame))
            yield frame

    for number, _ in enumerate(davis.propagate(features(), torch.ones(1, 4, 4), DavisConfig(past_frames=3)), start=1):
        assert len(alive) == number + 1 and sum(ref() is not None for ref in alive) <= 3


def test_a_moving_square_is_followed(data_set, tmp_path):
    config = Config(davis=DavisConfig(folder=str(data_set), short_side=HEIGHT))
    config.run.folder = str(tmp_path)
    videos = davis.find_videos(config.davis)
    figures = davis.evaluate(config, videos, colour_features, 2, discover(), source=tmp_path, which="online")
    assert (figures["videos"], figures["frames"], figures["objects"]) == (2, 2 * FRAMES, 4)
    assert figures["J_mean"] > 0.9 and figures["F_mean"] > 0.95 and figures["J_recall"] == 1
    assert abs(figures["J_decay"]) < 0.1
    assert figures["J&F"] == pytest.approx((figures["J_mean"] + figures["F_mean"]) / 2, abs=1e-5)
    assert figures["J&F"] == pytest.approx(np.mean(list(figures["by_video"].values())), abs=1e-4)
    written = sorted(str(p.relative_to(tmp_path / "davis")) for p in (tmp_path / "davis").rglob("*.png"))
    assert written == [f"{name}/{number:05d}.png" for name in ("one", "two") for number in range(FRAMES)]
    last, truth = (read_mask(f / f"one/{FRAMES - 1:05d}.png", "x") for f in (tmp_path / "davis",
                                                                           data_set / "Annotations/480p"))  # fmt: skip
    assert last.shape == (HEIGHT, WIDTH) and (last != truth).mean() < 0.02
    assert (read_mask(tmp_path / "davis/one/00000.png", "x") == read_mask(
        data_set / "Annotations/480p/one/00000.png", "x")).all()  # fmt: skip
    assert Image.open(tmp_path / "davis/one/00003.png").mode == "P"
    (row,) = read_results(tmp_path)
    assert row["evaluation"] == "davis" and row["figures"]["J&F"] == figures["J&F"]


def test_features_that_say_nothing_do_badly(data_set, tmp_path):
    config = Config(davis=DavisConfig(folder=str(data_set), short_side=HEIGHT))

    def blank(image: torch.Tensor) -> torch.Tensor:
        noise = torch.Generator().manual_seed(int(image.sum()))
        return torch.rand(HEIGHT // 2, WIDTH // 2, 16, generator=noise)

    video = davis.find_videos(config.davis)[0]
    done = davis.evaluate_video(video, blank, 2, config.davis, torch.device("cpu"), tmp_path)
    assert np.mean([one["J"]["mean"] for one in done.objects]) < 0.4


def test_input_sizes_are_dinos():
    assert davis.input_size((480, 854), 480, 8) == davis.input_size((480, 854), 480, 16) == (480, 832)
    assert davis.input_size((854, 480), 480, 16) == (832, 480)
    assert davis.input_size((480, 910), 480, 16) == (480, 896)
    assert davis.input_size((480, 854), 480, 14) == (476, 840)  # 64 is no multiple of 14, so the patch itself
    assert davis.input_size((100, 100), 480, 16) == (480, 480)


def test_first_labels_are_the_nearest_pixels_and_void_is_background():
    mask = np.zeros((8, 12), np.uint8)
    mask[:4, 4:8], mask[4:, 8:] = 2, 255
    labels = davis.first_labels(mask, (2, 3))
    assert labels.shape == (3, 2, 3)
    assert labels.argmax(0).tolist() == [[0, 2, 0], [0, 0, 0]]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An encoder as initialised, in a file that does not tell its heads."""
    config = tiny_config([])
    model = LatentMIM(config.model, config.objective)
    model.init_weights(3)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def command(weights: Path, folder: Path, data_set: Path, *settings: str) -> list[str]:
    return ["eval", "davis", "configs/quickstart.yaml", *TINY, f"run.folder={folder}", f"davis.folder={data_set}",
            f"davis.short_side={HEIGHT}", "--checkpoint", str(weights), *settings]  # fmt: skip


@pytest.mark.launch
@pytest.mark.slow
def test_the_command_runs_alone_and_on_ranks_alike(weights, data_set, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    figures, masks = [], []
    for ranks in (0, 3):  # more ranks than videos: one has nothing to do
        folder = tmp_path / f"ranks{ranks}"
        folder.mkdir()
        arguments = command(weights, folder, data_set, f"davis.out={folder}/masks")
        if ranks:
            launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", str(ranks), "--master-port",
                        str(free_port()), "-m", "lmim"]  # fmt: skip
            done = subprocess.run([*launcher, *arguments], cwd=REPOSITORY, env=process_environment() | {
                "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250)  # fmt: skip
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        else:
            assert main(arguments) == 0
            printed = capsys.readouterr().out
        figures.append(json.loads(printed.strip().splitlines()[-1]))
        assert read_results(folder)[0]["figures"] == figures[-1]
        masks.append({str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "masks").rglob("*.png"))})
    assert figures[0] == figures[1] and masks[0] == masks[1] and len(masks[0]) == 2 * FRAMES
    assert 0.05 < figures[0]["J&F"] <= 1


def test_without_later_annotations_masks_are_written_and_nothing_is_measured(weights, data_set, tmp_path, capsys,
                                                                             monkeypatch):  # fmt: skip
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree(data_set, tmp_path / "d")
    for path in (tmp_path / "d/Annotations/480p").glob("*/0000[1-9].png"):
        path.unlink()
    assert main(command(weights, tmp_path, tmp_path / "d")) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert "nothing is measured" in printed[-2] and "J&F" not in json.loads(printed[-1])
    assert len(list((tmp_path / "davis").rglob("*.png"))) == 2 * FRAMES


def _remove(path: str):
    return lambda folder: (folder / path).unlink()


def _empty_list(folder: Path) -> None:
    (folder / "ImageSets/2017/val.txt").write_text("\n")


def _larger(path: str):
    return lambda folder: Image.open(folder / path).resize((50, 40)).save(folder / path)


def _no_object(folder: Path) -> None:
    write_mask(folder / "Annotations/480p/one/00000.png", np.zeros((HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("JPEGImages/480p/two/00003.jpg"), ["video two lacks the frame", "00003.jpg", "00004.jpg"]),
        (_remove("JPEGImages/480p/one/00006.jpg"), ["lacks the frame", "one/00006.jpg, of which"]),  # the last
        (_remove("Annotations/480p/two/00000.png"), ["video two lacks its first annotation", "00000.png"]),
        (_remove("Annotations/480p/one/00004.png"), ["video one lacks the annotation", "00004.png"]),
        (_larger("Annotations/480p/one/00002.png"), ["00002.png has 50 x 40 px", "128 x 64"]),
        (_larger("JPEGImages/480p/one/00005.jpg"), ["00005.jpg has 50 x 40 px", "128 x 64"]),
        (_no_object, ["one/00000.png marks no object"]),
        (lambda f: (f / "ImageSets/2017/val.txt").write_bytes(b"\xff\xfe"), ["has no folder"]),
        (_empty_list, ["davis.split (val)", "names no video"]),
        (lambda f: shutil.rmtree(f / "JPEGImages/480p/two"), ["video two has no folder"]),
        (lambda f: shutil.rmtree(f / "Annotations"), ["no such folder", "Annotations/480p"]),
        (lambda f: (f / "ImageSets/2017/val.txt").rename(f / "ImageSets/2017/train.txt"),
         ["davis.split (val)", "there are: train"]),
        (lambda f: (f / "JPEGImages/480p/one/00002.jpg").write_bytes(b"no image"), ["00002.jpg is no image"]),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(weights, data_set, tmp_path, capsys, monkeypatch, damage, words):
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree(data_set, tmp_path / "d")
    damage(tmp_path / "d")
    assert main(command(weights, tmp_path, tmp_path / "d")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in ["error: davis.", *words]:
        assert word in line, line


@pytest.mark.parametrize(
    ("setting", "words"),
    [("davis.folder=", "davis.folder is empty"), ("davis.folder=/nowhere", "no such folder: /nowhere"),
     ("davis.layer=2", "davis.layer (2) must be one of the encoder's 2 blocks: -2 to 1"),
     ("davis.top_k=0", "davis.top_k (0) must be above 0"), ("davis.past_frames=-1", "must be 0 or above")],
)  # fmt: skip
def test_options_that_cannot_be(weights, data_set, tmp_path, capsys, monkeypatch, setting, words):
    monkeypatch.chdir(REPOSITORY)
    assert main(command(weights, tmp_path, data_set, setting)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
