import os

import numpy as np
import pytest
import torch

from p2pfl.errors import ConfigError, DataError
from p2pfl.params import Layout
from p2pfl.tasks import hold_out, load_task

pytestmark = pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no heart-disease files")

# age, sex, cp, trestbps, chol, fbs, restecg, thalach, exang, oldpeak
PATIENT = [63, 1, 4, 145, 233, 1, 2, 150, 0, 2.3]


def test_the_four_hospitals_have_the_protocols_rows():
    sizes = {site.name: (len(site.train[0]), len(site.test[0])) for site in load_task("heart-disease").sites}

    assert sizes == {"cleveland": (199, 104), "hungary": (172, 89), "switzerland": (30, 16), "va": (85, 45)}


def test_majority_classes_are_as_published():
    shares = [float(site.test[1].mean()) for site in load_task("heart-disease").sites]

    assert [round(max(share, 1 - share), 3) for share in shares] == [0.538, 0.629, 0.938, 0.778]
    assert sum(int((site.test[1] == 0).sum()) for site in load_task("heart-disease").sites if site.name == "switzerland") == 1
    assert load_task("heart-disease").notes == ()


def test_the_split_does_not_follow_the_seed():
    for one, other in zip(load_task("heart-disease", seed=1).sites, load_task("heart-disease", seed=2).sites, strict=True):
        assert torch.equal(one.test[0], other.test[0])


def test_the_model_has_13_weights_and_a_bias():
    assert Layout.of(load_task("heart-disease").model()).size == 14


def test_features_are_standardised_by_site():
    for site in load_task("heart-disease").sites:
        inputs = site.train[0].double()
        deviation = inputs.std(0, correction=1)
        constant = deviation == 0

        torch.testing.assert_close(inputs.mean(0), torch.zeros(13, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(deviation[~constant], torch.ones(int((~constant).sum()), dtype=torch.float64), atol=1e-6, rtol=0)
        # every cholesterol value of Switzerland is 0
        assert bool(constant[3]) == (site.name == "switzerland")


def test_features_are_standardised_by_all_hospitals_together():
    inputs = torch.cat([site.train[0] for site in load_task("heart-disease", standardise="pooled").sites]).double()

    torch.testing.assert_close(inputs.mean(0), torch.zeros(13, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.std(0, correction=1), torch.ones(13, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_first_patient_of_cleveland_is_prepared_as_by_hand():
    # a patient and the same one with chest pain 1 and normal electrocardiogram differ in the columns of levels alone: cp_4 and restecg_2
    cleveland = load_task("heart-disease").sites[0]
    other = [*PATIENT]
    other[2], other[6] = 1, 0
    one, another = cleveland.prepare(np.array([PATIENT, other]))

    assert (one != another).nonzero().flatten().tolist() == [10, 12]
    assert load_task("heart-disease").features == (
        "age",
        "sex",
        "cp",
        "trestbps",
        "chol",
        "fbs",
        "restecg",
        "thalach",
        "exang",
        "oldpeak",
    )


def test_a_level_that_does_not_exist_is_named():
    strange = [*PATIENT]
    strange[2] = 5

    with pytest.raises(DataError, match="row 1, cp = 5: one of 1, 2, 3, 4"):
        load_task("heart-disease").sites[0].prepare(np.array([PATIENT, strange]))


def test_all_levels_that_do_not_exist_are_named_at_once():
    rows = np.array([PATIENT, PATIENT, PATIENT], dtype=float)
    rows[2, 2], rows[1, 6], rows[1, 2] = 0, 3, 9
    with pytest.raises(DataError) as caught:
        load_task("heart-disease").sites[0].prepare(rows)

    assert caught.value.findings == (
        "row 1, cp = 9: one of 1, 2, 3, 4",
        "row 1, restecg = 3: one of 0, 1, 2",
        "row 2, cp = 0: one of 1, 2, 3, 4",
    )


def test_all_values_that_are_not_finite_are_named_at_once():
    rows = np.array([PATIENT, PATIENT], dtype=float)
    rows[0, 4] = rows[1, 0] = np.nan
    with pytest.raises(DataError) as caught:
        load_task("heart-disease").sites[0].prepare(rows)

    assert caught.value.findings == ("row 0, chol = nan: expected a finite number", "row 1, age = nan: expected a finite number")


def test_groups_are_sex_and_age_band_of_the_test_rows():
    cleveland = load_task("heart-disease").sites[0]
    sex = np.array(cleveland.groups["sex"])
    # standardised sex takes two values, the larger for 1, which is male
    male = cleveland.test[0][:, 1] > 0

    assert set(cleveland.groups) == {"sex", "age"}
    assert (sex == np.where(male.numpy(), "male", "female")).all()
    assert set(cleveland.groups["age"]) == {"under 45", "45 to 54", "55 to 64", "65 and over"}


def test_one_hospital_alone_is_what_it_is_among_four():
    four, one = load_task("heart-disease").sites[2], load_task("heart-disease", hospitals=["switzerland"]).sites[0]

    assert torch.equal(four.train[0], one.train[0])
    assert torch.equal(four.test[1], one.test[1])


def test_all_740_patients_can_be_shared_out_otherwise():
    task = load_task("heart-disease", nodes=6, partition={"name": "iid"}, seed=2)

    assert [site.name for site in task.sites] == [f"hospital-{i}" for i in range(6)]
    assert sum(len(site.train[0]) + len(site.test[0]) for site in task.sites) == 740
    assert all(len(site.groups["age"]) == len(site.test[0]) for site in task.sites)


def test_held_out_rows_come_from_the_training_rows():
    held = {site.name: hold_out(site, 0.25, seed=42) for site in load_task("heart-disease").sites}
    counts = {name: (len(site.train[0]), site.test[1].flatten().long().bincount(minlength=2).tolist()) for name, site in held.items()}

    # Switzerland's only negative patient is a test patient, so that no AUROC can be had from what it trains on
    assert counts == {"cleveland": (149, [27, 23]), "hungary": (129, [27, 16]), "switzerland": (22, [0, 8]), "va": (64, [5, 16])}


def test_what_cannot_be_is_refused_by_key_all_at_once():
    with pytest.raises(ConfigError) as caught:
        load_task("heart-disease", hospitals=["cleveland", "zurich"], standardise="both")

    assert caught.value.findings == (
        "task.hospitals has 'zurich': expected some of cleveland, hungary, switzerland, va",
        "task.standardise = 'both': one of site, pooled",
    )
    with pytest.raises(ConfigError, match="needs all four hospitals as they are"):
        load_task("heart-disease", hospitals=["va"], standardise="pooled")
    with pytest.raises(ConfigError, match=r"task\.hospitals is empty"):
        load_task("heart-disease", hospitals=[])
