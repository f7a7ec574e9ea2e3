"""What the program says of itself."""

from __future__ import annotations

import subprocess

import pytest

from aiprod_ds.cli import main


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 0
    caught = capsys.readouterr()
    assert caught.err == ""  # both are redirected into files
    return caught.out


def test_the_version_is_told_with_those_of_what_matters_most(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed(capsys, "--version")
    assert printed.startswith("aiprod-ds 0.")
    assert ", torch 2." in printed
    assert ", deepspeed 0." in printed


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completions_name_commands_and_options(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    printed = _printed(capsys, "--print-completion", shell)
    assert "examples" in printed
    assert "--world-size" in printed


def test_bash_completes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    script = _printed(capsys, "--print-completion", "bash")
    asked = "COMP_WORDS=(aiprod-ds exam); COMP_CWORD=1; _shtab_aiprod_ds; echo ${COMPREPLY[@]}"
    finished = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True, timeout=30
    )
    assert finished.stdout.strip() == "examples"
