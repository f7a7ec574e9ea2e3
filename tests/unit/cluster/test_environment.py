"""Environment files: what is taken and what is refused, and that a real shell gives the ranks exactly these
values."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aiprod_ds.cluster.environment import (
    default_environment_files,
    exported,
    parse_environment,
    read_environment,
    render_for_pdsh,
)
from aiprod_ds.errors import ConfigError


def test_values_are_the_text_itself() -> None:
    values = parse_environment("A=1\n\n# c\nB=two words; 'quoted' & more=x\nC=\n  D=  cut \n", "F")
    assert values == {"A": "1", "B": "two words; 'quoted' & more=x", "C": "", "D": "cut"}


def test_the_example_is_good(repository_root: Path) -> None:
    assert read_environment(repository_root / "launch" / "env.example") == {}
    commented = (repository_root / "launch" / "env.example").read_text()
    assert len(parse_environment(re.sub(r"^#(?=[A-Z_]+=)", "", commented, flags=re.MULTILINE), "F")) == 5


BAD_LINES = {
    "export A=1": "F:1: must have the form `NAME=VALUE`, without `export` and blanks around the =, got "
    "'export A' at its start.",
    "A = 1": "got 'A ' at its start",
    "just words": "got 'just words' at its start",
    "1A=2": "got '1A' at its start",
    'A="two words"': "the value of A must be the text itself, without double quotes, $, ` and \\, got '\"'.",
    "A=$(touch x)": "got '$'",
    "A=`touch x`": "got '`'",
    "PATH=/x:$PATH": "write spaces as they are and other variables' values in full",
    "A=b\\c": "got '\\\\'",
    "A='b c'": "got quotes around it",
    "RANK=0": "RANK is set by the launcher for every rank. Remove the line.",
    "A=b\tc": "got '\\t'",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=list(BAD_LINES))
def test_a_bad_line_is_told(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_environment(line, "F")
    assert message in str(caught.value)


def test_every_bad_line_is_told_at_once_and_no_value_is_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_environment('A=1\nKEY="hidden"\n\nA=2\n', "F")
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["2", "4"]
    assert "must set A once, got it again" in caught.value.problems[1]
    assert "hidden" not in str(caught.value)


def test_this_processes_own_variables_are_checked_too() -> None:
    good = {
        "NCCL_DEBUG": "INFO",
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "HOME": "$(touch x)",
        "SECRET": "s",
    }
    assert exported(good) == {"NCCL_DEBUG": "INFO", "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": "cpu"}
    with pytest.raises(
        ConfigError, match=r"environment: NCCL_X: the value of NCCL_X must be the text itself"
    ):
        exported({"NCCL_X": "a$(touch x)"})


def test_the_named_file_takes_the_place_of_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    assert default_environment_files() == []
    (tmp_path / ".deepspeed_env").touch()
    assert default_environment_files() == [Path(".deepspeed_env")]
    monkeypatch.setenv("DS_ENV_FILE", "other")
    assert default_environment_files() == [Path("other")]


def test_a_shell_gives_the_ranks_exactly_these_values(tmp_path: Path) -> None:
    """As DeepSpeed writes them: in double quotes if there is anything special, in front of the command that
    pdsh sends."""
    values = {"A": "two  words", "B": "a;touch made & (x) | <y> *?'~#!", "C": "100%n %h", "D": "plain/path:x"}
    exports = ""
    for line in render_for_pdsh(values).splitlines():
        name, value = line.split("=", maxsplit=1)
        quoted = f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value
        exports += f"export {name}={quoted}; "
    show = "import json, os; print(json.dumps({name: os.environ[name] for name in 'ABCD'}))"
    remote = exports.replace("%%", "%") + f'{sys.executable} -c "{show}"'  # pdsh turns %% into %
    done = subprocess.run(["sh", "-c", remote], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == values
    assert list(tmp_path.iterdir()) == [], "nothing was executed"
