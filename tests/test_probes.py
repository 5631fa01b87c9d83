"""Probes against scikit-learn on real features, and what they may not depend on: ranks, batches, evaluation images."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from lmim.config import load_config
from lmim.data.datasets import Source, open_source
from lmim.data.sharding import write_shards
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval import attentive, fewshot, knn, linear
from lmim.eval.features import Features, Reading, Subject, check_readings, eval_sizes, extract
from lmim.vit import VisionTransformer
from tests.conftest import REPOSITORY
from tests.ranks import evaluations, result, run_jobs

ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")
PATCH_MEAN = Reading(1, "patch_mean")


def config_of(*settings: str):
    return load_config(REPOSITORY / "configs" / "quickstart.yaml", ["data.workers=0", *settings])


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Features, Features]:
    """Features of 8000 training and 2000 evaluation images of the embedded set by an untrained encoder."""
    folder = tmp_path_factory.mktemp("real")
    encoder = VisionTransformer(grid_size=7, patch_size=4, embed_dim=64, depth=2, num_heads=2, projector_depth=0)
    encoder.init_weights(0)
    subject, config, found = Subject("random", encoder.eval()), config_of(), []
    readings = check_readings([PATCH_MEAN, Reading(-1, "class_patch_mean")], subject, "eval.layer")
    for split, count in (("train", 8000), ("eval", 2000)):
        source = open_source(f"embedded:{split}")
        some = Source(source.name, source.classes, tuple(islice(source.images, count)), ())
        write_shards(some, folder / split, samples_per_shard=1000)
        index = ShardIndex.open(folder / split)
        found.append(extract(subject, readings, index, eval_sizes(config, encoder), config, ALONE))
    return found[0], found[1]


def unit_rows(features: torch.Tensor) -> np.ndarray:
    rows = features.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def test_neighbours_are_scikit_learns_on_real_features(real):
    """Those of another number lie no further away than rounding: ties, of which the lower number comes first."""
    gallery, queries = unit_rows(real[0].by(PATCH_MEAN)), unit_rows(real[1].by(PATCH_MEAN))
    search = NearestNeighbors(n_neighbors=20, algorithm="brute").fit(gallery)
    distances, expected = search.kneighbors(queries)
    cosines, numbers = knn.neighbours(real[1].by(PATCH_MEAN), real[0].by(PATCH_MEAN), 20)
    ours = np.linalg.norm(queries[:, None] - gallery[numbers.numpy()], axis=2)
    assert np.abs(ours - distances).max() < 20 * knn.TIE
    differ = numbers.numpy() != expected
    assert differ.mean() < 1e-3 and np.abs(ours - distances)[differ].max(initial=0) < knn.TIE
    assert cosines.numpy() == pytest.approx(1 - ours**2 / 2, abs=1e-9)


def test_accuracies_are_scikit_learns_on_real_features(real):
    train, test = real
    x, y = unit_rows(test.by(PATCH_MEAN)), test.labels.numpy()
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(x).kneighbors(return_distance=False)[:, 0]
    assert knn.leave_one_out(test.by(PATCH_MEAN), test.labels) == (y[nearest] == y).mean()
    shares = knn.gallery_of_each(test.by(PATCH_MEAN), test.labels, train.by(PATCH_MEAN), train.labels, ks=[1, 5, 20],
                                 temperature=0.07)  # fmt: skip
    for k, share in shares.items():
        vote = KNeighborsClassifier(k, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
        vote.fit(unit_rows(train.by(PATCH_MEAN)), train.labels.numpy())
        assert share == pytest.approx(vote.score(x, y), abs=1e-12)


def test_ties_go_to_the_lower_number_however_features_are_rounded():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(5, 16, generator=generator)
    gallery = points.repeat(20, 1)  # number n is point n mod 5
    for seed in range(3):
        noise = 1 + 1e-7 * torch.randn(gallery.shape, generator=torch.Generator().manual_seed(seed))
        numbers = knn.neighbours(points, gallery * noise, 3)[1]
        assert numbers.tolist() == [[n, n + 5, n + 10] for n in range(5)]


# --- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reading", [PATCH_MEAN, Reading(1, "class_patch_mean")])
def test_linear_probe_is_within_half_a_point_of_logistic_regression(real, reading):
    """Both as they come, on standardised features of all training images."""
    train, test = real
    found = linear.probe_features(train, test, [reading], config_of(), ALONE)
    scaler, theirs = StandardScaler().fit(train.by(reading).numpy()), LogisticRegression(max_iter=3000)
    theirs.fit(scaler.transform(train.by(reading).numpy()), train.labels.numpy())
    expected = theirs.score(scaler.transform(test.by(reading).numpy()), test.labels.numpy())
    assert 0.5 < expected < 0.9
    assert found["accuracy"] == pytest.approx(expected, abs=0.005)


def test_heads_trained_together_are_those_trained_alone(real):
    """Against torch's own layer, loss and SGD, head by head."""
    probe = config_of("probe.least_steps=40", "probe.epochs=1", "probe.weight_decay=0.01", "probe.batch=500").probe
    x, y = real[0].by(PATCH_MEAN)[:3000], real[0].labels[:3000]
    heads = linear.fit(x, y, 10, [0.01, 0.1], probe, 0, torch.device("cpu"))
    standard = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    for number, rate in enumerate((0.01, 0.1)):
        layer = torch.nn.Linear(64, 10)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        groups = [dict(params=[layer.weight], weight_decay=0.01), dict(params=[layer.bias])]
        solver = torch.optim.SGD(groups, lr=rate * 500 / 256, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 42)  # 7 epochs of 6 batches
        generator = torch.Generator().manual_seed(0)
        for _ in range(7):
            for rows in torch.randperm(len(x), generator=generator).split(500):
                solver.zero_grad()
                torch.nn.functional.cross_entropy(layer(standard[rows]), y[rows]).backward()
                solver.step()
                cosine.step()
        assert torch.allclose(heads.weights[:, number].T, layer.weight, atol=1e-4)
        assert torch.allclose(heads.biases[number], layer.bias, atol=1e-4)


