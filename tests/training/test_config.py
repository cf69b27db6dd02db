"""Keys: which are refused, which take precedence, and which the teacher gets from the student."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import KDSettings, shipped_defaults
from recbole_rcekd.losses import LOSSES, RCELoss, RRDLoss
from recbole_rcekd.losses.methods import Method, read_method, read_methods
from recbole_rcekd.training.config import teacher_config
from recbole_rcekd.training.run_settings import PER_LOSS_KEYS, check_keys, overrides_for
from tests.helpers import build_config, read_kd_settings, write_dataset

# isort: split
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import init_seed

from recbole_rcekd.data.fingerprint import split_hash


def cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *words])


def with_keys(folder: Path, keys: dict[str, Any]) -> Any:
    return build_config(folder, **keys)


# --- unknown keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("kd_refresh_epoch", "kd_refresh_epochs"),
        ("kd_shedule", "kd_schedule"),
        ("kd_losses", "kd_loss"),
        ("rce_betta", "rce_beta"),
        ("rce_learning_rates", "rce_learning_rate"),
        ("ce_topk", "ce_top_k"),
        ("fce_targets", "fce_target"),
        ("cd_item", "cd_items"),
        ("rrd_itemweight", "rrd_item_weight"),
        ("scratch_epoch", "scratch_epochs"),
        ("rec_beta", "rce_beta"),  # does not look like ours, but is near
        ("kdloss", "kd_loss"),
        ("techer", "teacher"),
        ("outputdir", "output_dir"),
    ],
)
@pytest.mark.parametrize("where", ["dict", "command line"])
def test_a_mistyped_key_is_named_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, near: str, where: str
) -> None:
    if where == "dict":
        config = with_keys(tmp_path, {key: 1})
    else:
        cli(monkeypatch, f"--{key}=1")
        config = build_config(tmp_path)
    for check in (check_keys, read_kd_settings):
        with pytest.raises(SettingsError, match=rf"\[{key}\].*Did you mean \[{near}\]\?"):
            check(config)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("dcd_port_wieght", "dcd_port_weight"),
        ("dcd_port_item_weight", "dcd_port_weight"),  # [dcd_item_weight] is of dcd
        ("dcd_item_wieght", "dcd_item_weight"),
    ],
)
def test_of_two_losses_the_one_with_the_longer_name_owns_a_key(
    tmp_path: Path, key: str, near: str
) -> None:
    check_keys(build_config(tmp_path, dcd_port_weight=0.5, dcd_weight=0.5, dcd_port_epochs=3))
    with pytest.raises(SettingsError, match=rf"\[{key}\].*Did you mean \[{near}\]\?"):
        check_keys(with_keys(tmp_path, {key: 1}))
    _, losses = read_kd_settings({"kd_loss": "dcd+dcd_port", "dcd_port_weight": 0.5})
    assert (losses["dcd"].weight, losses["dcd_port"].weight) == (
        shipped_defaults("loss/dcd")["dcd_weight"],
        0.5,
    )


def test_a_key_near_to_nothing_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\[ce_zzzzzzzz\].*Known: .*ce_items.*ce_weight"):
        check_keys(build_config(tmp_path, ce_zzzzzzzz=1))


def test_what_is_recboles_or_the_users_own_is_left_alone(tmp_path: Path) -> None:
    config = build_config(
        tmp_path,
        my_own_key=1,
        embedding_size=8,  # of the model's yaml
        train_neg_sample_args=None,
        teacher_dropout_prob=0.1,  # checked against the teacher, by teacher_config
        rce_weight_decay=1e-5,
        kd_loss="rce",
    )
    check_keys(config)


@pytest.mark.parametrize(
    "model", ["BPR", "LightGCN", "NeuMF", "MultiVAE", "DiffRec", "CKE", "RaCT", "SGL"]
)
def test_no_key_of_recbole_is_taken_for_ours(tmp_path: Path, model: str) -> None:
    check_keys(build_config(tmp_path, model))


def test_keys_of_other_models_are_left_alone(tmp_path: Path) -> None:
    """Keys with short names of losses are similar to others.

    de_epochs is similar to RecVAE's n_dec_epochs, rce_weight to LightGCN's reg_weight.
    """
    for key in ("n_dec_epochs", "reg_weight", "kg_weight"):
        check_keys(with_keys(tmp_path, {key: 1}))


def test_any_mapping_will_do() -> None:
    settings, losses = read_kd_settings(
        {"kd_loss": "rrd", "rrd_rest": 7, "kd_schedule": "interactions", "other": 1}
    )
    loss = losses["rrd"]
    assert isinstance(loss, RRDLoss)
    assert (loss.settings.rrd_rest, settings.kd_schedule) == (7, "interactions")
    with pytest.raises(SettingsError, match="rrd_rest"):
        read_kd_settings({"kd_loss": "rrd", "rrd_resst": 7})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "rce_beta",
            "five",
            r"\[rce_beta\] is 'five' \(str\), but must be of type float; .*rce_beta: 5.0",
        ),
        ("rce_top_k", 5.5, r"\[rce_top_k\] is 5.5 \(float\), but must be of type int"),
        (
            "rce_gamma",
            "papers",
            r"\[rce_gamma\] is 'papers'.*paper, code, constant.*Did you mean \[paper\]",
        ),
        ("kd_refresh_epochs", 0, r"\[kd_refresh_epochs\] is 0, but must be at least 1"),
        ("kd_schedule", None, r"\[kd_schedule\] is None"),
        ("rce_weight", True, r"\[rce_weight\] is True \(bool\)"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path: Path, key: str, value: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_kd_settings(build_config(tmp_path, **{key: value}))


# --- kd_loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("rce", ["rce"]),
        ("scratch,rce", ["scratch", "rce"]),
        (" rrd , scratch,cd ", ["rrd", "scratch", "cd"]),
        (["ce", "fce"], ["ce", "fce"]),
        (("cd",), ["cd"]),
    ],
)
def test_loss_names(value: Any, names: list[str]) -> None:
    assert [method.name for method in read_methods(value)] == names


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("rcee", r"\[kd_loss\] names 'rcee'.*Did you mean \[rce\]\?"),
        (["scratch", "scrach"], r"names 'scrach'.*Did you mean \[scratch\]\?"),
        ("rce,ce,rce", r"is 'rce,ce,rce', but must name each method once"),
        (["ce", " ce"], "must name each method once"),
        ([], "must name each method once"),
        ("rce,", "names ''"),
        (5, "names '5'"),
    ],
)
def test_loss_names_that_are_refused(value: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_methods(value)


@pytest.mark.parametrize("value", ["scratch", "rce,ce", ["scratch", "rce"]])
def test_one_trainer_takes_one_loss(tmp_path: Path, value: Any) -> None:
    with pytest.raises(SettingsError, match="One trainer distils with one method"):
        read_kd_settings(build_config(tmp_path, kd_loss=value))


# --- defaults and precedence ----------------------------------------------------------------------


def test_without_any_key_the_shipped_files_are_used(tmp_path: Path) -> None:
    settings, losses = read_kd_settings(build_config(tmp_path))
    loss = losses["rce"]
    assert isinstance(loss, RCELoss)
    assert loss.settings.as_dict() == shipped_defaults("loss/rce")
    assert settings.as_dict() == shipped_defaults("kd")


def test_shipped_defaults_may_be_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = {
        "loss/rce": {**shipped_defaults("loss/rce"), "rce_beta": 2.5},
        "kd": shipped_defaults("kd"),
    }
    monkeypatch.setattr("recbole_rcekd.core.settings.shipped_defaults", edited.__getitem__)
    assert read_kd_settings(build_config(tmp_path))[1]["rce"].settings.as_dict()["rce_beta"] == 2.5
    assert (
        read_kd_settings(build_config(tmp_path, rce_beta=3.5))[1]["rce"].settings.as_dict()[
            "rce_beta"
        ]
        == 3.5
    )


def test_file_then_dict_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("rce_beta: 1.0\nrce_top_k: 11\nrce_samples: 12\nrce_weight: 13.0\n")
    second.write_text("rce_top_k: 21\nrce_samples: 22\nrce_weight: 23.0\n")
    cli(monkeypatch, "--rce_weight=43.0")
    given = {"rce_samples": 32, "rce_weight": 33.0}
    config = Config("BPR", "tiny", config_file_list=[str(first), str(second)], config_dict=given)
    values = read_kd_settings(config)[1]["rce"].settings.as_dict()
    assert [values[f"rce_{key}"] for key in ("beta", "top_k", "samples", "weight")] == [
        1.0,
        21,
        32,
        43.0,
    ]


def test_words_of_the_command_line_become_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli(
        monkeypatch,
        "--kd_loss=rrd",
        "--rrd_sample=False",
        "--rrd_weight=1e-3",
        "--kd_schedule=interactions",
    )
    settings, losses = read_kd_settings(build_config(tmp_path))
    loss = losses["rrd"]
    assert isinstance(loss, RRDLoss)
    assert (loss.settings.rrd_sample, loss.settings.rrd_weight) == (False, 0.001)
    assert loss.weight == 0.001
    assert settings == KDSettings(kd_schedule="interactions")


def test_keys_of_other_losses_do_not_disturb(tmp_path: Path) -> None:
    config = build_config(tmp_path, kd_loss="ce", ce_top_k=7, rce_top_k=9)
    assert read_kd_settings(config)[1]["ce"].settings.as_dict()["ce_top_k"] == 7


# --- per loss -------------------------------------------------------------------------------------


def test_overrides_for_one_method(tmp_path: Path) -> None:
    config = build_config(
        tmp_path, weight_decay=0.1, rce_weight_decay=1e-5, rce_epochs=7, scratch_learning_rate=0.5
    )
    assert overrides_for(read_method("rce"), config) == {"weight_decay": 1e-5, "epochs": 7}
    assert overrides_for(Method("scratch", {}), config) == {"learning_rate": 0.5}
    assert overrides_for(read_method("ce"), config) == {}


@pytest.mark.parametrize("name", ["scratch", *LOSSES])
def test_every_method_takes_every_override(tmp_path: Path, name: str) -> None:
    check_keys(with_keys(tmp_path, {f"{name}_{key}": 1 for key in PER_LOSS_KEYS}))


def test_what_is_not_per_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\[rce_embedding_size\] is not a setting"):
        check_keys(build_config(tmp_path, rce_embedding_size=8))


# --- the teacher's Config -------------------------------------------------------------------------


def test_the_students_model_and_training_keys_do_not_reach_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli(monkeypatch, "--embedding_size=7", "--learning_rate=0.5")
    student = build_config(tmp_path, epochs=3, train_batch_size=77)
    assert (student["embedding_size"], student["learning_rate"]) == (7, 0.5)
    teacher = teacher_config("BPR", student)
    default = Config("BPR", "tiny", config_dict={"data_path": str(tmp_path)})
    # Plain RecBole reads the command line.
    assert default["embedding_size"] == 7
    assert teacher["embedding_size"] == 64  # BPR.yaml
    assert (teacher["learning_rate"], teacher["epochs"], teacher["train_batch_size"]) == (
        0.001,
        300,
        2048,
    )
    assert sys.argv == ["x", "--embedding_size=7", "--learning_rate=0.5"]


def test_teacher_keys_and_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "teacher.yaml"
    file.write_text("embedding_size: 32\nn_layers: 4\nepochs: 9\n")
    cli(monkeypatch, "--teacher_epochs=11")
    for files in (str(file), [str(file)]):
        student = build_config(
            tmp_path, teacher_config_files=files, teacher_n_layers=1, teacher_weight_decay=0.2
        )
        teacher = teacher_config("LightGCN", student)
        assert teacher["model"] == "LightGCN"
        assert (teacher["embedding_size"], teacher["n_layers"], teacher["epochs"]) == (32, 1, 11)
        assert teacher["weight_decay"] == 0.2


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "teacher_embeding_size",
            r"\[teacher_embeding_size\]: BPR has no setting.*Did you mean \[embedding_size\]",
        ),
        ("teacher_n_layers", r"\[teacher_n_layers\]: BPR has no setting \[n_layers\]"),
        ("teacher_seed", r"\[teacher_seed\] has no effect: the seed is part of the split"),
    ],
)
def test_a_teacher_key_that_does_not_exist(tmp_path: Path, key: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        teacher_config("BPR", with_keys(tmp_path, {key: 3}))


def test_data_evaluation_and_seed_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli(monkeypatch, "--seed=77", "--metrics=['MRR']")
    shared: dict[str, Any] = {
        "topk": [3],
        "valid_metric": "MRR@3",
        "user_inter_num_interval": "[2,inf)",
        "eval_args": {
            "split": {"RS": [6, 2, 2]},
            "order": "TO",
            "group_by": "user",
            "mode": "full",
        },
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    student = build_config(tmp_path, **shared)
    teacher = teacher_config("LightGCN", student)
    for key in ("seed", "metrics", "data_path", "checkpoint_dir", "dataset", *shared):
        assert teacher[key] == student[key], key
    assert teacher["seed"] == 77


def test_data_may_be_the_teachers_alone(tmp_path: Path) -> None:
    """Features that only the teacher reads, by ``teacher_`` before keys of the data.

    The values may be whole blocks of a yaml file.
    """
    file = tmp_path / "student.yaml"
    file.write_text(
        "load_col: {inter: [user_id, item_id]}\n"
        "teacher_additional_feat_suffix: [text]\n"
        "teacher_alias_of_item_id: [tid]\n"
        "teacher_preload_weight: {tid: text_vec}\n"
        "teacher_load_col:\n  inter: [user_id, item_id]\n  text: [tid, text_vec]\n"
        "teacher_item_features: [text_vec]\n"
    )
    student = Config("BPR", "tiny", config_file_list=[str(file)])
    check_keys(student)
    teacher = teacher_config("VBPR", student)
    assert teacher["load_col"] == {"inter": ["user_id", "item_id"], "text": ["tid", "text_vec"]}
    assert teacher["preload_weight"] == {"tid": "text_vec"}
    assert (teacher["additional_feat_suffix"], teacher["item_features"]) == (["text"], ["text_vec"])
    assert student["load_col"] == {"inter": ["user_id", "item_id"]}
    assert [
        student[key] for key in ("additional_feat_suffix", "preload_weight", "alias_of_item_id")
    ] == [None] * 3


def test_the_teachers_split_is_the_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli(monkeypatch, "--embedding_size=7")
    write_dataset(tmp_path)
    student = build_config(tmp_path, seed=3, eval_args={"split": {"RS": [6, 2, 2]}})
    hashes = []
    for config in (student, teacher_config("BPR", student)):
        init_seed(config["seed"], config["reproducibility"])
        hashes.append(split_hash(data_preparation(config, create_dataset(config))[0]._dataset))
    assert hashes[0] == hashes[1]


def test_the_command_line_is_back_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli(monkeypatch, "--seed=1")
    # RecBole looks for an unknown model among those that need lightgbm.
    with pytest.raises((ValueError, ImportError)):
        teacher_config("BRP", build_config(tmp_path))
    assert sys.argv == ["x", "--seed=1"]
