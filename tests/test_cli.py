"""The command line: its words, its help, and what it refuses. Nothing is trained here."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import pytest

from recbole_rcekd import cli
from recbole_rcekd.cli import VERBS, main

# What belongs to one verb alone.
OWN = {
    "distil": {"--seeds", "--nproc", "--world_size", "--group_offset", "--ip", "--port"},
    "tune": {"--trials", "--params_file", "--algo"},
    "analyse": {"--student", "--baseline", "--history", "--analyse_users"},
}


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_has_its_own_options_only(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = set(shown(capsys, name, "--help").replace("[", " ").split())
    for verb, options in OWN.items():
        assert options & words == (options if verb == name else set())


def test_the_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name:8} {verb.about}" in text


@pytest.mark.parametrize(
    ("word", "meant"), [("distill", "[distil]"), ("tunes", "[tune]"), ("analyze", "[analyse]")]
)
def test_an_unknown_verb(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "--model=BPR"]) == 2
    assert (
        f"{word} is no command of run_recbole_kd.py. Did you mean {meant}"
        in capsys.readouterr().err
    )


class Called(Exception):
    """Instead of a training."""


@pytest.mark.parametrize(
    ("words", "verb", "expected"),
    [
        (["--model=BPR"], "distil", {"model": "BPR", "nproc": 1}),
        (["distil", "-m", "BPR", "--seeds=0,1"], "distil", {"model": "BPR", "seeds": "0,1"}),
        (["tune", "--model=BPR", "--trials=3"], "tune", {"model": "BPR", "trials": 3}),
        (["tune", "--model=BPR"], "tune", {"trials": 4}),
        (["--model=BPR", "--tune=3"], "tune", {"model": "BPR", "trials": 3}),
        (["--tune", "3", "--algo=bayes"], "tune", {"trials": 3, "algo": "bayes"}),
        (["analyse", "--student=a.pth"], "analyse", {"student": "a.pth", "analyse_users": 1000}),
        (["--student=a.pth", "--analyse"], "analyse", {"student": "a.pth"}),
    ],
)
def test_what_a_verb_is_given(
    words: list[str], verb: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verbs, and the options that were there before them."""

    def run(options: argparse.Namespace) -> None:
        raise Called(vars(options))

    monkeypatch.setitem(cli.VERBS, verb, dataclasses.replace(VERBS[verb], run=run))
    with pytest.raises(Called) as called:
        main(words)
    assert expected.items() <= called.value.args[0].items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student=a.pth", "--model=BPR"], "--student is for analyse"),
        (["--trials=3"], "--trials is for tune"),
        (["--model=BPR", "--epochs", "1"], "--epochs is not understood"),
        (["tune", "extra"], "extra is not understood"),
    ],
)
def test_words_that_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model=BPR"])
    path = list(sys.path)
    assert main(["analyse", "--history=absent"]) == 2
    assert (sys.argv, sys.path) == (["x", "--model=BPR"], path)
