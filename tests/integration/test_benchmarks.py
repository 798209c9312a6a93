"""Every benchmark runs at its smallest size, and says what it should."""

from pathlib import Path

import pytest

from benchmarks import cifar10
from tests.conftest import LiveService


def test_cifar10(live_service: LiveService, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "DATA", data_dir)
    folders = cifar10.prepare(tmp_path, num_train=8, num_labelled=4, num_test=4)
    assert {name: len(list(folder.rglob("*.jpg"))) for name, folder in folders.items()} == {"train": 80, "labelled": 40, "test": 40}
    jobs = cifar10.compare(live_service.client, folders, epochs=2, finetune_epochs=2, batch_size=16)
    accuracy, *start_ups = cifar10.lines(live_service.client, jobs)
    assert accuracy["ours"] == jobs["finetune"]["metrics"]["val_accuracy"]
    assert accuracy["peer"] == jobs["scratch"]["metrics"]["val_accuracy"]
    assert [line["kind"] for line in start_ups] == ["pretrain", "finetune", "finetune"]
    for line in start_ups:
        stages = list(line["stages"].values())
        assert stages == sorted(stages)
        assert 0 < stages[0] < stages[-1] == line["value"]
