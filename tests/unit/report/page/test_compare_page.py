"""The page that compares runs, and the command that writes both kinds of pages."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aiprod_ds.cli import BAD_CONFIGURATION, DONE, FAILED, main
from aiprod_ds.errors import ConfigError
from aiprod_ds.report.page.compare_page import write_comparison
from aiprod_ds.train.resume import folder_lock
from aiprod_ds.train.resume.folder_lock import LOCK, is_in_use

MakeRun = Callable[..., Path]


def _words(page: str) -> str:
    body = page[page.index("<body>") : page.rindex("<script>")]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_runs_are_compared_by_what_they_measured_and_how(make_run: MakeRun, tmp_path: Path) -> None:
    better, worse = make_run("better"), make_run("worse", psnr_db=(10.0, 12.0, 14.0), updates=100)
    (worse / "config.yaml").write_text("trainer: video_vae\noptimizer:\n  weight_decay: 0.5\n")
    page = write_comparison([better, worse], tmp_path / "pages" / "c.html").read_text(encoding="utf-8")
    words = _words(page)
    assert "optimizer.weight_decay 0.01 0.5" in words
    assert "trainer video_vae" not in words, "it is the same in both"
    assert re.search(r'<td class="best">22\.00 dB.*?</td><td class="">14\.00 dB</td>', page)
    assert page.count('data-title="update"') > page.count('data-title="time"') >= 3
    assert "loss over time, at the end better: 0.03" in page
    assert words.count("a red cat") == 1, "one prompt, both runs beside each other"
    assert words.count("samples/update_000100_preview_1.mp4") == 2


def test_runs_of_one_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    page = write_comparison([make_run("a/run"), make_run("b/run")], tmp_path / "c.html")
    words = _words(page.read_text(encoding="utf-8"))
    assert "a/run Completed" in words
    assert "b/run Completed" in words


def test_runs_that_share_nothing_are_compared_too(make_run: MakeRun, tmp_path: Path) -> None:
    empty = make_run("empty", updates=0, psnr_db=(), status=None)
    page = write_comparison([make_run("whole"), empty], tmp_path / "c.html")
    words = _words(page.read_text(encoding="utf-8"))
    assert "PSNR 22.00 dB -" in words
    assert "empty Killed 0 %" in words


@pytest.mark.parametrize("count", [1, 9])
def test_too_few_and_too_many_runs_are_refused(make_run: MakeRun, tmp_path: Path, count: int) -> None:
    folders = [tmp_path / str(number) for number in range(count)]
    with pytest.raises(ConfigError, match=f"must compare 2 to 8 runs, got {count}"):
        write_comparison(folders, tmp_path / "c.html")


def test_one_run_twice_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    with pytest.raises(ConfigError, match="got one twice"):
        write_comparison([folder, folder / "."], tmp_path / "c.html")


def test_the_command_writes_a_page_and_says_where(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = make_run("first"), make_run("second")
    assert main(["report", str(first)]) == DONE
    assert main(["report", str(first), "--output", "elsewhere/page.html"]) == DONE
    assert main(["report", str(first), str(second)]) == DONE
    printed = capsys.readouterr().out.split()
    assert printed == [str(first / "report.html"), "elsewhere/page.html", "comparison.html"]
    assert all(Path(path).is_file() for path in printed)


def test_a_page_elsewhere_finds_what_it_links(make_run: MakeRun, tmp_path: Path) -> None:
    from aiprod_ds.report.page.run_page import write_page

    page = write_page(make_run("a run"), output=tmp_path / "pages" / "p.html", max_bytes=0)
    links = re.findall(r'src="(\.\./[^"]+)"', page.read_text(encoding="utf-8"))
    assert links[0].startswith("../a%20run/samples/")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing"], FAILED, "nothing: must be a run folder, got no folder"),
        (["run", "--output", "file/page.html"], BAD_CONFIGURATION, "--output: must be a file that can be"),
        (["run", "nothing"], FAILED, "nothing: must be a run folder"),
    ],
)
def test_the_command_explains_what_it_cannot_do(
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("run")
    Path("file").write_text("")
    assert main(["report", *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_run_is_alive_while_a_process_holds_its_lock(tmp_path: Path) -> None:
    """Held by another process, because a process does not see its own."""
    assert not is_in_use(tmp_path)
    script = (
        "import fcntl, os, sys; fcntl.lockf(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert is_in_use(tmp_path)
    holder.stdin.close()
    holder.wait(timeout=30)
    holder.stdout.close()
    assert not is_in_use(tmp_path)


def test_a_lock_that_may_only_be_read_is_judged_by_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the folder of another user looks; root, who runs tests in containers, may open everything."""

    def refuse(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.os, "open", refuse)
        assert not is_in_use(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.os, "open", refuse)
        assert is_in_use(tmp_path)
