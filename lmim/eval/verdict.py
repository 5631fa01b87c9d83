"""Is a run healthy? One judgement for each sign that is worth watching, and one of the whole.

Owns the ranges that count as healthy; where lmim.health has a limit, it is that one. The invariant: a sign that cannot
be judged (too early, not logged) is said to be unknown, never good.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmim.eval.curves import chance
from lmim.eval.history import History
from lmim.eval.svg import percent
from lmim.health import ALIKE, NEAR_CHANCE

GOOD, WATCH, BAD, UNKNOWN = "good", "watch", "bad", "unknown"
LAST_SHARE, LAST_AT_LEAST = 100, 10  # "now" is the mean of the last hundredth of the steps, and of ten at least
MOST_WAITING = 0.1  # of a step: beyond it, more loader workers would make the run faster
ACCURACY_AFTER = 0.5  # share of the run after which features should beat those of an untrained encoder


class Check(NamedTuple):
    """One sign: what was found, what is healthy, which of the four it is, and what to do or to know."""

    sign: str
    found: str
    healthy: str
    state: str
    words: str


class Verdict(NamedTuple):
    """The judgement of the whole run."""

    state: str
    words: str
    checks: list[Check]


def judge(history: History) -> Verdict:
    """Judge a run by its log, its evaluations and its alarms."""
    checks = [
        _loss(history),
        _similarity(history, "similarity_targets", "Targets within an image", "patches of an image look alike"),
        _similarity(history, "similarity_positions", "Targets across images, at the same position",
                    "targets tell their position and not their image"),
        _accuracy(history),
        _alarms(history),
        _skipped_steps(history),
        _unreadable(history),
        _waiting(history),
    ]  # fmt: skip
    bad = [check.sign for check in checks if check.state == BAD]
    watch = [check.sign for check in checks if check.state == WATCH]
    if bad:
        return Verdict(BAD, f"No. Look at: {_listed(bad)}.", checks)
    if checks[0].state == UNKNOWN:
        return Verdict(UNKNOWN, f"It cannot be told yet: {_listed([checks[0].words])}", checks)
    if watch:
        return Verdict(WATCH, f"Yes, with something to watch: {_listed(watch)}.", checks)
    return Verdict(GOOD, "Yes: every sign that can be judged is in its healthy range.", checks)


def now(history: History, key: str) -> float | None:
    """Return the mean of the last values of a column, None where there is none that is finite."""
    if key not in history.log:
        return None
    values = history.log[key][-max(LAST_AT_LEAST, len(history.log[key]) // LAST_SHARE) :]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def skipped_steps(history: History) -> int:
    """Return how many steps were left out, as their loss or gradient was not finite."""
    if not history.log:
        return 0
    finite = np.isfinite(history.log["loss"])
    if "grad_norm" in history.log:
        finite &= np.isfinite(history.log["grad_norm"])
    return int((~finite).sum())


def skipped_images(history: History) -> int:
    """Return how many images were skipped: the log's count begins anew with each start of the run."""
    if "skipped_images" not in history.log:
        return 0
    counts = np.nan_to_num(history.log["skipped_images"])
    again = np.flatnonzero(np.diff(counts) < 0)  # the last row of each start but the newest
    return int(counts[again].sum() + counts[-1])


def _listed(signs: list[str]) -> str:
    return "; ".join(sign[0].lower() + sign[1:] for sign in signs)


def _warming_up(history: History) -> bool:
    warmup = history.duration(history.config.optim.warmup) if history.config else None
    return history.done is None and warmup is not None and history.steps <= warmup


def _loss(history: History) -> Check:
    sign, level, value = "Loss", chance(history), now(history, "loss")
    if not history.log:
        return Check(sign, "–", "finite", UNKNOWN, "No step is logged yet.")
    if value is None:
        return Check(sign, "not finite", "finite", BAD, "The last steps have no finite loss: go on from an older "
                     "checkpoint with a lower optim.base_lr or with optim.clip_norm.")  # fmt: skip
    if level is None:
        return Check(sign, f"{value:.4f}", "finite", GOOD, "This loss has no chance level to compare with.")
    healthy = f"more than {percent(NEAR_CHANCE, 0)} below chance, {level:.3f}"
    if value < level * (1 - NEAR_CHANCE):
        return Check(sign, f"{value:.4f}", healthy, GOOD, "It may rise while accuracy grows, since the target moves.")
    if _warming_up(history):
        return Check(sign, f"{value:.4f}", healthy, UNKNOWN, "The learning rate is still warming up.")
    return Check(sign, f"{value:.4f}", healthy, BAD, "Predictions tell nothing: the model has collapsed or has not "
                 "begun to learn. Try a lower optim.base_lr or a longer optim.warmup.")  # fmt: skip