def test_evaluation_images_choose_nothing(real):
    """With evaluation labels drawn anew the same head is chosen, by the same held-out accuracy."""
    train, test = real
    config = config_of("probe.least_steps=60", "probe.epochs=1")
    readings = [PATCH_MEAN, Reading(1, "class_patch_mean")]
    told = linear.probe_features(train, test, readings, config, ALONE)
    shuffled = test._replace(labels=test.labels[torch.randperm(len(test.labels))])
    blind = linear.probe_features(train, shuffled, readings, config, ALONE)
    assert [told[key] for key in ("held_out", "pooling", "learning_rate", "heads")] == [
        blind[key] for key in ("held_out", "pooling", "learning_rate", "heads")
    ]
    assert told["accuracy"] > 0.5 and blind["accuracy"] < 0.2
    best = min(told["heads"], key=lambda head: head["held_out_loss"])
    assert len(told["heads"]) == 2 * 7 and told["held_out"] == best["held_out"]
    assert (told["pooling"], told["learning_rate"]) == (best["pooling"], best["learning_rate"])


def test_a_head_that_diverges_is_not_chosen(real):
    config = config_of("probe.least_steps=60", "probe.epochs=1", "probe.batch_norm=false",
                       "probe.learning_rates=[1.0e+30,0.1]")  # fmt: skip
    found = linear.probe_features(*real, [PATCH_MEAN], config, ALONE)
    assert found["learning_rate"] == 0.1 and found["heads"][0]["held_out"] < found["heads"][1]["held_out"]
    assert found["heads"][0]["held_out_loss"] is None and found["heads"][1]["held_out_loss"] > 0


# --- few shots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 5, 20])  # fewer and more images than the features' width
def test_ridge_is_scikit_learns(real, shots):
    train, test = real
    places = fewshot.draw(train.labels.numpy(), shots, seed=3, trial=1)
    x, y = train.by(PATCH_MEAN)[places].double(), train.labels[places]
    weights, intercepts = fewshot.ridge(x, y, 10, 2.5)
    theirs = RidgeClassifier(alpha=2.5, solver="cholesky").fit(x.numpy(), y.numpy())
    assert np.abs(weights.T.numpy() - theirs.coef_).max() < 1e-4 * np.abs(theirs.coef_).max()
    assert np.abs(intercepts.numpy() - theirs.intercept_).max() < 1e-4
    regression = Ridge(alpha=2.5).fit(x.numpy(), 2 * np.eye(10)[y.numpy()] - 1)
    assert (x @ weights + intercepts).numpy() == pytest.approx(regression.predict(x.numpy()), abs=1e-4)
    # and with the features standardised, as the command does
    probe = config_of("probe.l2=2.5").probe
    scaler = StandardScaler().fit(x.numpy())
    expected = RidgeClassifier(alpha=2.5).fit(scaler.transform(x.numpy()), y.numpy())
    queries = test.by(PATCH_MEAN)
    got = fewshot.predict(x, y, queries, 10, probe)
    assert (got.numpy() == expected.predict(scaler.transform(queries.double().numpy()))).all()


