from __future__ import annotations

import dataclasses
import re
from importlib import resources
from typing import Any, Literal

import pytest

from recbole_rcekd.core.errors import KDError, SettingsError
from recbole_rcekd.core.settings import (
    KDSettings,
    Settings,
    TeacherSettings,
    nearest,
    read_settings,
    setting,
    shipped_defaults,
)
from recbole_rcekd.losses import LOSSES
from recbole_rcekd.losses.cd import CDSettings
from recbole_rcekd.losses.ce import CESettings
from recbole_rcekd.losses.fce import FCESettings
from recbole_rcekd.losses.rce import RCESettings
from recbole_rcekd.losses.rrd import RRDSettings

SHIPPED: list[tuple[str, type[Settings]]] = [
    ("kd", KDSettings),
    ("teacher", TeacherSettings),
    *((f"loss/{name}", loss.settings_type) for name, loss in LOSSES.items()),
]


@dataclasses.dataclass(frozen=True)
class Example(Settings):
    size: int = setting(3, low=1, high=9)
    rate: float = setting(0.5, above=0.0)
    name: str = "a"
    flag: bool = True
    mode: Literal["slow", "fast"] = "fast"
    share: float | Literal["auto"] = setting(0.1, above=0.0, high=1.0)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"size": "3"},
            "[size] is '3' (str), but must be of type int; write it as size: 3, for example.",
        ),
        ({"size": 3.0}, "[size] is 3.0 (float), but must be of type int"),
        ({"size": True}, "[size] is True (bool), but must be of type int"),
        ({"size": None}, "[size] is None (NoneType), but must be of type int"),
        (
            {"rate": "1e-3"},
            "[rate] is '1e-3' (str), but must be of type float; write it as rate: 0.5, for "
            "example.",
        ),
        ({"rate": True}, "[rate] is True (bool), but must be of type float"),
        ({"name": 5}, "[name] is 5 (int), but must be of type str"),
        ({"name": True}, "[name] is True (bool), but must be of type str"),
        ({"flag": 1}, "[flag] is 1 (int), but must be of type bool"),
        ({"flag": "True"}, "[flag] is 'True' (str), but must be of type bool"),
        ({"size": 0}, "[size] is 0, but must be at least 1."),
        ({"size": 10}, "[size] is 10, but must be at most 9."),
        ({"rate": 0}, "[rate] is 0.0, but must be above 0.0."),
        ({"rate": -0.5}, "[rate] is -0.5, but must be above 0.0."),
        ({"rate": float("nan")}, "[rate] is nan, but must be above 0.0."),
        ({"mode": "fats"}, "[mode] is 'fats', but must be one of slow, fast. Did you mean [fast]?"),
        ({"mode": "zzz"}, "[mode] is 'zzz', but must be one of slow, fast. Known: fast, slow."),
        ({"mode": True}, "[mode] is True, but must be one of slow, fast."),
        (
            {"share": "atuo"},
            "[share] is 'atuo' (str), but must be of type float, or auto; write it as share: 0.1, "
            "for example.",
        ),
        ({"share": True}, "[share] is True (bool), but must be of type float, or auto"),
        ({"share": None}, "[share] is None (NoneType), but must be of type float, or auto"),
        ({"share": 0}, "[share] is 0.0, but must be above 0.0."),
        ({"share": float("nan")}, "[share] is nan, but must be above 0.0."),
        ({"szie": 3}, "[szie] is not a setting of Example. Did you mean [size]?"),
        (
            {"zzz": 3},
            "[zzz] is not a setting of Example. Known: flag, mode, name, rate, share, size.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        Example.from_mapping(values)


def test_what_fits() -> None:
    found = Example.from_mapping({"size": 9, "rate": 2, "flag": False, "mode": "slow"})
    assert found == Example(9, 2.0, "a", False, "slow", 0.1)
    assert isinstance(found.rate, float)  # an int is accepted, and becomes a float
    assert Example.keys() == ["size", "rate", "name", "flag", "mode", "share"]
    assert found.as_dict() == {
        "size": 9,
        "rate": 2.0,
        "name": "a",
        "flag": False,
        "mode": "slow",
        "share": 0.1,
    }
    assert Example.from_mapping(found.as_dict()) == found
    assert issubclass(SettingsError, KDError)


def test_a_number_or_a_word() -> None:
    assert Example(share="auto").share == "auto"
    whole = Example.from_mapping({"share": 1})
    assert whole.share == 1.0
    assert isinstance(whole.share, float)


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().size = 4  # type: ignore[misc]


def test_nearest() -> None:
    assert nearest("rce_tok_k", ["rce_top_k", "rce_beta"]) == "Did you mean [rce_top_k]?"
    assert nearest("x", ["b", "a"]) == "Known: a, b."


@pytest.mark.parametrize(("name", "cls"), SHIPPED)
def test_every_bound_is_checked(name: str, cls: type[Settings]) -> None:
    bounded = 0
    for spec in dataclasses.fields(cls):
        for kind, step in (("low", -1), ("above", 0), ("high", 1)):
            bound = spec.metadata.get(kind)
            if bound is not None:
                bounded += 1
                with pytest.raises(SettingsError, match=rf"\[{spec.name}\] is"):
                    cls.from_mapping({spec.name: bound + step})
    assert bounded
    for spec in dataclasses.fields(cls):
        if isinstance(spec.default, int | float) and not isinstance(spec.default, bool):
            assert spec.name == "cd_label_shift" or set(spec.metadata) & {"low", "above"}


# -- relations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (
            RCESettings,
            {"rce_pool": 40, "rce_top_k": 20, "rce_samples": 41},
            "[rce_samples]=41 is larger than [rce_pool]=40",
        ),
        (RCESettings, {"rce_pool": 40}, "[rce_top_k]=50 is larger than [rce_pool]=40"),
        (CDSettings, {"cd_items": 6, "cd_pool": 5}, "[cd_items]=6 is larger than [cd_pool]=5"),
    ],
)
def test_lists_come_out_of_the_pool(
    cls: type[Settings], values: dict[str, int], message: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        cls.from_mapping(values)


def test_lists_as_long_as_the_pool_are_fine() -> None:
    assert RCESettings(rce_pool=50, rce_samples=50, rce_top_k=50).rce_pool == 50
    assert RCESettings(rce_samples=0).rce_samples == 0
    assert CDSettings(cd_items=7, cd_pool=7).cd_items == 7


@pytest.mark.parametrize(
    ("settings", "needed", "named"),
    [
        (RCESettings(), 200, "[rce_pool]=200"),
        (CESettings(), 50, "[ce_top_k]=50"),
        (FCESettings(), 50, "[fce_top_k]=50"),
        (CDSettings(), 50, "[cd_items]=50"),  # the pool may be longer than the catalogue
        (RRDSettings(), 150, "[rrd_top_k]=50 + [rrd_rest]=100"),  # this pool too
    ],
)
def test_a_catalogue_that_is_too_small(settings: Any, needed: int, named: str) -> None:
    settings.check_catalogue(needed)
    message = (
        f"{named} needs a catalogue of at least {needed} items, but this dataset has {needed - 1}. "
        f"Lower {'the sum' if '+' in named else 'it'} to {needed - 1} or less."
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        settings.check_catalogue(needed - 1)


def test_a_loss_without_lists_takes_any_catalogue() -> None:
    FCESettings(fce_target="all").check_catalogue(1)


# -- shipped files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), SHIPPED)
def test_shipped_yaml_and_defaults_are_the_same(name: str, cls: type[Settings]) -> None:
    shipped = shipped_defaults(name)
    defaults = cls().as_dict()
    assert list(shipped) == list(defaults)
    for key, value in defaults.items():
        assert shipped[key] == value
        assert type(shipped[key]) is type(value)


@pytest.mark.parametrize(("name", "cls"), SHIPPED)
def test_every_line_says_its_type_and_purpose(name: str, cls: type[Settings]) -> None:
    text = (
        resources.files("recbole_rcekd.properties")
        .joinpath(f"{name}.yaml")
        .read_text(encoding="utf-8")
    )
    text = re.sub(r"\n +# ", " ", text)  # a comment may go on in the next line
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(cls.keys())
    for line in lines:
        found = re.fullmatch(r"(\w+): \S+ +# \((int|float|str|bool|list)\) (\S.*\.)", line)
        assert found, line
        key, kind, _ = found.groups()
        assert type(cls().as_dict()[key]).__name__ == kind


@pytest.mark.parametrize(("name", "cls"), SHIPPED)
def test_choices_are_named_in_the_comment(name: str, cls: type[Settings]) -> None:
    text = (
        resources.files("recbole_rcekd.properties")
        .joinpath(f"{name}.yaml")
        .read_text(encoding="utf-8")
    )
    comments = {line.partition(":")[0]: line for line in text.splitlines()}
    for spec in dataclasses.fields(cls):
        for choice in re.findall(r'"(\w+)"', str(spec.type)) if "Literal" in str(spec.type) else []:
            assert f"'{choice}'" in comments[spec.name], spec.name


@pytest.mark.parametrize(("name", "cls"), SHIPPED)
def test_keys_have_the_prefix_of_their_file(name: str, cls: type[Settings]) -> None:
    prefix = name.rpartition("/")[2]
    assert all(key.startswith(f"{prefix}_") for key in cls.keys())
    if name.startswith("loss/"):
        assert f"{prefix}_weight" in cls.keys()


def test_what_the_user_gives_goes_over_the_shipped_file() -> None:
    found = read_settings(
        RCESettings, "loss/rce", {"rce_beta": 2, "learning_rate": 0.1, "cd_items": "not looked at"}
    )
    assert found == RCESettings(rce_beta=2.0)


# -- teachers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[2, 0.5], (2, 0.5)])
def test_weights_of_teachers(given: Any) -> None:
    settings = TeacherSettings.from_mapping({"teacher_weights": given})
    assert settings.weights_of(["a", "b"]) == [2.0, 0.5]
    assert TeacherSettings().weights_of(["a", "b", "c"]) == [1.0, 1.0, 1.0]
    with pytest.raises(SettingsError) as caught:
        settings.weights_of(["a.pth", "b.pth", "c.csv"])
    assert str(caught.value) == (
        "[teacher_weights] has 2 numbers, but there are 3 teachers: a.pth, b.pth, c.csv. Give one "
        "weight for each, in this order."
    )


@pytest.mark.parametrize(
    "given",
    [1, "1,1", [1, -1], [1, "1"], [True], [0, 0.0], [float("nan"), 1], [float("inf")], None],
)
def test_weights_that_are_refused(given: Any) -> None:
    with pytest.raises(
        SettingsError,
        match=r"^\[teacher_weights\] is .*list of numbers of at least 0, not all of them 0",
    ):
        TeacherSettings.from_mapping({"teacher_weights": given})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("teacher_floor", -0.1, r"\[teacher_floor\] is -0.1, but must be at least 0.0"),
        (
            "teacher_unknown",
            "skip",
            r"\[teacher_unknown\] is 'skip', but must be one of error, drop",
        ),
        (
            "teacher_missing_users",
            "drop",
            r"\[teacher_missing_users\] is 'drop', but must be one of error, skip",
        ),
        (
            "teacher_ensemble",
            "rrf",
            r"\[teacher_ensemble\] is 'rrf', but must be one of standardised, reciprocal_rank",
        ),
    ],
)
def test_teacher_settings_that_are_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        TeacherSettings.from_mapping({key: value})