def _similarity(history: History, key: str, sign: str, meaning: str) -> Check:
    value, healthy = now(history, key), f"mean cosine below {ALIKE}"
    if value is None:
        return Check(sign, "–", healthy, UNKNOWN, "Not logged.")
    if value <= ALIKE:
        return Check(sign, f"{value:.3f}", healthy, GOOD, "")
    return Check(sign, f"{value:.3f}", healthy, BAD, f"Collapse: {meaning}. Try objective.similarity_weight=0.1, fewer "
                 "objective.num_visible or a larger model.patch_gap.")  # fmt: skip


def _accuracy(history: History) -> Check:
    sign, healthy = "Nearest-neighbour accuracy", "above the encoder as initialised"
    values = history.evals.get("knn_leave_one_out", np.zeros(0))
    values = values[np.isfinite(values)]
    if not len(values):
        return Check(sign, "–", healthy, UNKNOWN, "Not measured: it needs data.eval with labels, and eval.knn_every.")
    shares = {name: history.knn.get(name, {}).get("leave_one_out") for name in ("random", "pixels")}
    shares = {name: share for name, share in shares.items() if isinstance(share, (int, float))}
    if len(values) > 1 and history.evals["step"][0] < 0:
        shares["random"] = values[0]
    found, total = percent(values[-1]), history.total_steps
    if "random" not in shares:
        return Check(sign, found, healthy, UNKNOWN, "Nothing to compare with: run lmim eval knn.")
    beside = f"As initialised: {percent(shares['random'])}."
    if "pixels" in shares:
        beside += f" Raw pixels, which small centred images make strong: {percent(shares['pixels'])}."
    if values[-1] > shares["random"]:
        return Check(sign, found, healthy, GOOD, beside)
    if history.done is None and (total is None or history.evals["step"][-1] + 1 < ACCURACY_AFTER * total):
        return Check(sign, found, healthy, UNKNOWN, f"Too early in the run. {beside}")
    return Check(sign, found, healthy, WATCH, beside)


def _alarms(history: History) -> Check:
    sign, healthy, counts = "Alarms while training", "none", history.text.counts
    spikes, collapses = counts["spike"], counts["collapse"]
    if not spikes + collapses:
        return Check(sign, "none", healthy, GOOD if history.text.last else UNKNOWN,
                     "" if history.text.last else "train.log is missing.")  # fmt: skip
    kinds = ((spikes, "leap", "of the loss"), (collapses, "sign", "of collapse"))
    found = [f"{count} {word}{'s' * (count > 1)} {of}" for count, word, of in kinds if count]
    return Check(sign, ", ".join(found), healthy, WATCH, "What is true now is judged above; the alarms are listed "
                 "below.")  # fmt: skip


def _skipped_steps(history: History) -> Check:
    count, limit = skipped_steps(history), history.config.optim.max_skipped_steps if history.config else None
    healthy = "none" if limit is None else f"none; {limit} in a row end the run"
    if not history.log:
        return Check("Steps left out", "–", healthy, UNKNOWN, "No step is logged yet.")
    if not count:
        return Check("Steps left out", "none", healthy, GOOD, "")
    return Check("Steps left out", f"{count:,} of {len(history.log['step']):,}", healthy, WATCH, "Their loss or "
                 "gradient was not finite. Some amid a long run are harmless; more call for a lower optim.base_lr or "
                 "optim.clip_norm.")  # fmt: skip


def _unreadable(history: History) -> Check:
    sign, count = "Images that could not be read", max(skipped_images(history), history.unreadable.met)
    allowed = history.config.data.max_bad_fraction if history.config else None
    healthy = "none" if allowed is None else f"none; more than {percent(allowed)} end the run"
    if "skipped_images" not in history.log:
        return Check(sign, "–", healthy, UNKNOWN, "No step is logged yet.")
    if not count:
        return Check(sign, "none", healthy, GOOD, "")
    images = history.steps * history.config.data.global_batch if history.config else 0
    found = f"{count:,} of {images:,}" if images else f"{count:,}"
    return Check(sign, found, healthy, WATCH, "Each was replaced by the next image; unreadable/ names them. "
                 "tools/verify_shards.py tells what is damaged.")  # fmt: skip


def _waiting(history: History) -> Check:
    sign, healthy, value = (
        "Waiting for data",
        f"below {percent(MOST_WAITING, 0)} of the time",
        now(history, "data_wait"),
    )
    if value is None:
        return Check(sign, "–", healthy, UNKNOWN, "Not logged.")
    if value < MOST_WAITING:
        return Check(sign, percent(value), healthy, GOOD, "")
    return Check(sign, percent(value), healthy, WATCH, "The loader holds the run back: more data.workers, smaller "
                 "images (shard_images.py --short-side) or data.decoder=nvjpeg.")  # fmt: skip