def test_logistic_regression_is_scikit_learns(real):
    train = real[0]
    places = fewshot.draw(train.labels.numpy(), 5, seed=0, trial=0)
    x, y = train.by(PATCH_MEAN)[places].double(), train.labels[places]
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    weights, intercepts = fewshot.logistic(x, y, 10, 2.0)
    theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=5000).fit(x.numpy(), y.numpy())
    assert np.abs(weights.T.numpy() - theirs.coef_).max() < 1e-3
    ours, expected = (x @ weights + intercepts).softmax(dim=1).numpy(), theirs.predict_proba(x.numpy())
    assert ours == pytest.approx(expected, abs=1e-4)


def test_draws_are_balanced_nested_and_different():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    few, many = (fewshot.draw(labels, shots, seed=1, trial=2) for shots in (2, 7))
    assert np.bincount(labels[many]).tolist() == [7] * 4 and len({*many}) == 28
    assert {*few} < {*many}
    assert {*few} != {*fewshot.draw(labels, 2, seed=1, trial=3)} != {*fewshot.draw(labels, 2, seed=2, trial=3)}
    assert (fewshot.draw(labels, 2, seed=1, trial=2) == few).all()


def test_the_interval_is_scipys():
    for freedom in (1, 2, 3, 4, 9, 30, 1000):
        assert fewshot.student_t(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=0.01)
    values = [0.5, 0.6, 0.55, 0.7, 0.52]
    low, high = scipy.stats.t.interval(0.95, 4, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert fewshot.interval(values) == pytest.approx((high - low) / 2, rel=0.01)
    assert fewshot.interval([0.5]) == 0


# --- attentive -------------------------------------------------------------------------------------------------------


def test_the_attentive_probe_is_attention_by_hand():
    probe = attentive.AttentiveProbe(8, 2, 3)
    for name, parameter in probe.named_parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    tokens = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    x, attn = probe.norm_tokens(tokens), probe.attn
    k, v = (x @ attn.kv_proj.weight.T + attn.kv_proj.bias).split(8, dim=-1)
    q = probe.cls_token[0, 0] @ attn.q_proj.weight.T + attn.q_proj.bias
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        shares = (k[..., part] @ q[part] / 2).softmax(dim=1)  # a head is 4 wide
        heads.append((shares[..., None] * v[..., part]).sum(dim=1))
    expected = probe.head(probe.norm(attn.proj(torch.cat(heads, dim=1))))
    assert torch.allclose(probe(tokens), expected, atol=1e-5)


# --- ranks and batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_ranks(shards, tmp_path_factory):
    """All evaluations by one rank with two batch sizes, and by two and four."""
    base = [f"data.train={shards}/train", f"data.eval={shards}/eval", "eval.k=[1,20]"]
    found = {}
    for name, settings in (("1", []), ("1, batches of 7", ["eval.batch=7"]),
                           ("1, tokens not kept", ["eval.batch=31", "probe.memory_gb=1.0e-9"])):  # fmt: skip
        found[name] = evaluations([*base, *settings], ALONE)
    for ranks, batch in ((2, 250), (4, 9)):
        folder = tmp_path_factory.mktemp("ranks")
        run_jobs(ranks, [dict(do="evaluations", name="x", settings=[*base, f"eval.batch={batch}"])], folder)
        found |= {f"{ranks}, rank {rank}": result(folder, "x", rank) for rank in range(ranks)}
    return found


@pytest.mark.slow
def test_nothing_depends_on_ranks_or_batches(by_ranks):
    reference = by_ranks["1"]
    assert reference["ids"].tolist() == list(range(300))  # once each, in order
    assert 0.2 < reference["leave_one_out"] < 1 and set(reference) > {"gallery_1", "gallery_20", "fewshot", "linear"}
    for name, found in by_ranks.items():
        assert found["ids"].tolist() == list(range(300)), name
        for key in ("leave_one_out", "gallery_1", "gallery_20"):
            assert found[key] == reference[key], (name, key)
        for key in ("fewshot", "linear", "attentive"):
            assert found[key] == pytest.approx(reference[key], abs=1e-4), (name, key)


@pytest.mark.slow
def test_fewer_images_than_ranks(by_ranks):
    alone = by_ranks["1"]["few"]
    assert len(by_ranks) == 3 + 2 + 4
    for found in by_ranks.values():
        assert found["few ids"].tolist() == [0, 1, 2] and torch.allclose(found["few"], alone, atol=1e-6)
