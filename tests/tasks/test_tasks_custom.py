import csv
import sys
from pathlib import Path

import pytest
import torch

from p2pfl.tasks import auroc, load_task

NAME = "custom_task:stroke"


@pytest.fixture(autouse=True)
def examples_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(Path(__file__).parents[2] / "examples")


def test_the_example_runs_without_data_on_invented_patients():
    task = load_task(NAME, allow_tasks=[NAME])

    assert [site.name for site in task.sites] == ["hospital-a", "hospital-b", "hospital-c"]
    assert all(len(site.train[0]) == 150 and len(site.test[0]) == 50 for site in task.sites)
    assert all(0 < float(site.test[1].mean()) < 1 for site in task.sites)
    assert task.notes == ()


def test_the_example_can_be_learnt():
    task = load_task(NAME, allow_tasks=[NAME])
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, targets = task.sites[0].train
    for _ in range(200):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()

    assert auroc(model(task.sites[0].test[0]).detach(), task.sites[0].test[1]) > 0.7


def test_the_example_reads_one_table_a_hospital(tmp_path):
    header = ["stroke", "age", "systolic_pressure", "diabetes", "atrial_fibrillation"]
    for name in ("ucl", "charite"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *[[i % 2, 50 + i, 120 + i, int(i % 3 == 0), 0] for i in range(8)]])
    task = load_task(NAME, allow_tasks=[NAME], data=str(tmp_path))

    assert [site.name for site in task.sites] == ["charite", "ucl"]
    assert task.sites[0].test[1].flatten().tolist() == [0.0, 0.0]
    assert task.sites[0].groups == {"decade": [50, 50]}
