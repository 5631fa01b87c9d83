"""Evaluations' rows are added one after another and read back; damage is named."""

from __future__ import annotations

from lmim.eval import results


def test_rows_are_added_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/lmim", "eval", "knn", "a folder", "eval.k=5"])
    for evaluation, accuracy in (("knn", 0.5), ("linear", 0.75)):
        results.record(tmp_path, evaluation, dict(accuracy=accuracy), source=tmp_path / "w.pth", which="online",
                       pictures=["a.png"])  # fmt: skip
    first, second = results.read_results(tmp_path)
    assert (first["evaluation"], second["evaluation"], second["figures"]) == ("knn", "linear", {"accuracy": 0.75})
    assert first["command"] == "lmim eval knn 'a folder' eval.k=5"
    assert (first["source"], first["which"], first["pictures"]) == (str(tmp_path / "w.pth"), "online", ["a.png"])


def test_a_damaged_line_is_named_and_left_out(tmp_path, caplog):
    results.record(tmp_path, "knn", {}, source="x", which="target")
    path = tmp_path / results.RESULTS_FILE
    path.write_text('{"evaluation": "kn\n[]\n' + path.read_text())
    assert [row["evaluation"] for row in results.read_results(tmp_path)] == ["knn"]
    assert "line 1 is damaged" in caplog.text and "line 2 is damaged" in caplog.text


def test_without_a_run_folder_nothing_is_written(tmp_path):
    results.record(tmp_path / "none", "knn", {}, source="x", which="online")
    assert not (tmp_path / "none").exists() and results.read_results(tmp_path / "none") == []
