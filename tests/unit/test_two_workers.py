"""Two processes, one group (gloo): what they see together is what one worker sees."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core.options import ARCH_SIZES
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, corrupt, image_folder
from tests.unit.two_workers import outcome, scenarios

PROJECT = Path(__file__).parents[2]
LIKE_ONE = [
    *("pretrain", "pretrain-accumulated", "pretrain-sharded", "pretrain-cheap", "pretrain-evaluated"),
    *("finetune", "finetune-augmented", "finetune-sharded", "finetune-last", "corrupt", "probe-augmented"),
]
SCENARIOS = [*LIKE_ONE, "probe", "too-corrupt", "diverged", "stopped", "poisoned", "poisoned-sharded", "blind-sharded"]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `SCENARIO-RANK.pt`, what both workers saw."""
    folder = tmp_path_factory.mktemp("two-workers")
    image_folder(folder / "images")
    image_folder(folder / "corrupt")
    corrupt(folder / "corrupt" / "cat" / "003.png")
    corrupt(folder / "corrupt" / "dog" / "006.png")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.two_workers"]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return folder


def seen_by_both(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1))
    return first, second


def seen_alone(folder: Path, name: str) -> dict[str, Any]:
    return outcome(scenarios(folder, num_workers=1)[name], world=World(), stop_asked_by=None)


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_workers_see_the_same(folder: Path, name: str) -> None:
    first, second = seen_by_both(folder, name)
    weights, others = first.pop("weights"), second.pop("weights")
    first.pop("exported", None)  # by the first one alone
    assert repr(first) == repr(second)  # also where a loss is not a number
    assert weights.keys() == others.keys()
    assert weights
    assert [key for key in weights if not torch.equal(weights[key], others[key]) and not weights[key].isnan().any()] == []


@pytest.mark.parametrize("name", LIKE_ONE)
def test_two_workers_have_the_losses_of_one(folder: Path, name: str) -> None:
    both, alone = seen_by_both(folder, name)[0], seen_alone(folder, name)
    kind = name.partition("-")[0]
    assert len(alone["losses"]) == (16 if name == "pretrain-cheap" else {"finetune": 4, "probe": 4}.get(kind, 8))
    assert both["losses"].keys() == alone["losses"].keys()
    assert list(both["losses"].values()) == pytest.approx(list(alone["losses"].values()), rel=1e-5)
    assert both["evaluated"] == alone["evaluated"]
    assert set(both["skipped"]) == set(alone["skipped"])


def test_two_workers_probe_like_one(folder: Path) -> None:
    both, alone = seen_by_both(folder, "probe")[0], seen_alone(folder, "probe")
    assert both["evaluated"] == alone["evaluated"]
    assert len(both["evaluated"]) == 2
    assert list(both["losses"].values()) == pytest.approx(list(alone["losses"].values()), rel=1e-5)
    for place, weight in alone["weights"].items():
        torch.testing.assert_close(both["weights"][place], weight, rtol=1e-4, atol=1e-6)


def test_a_sharded_autoencoder_is_exported_whole(folder: Path) -> None:
    seen = seen_by_both(folder, "pretrain-sharded")[0]
    trained = {name.removeprefix("module.").removeprefix("encoder."): tensor for name, tensor in seen["weights"].items()}
    assert trained.keys() == seen["exported"].keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in seen["exported"].items())


@pytest.mark.parametrize("name", ["poisoned", "poisoned-sharded"])
def test_a_loss_that_is_not_finite_on_one_rank_drops_the_step_on_all(folder: Path, name: str) -> None:
    seen = seen_by_both(folder, name)[0]
    assert seen["dropped"] == [(3, 1)]
    assert [step for step, loss in seen["losses"].items() if loss != loss] == [3]
    untouched = seen_by_both(folder, "pretrain")[0]["losses"]
    assert [seen["losses"][step] for step in (1, 2)] == pytest.approx([untouched[step] for step in (1, 2)], rel=1e-5)
    assert seen["losses"][8] != untouched[8]


def test_only_sharded_runs_are_sharded(folder: Path) -> None:
    sharded = {name for name in SCENARIOS if seen_by_both(folder, name)[0].get("sharded")}
    assert sharded == {"pretrain-sharded", "pretrain-evaluated", "finetune-sharded", "poisoned-sharded", "blind-sharded"}


def test_sharded_and_checkpointed_runs_have_the_losses_of_replicated_ones(folder: Path) -> None:
    sharded, replicated = (seen_by_both(folder, name)[0]["losses"] for name in ("pretrain-sharded", "pretrain-accumulated"))
    assert list(sharded.values()) == pytest.approx(list(replicated.values()), rel=1e-5)
    sharded, replicated = (seen_by_both(folder, name)[0]["losses"] for name in ("finetune-sharded", "finetune"))
    assert list(sharded.values()) == pytest.approx(list(replicated.values()), rel=1e-5)


def test_evaluations_while_pretraining_disturb_nothing(folder: Path) -> None:
    evaluated, silent = (seen_by_both(folder, name)[0] for name in ("pretrain-evaluated", "pretrain"))
    assert [list(each) for each in evaluated["evaluated"]] == [["knn_accuracy", "probe_accuracy"]] * 2
    assert silent["evaluated"] == []
    assert list(evaluated["losses"].values()) == pytest.approx(list(silent["losses"].values()), rel=1e-5)


def test_an_unreadable_image_of_either_worker_is_told_once(folder: Path) -> None:
    assert sorted(seen_by_both(folder, "corrupt")[0]["skipped"]) == ["cat/003.png", "dog/006.png"]


def test_both_workers_end_together(folder: Path) -> None:
    assert seen_by_both(folder, "too-corrupt")[0]["error"].startswith("DataError: data: ")
    diverged = seen_by_both(folder, "diverged")[0]["error"]
    assert diverged.startswith("DivergedError: 2 step(s) in a row had no finite loss or gradient")
    assert ", of rank 0, images " in diverged
    stopped = seen_by_both(folder, "stopped")[0]
    assert (stopped["stopped"], list(stopped["losses"]), stopped["evaluated"]) == (True, [1], [])
