"""report.html says what the folder holds, of runs that ended, go on, failed and were killed, and of damaged
folders; tests/e2e/test_report_page.py looks at it in a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.evaluations import (
    EvaluationRecord,
    Medium,
    append_evaluation,
    keep_evaluations,
    read_evaluations,
)
from aiprod_ds.report.page import record
from aiprod_ds.report.page.run_page import write_page

MakeRun = Callable[..., Path]


def _page(folder: Path, **options: Any) -> str:
    return write_page(folder, **options).read_text(encoding="utf-8")


def _words(page: str) -> str:
    """Returns what is read of a page, on one line."""
    body = page[page.index("<body>") : page.rindex("<script>")]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_a_finished_run_is_told_whole(make_run: MakeRun) -> None:
    page = _page(make_run())
    words = _words(page)
    for expected in (
        "tiny Completed",
        "AutoencoderKLLTXVideo · 1.77 M parameters · 2 ranks",
        "Better than before training.",
        "22.00 dB from 10.00 dB ▲ better +12.00 dB on 1 of 2 clips",
        "a red cat",
        "Clip 1 bunny.mp4",
        "samples/update_000100_clip_1.mp4",
        "100 of 100 updates",
        "64x64 128x128",
        "update 60, after phase low",
        "Not judged 1 held-out clip cannot be judged",
        "digital silence",
        "NUM_ACCELERATORS=2 launch/train_local.sh configs/tiny.yaml runs/tiny",
        "weight_decay: 0.01",
        "torch 2.14.1",
    ):
        assert expected in words, expected
    assert 'aria-label="loss: 0.9659 at update 1, 0.03125 at update 100, lowest 0.03125' in page


def test_nothing_of_a_page_lies_outside_of_it(make_run: MakeRun) -> None:
    page = _page(make_run())
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [link[:30] for link in links if not link.startswith(("data:", "#"))] == []
    assert re.search(r"https?:", page) is None
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.unescape(policy).startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in html.unescape(policy)


def test_a_run_that_goes_on_says_how_far_it_is_and_what_is_left(make_run: MakeRun) -> None:
    """50 of 60 updates at 2 s are done: 10 more, and 40 of 128x128x17x2 pixels in place of 64x64x9x8 each:
    100 s in all, and before training 3 s of an evaluation."""
    words = _words(_page(make_run(updates=50, status=None), is_running=True))
    assert "Running 50 %" in words
    seconds_left = 10 * 2 + 40 * 2 * (128 * 128 * 17 * 2) / (64 * 64 * 9 * 8)
    assert f"1 min 43 s spent, about {seconds_left // 60:.0f} min {seconds_left % 60:02.0f} s left" in words
    assert "measured before training only" in words


def test_a_killed_run_says_so(make_run: MakeRun) -> None:
    words = _words(_page(make_run(updates=60, status=None)))
    assert "Killed 60 %" in words
    assert "It was killed at 60 %; its last metrics are of" in words
    assert "60 of 100 updates" in words
    assert "UTC. No checkpoint stands in its folder: the same command starts anew." in words


def test_a_killed_run_says_how_it_goes_on(make_run: MakeRun) -> None:
    folder = make_run(updates=60, status=None)
    (folder / "checkpoints" / "update_000060").mkdir(parents=True)
    assert "UTC. The same command goes on from the newest checkpoint." in _words(_page(folder))
    (folder / "environment.json").write_text('{"command": "aiprod-ds train a.yaml --resume never"}')
    assert "The same command without --resume never goes on from the newest checkpoint." in _words(
        _page(folder)
    )


def test_a_killed_run_before_its_first_update_has_a_page(make_run: MakeRun) -> None:
    words = _words(_page(make_run(updates=0, status=None, psnr_db=())))
    assert "Killed 0 %" in words
    assert "No update has been recorded." in words
    assert "have not been measured yet" in words


@pytest.mark.parametrize(
    ("status", "expected"),
    [("failed", "Failed 40 %"), ("interrupted", "Interrupted 40 %")],
)
def test_an_early_end_says_how_far_it_came(make_run: MakeRun, status: str, expected: str) -> None:
    folder = make_run(updates=40, status=status, error="NonFiniteError: <b>loss & gradient</b>")
    page = _page(folder)
    assert expected in _words(page)
    assert "Error NonFiniteError: <b>loss & gradient</b>" in _words(page)
    assert "<b>loss" not in page


def test_a_run_that_got_worse_says_so_first(make_run: MakeRun) -> None:
    page = _page(make_run(psnr_db=(22.0, 18.0, 10.0)))
    assert '<p class="verdict worse">Worse than before training: PSNR 22.00 → 10.00 dB (-12.00 dB)' in page
    words = _words(page)
    assert words.index("Worse than before training") < words.index("Originals and reconstructions")
    assert "▼ worse -12.00 dB" in words


def test_a_run_of_which_no_clip_could_be_judged_says_so(make_run: MakeRun) -> None:
    folder = make_run()
    nothing = [replace(record, metrics={}) for record in read_evaluations(folder)]
    keep_evaluations(folder, nothing)
    words = _words(_page(folder))
    assert "None of the held-out clips could be judged by any measure; see below why." in words
    assert "measured before training only" not in words
    assert "silent.mp4 (PSNR) digital silence" in words


def test_a_run_below_its_best_says_so(make_run: MakeRun) -> None:
    words = _words(_page(make_run(psnr_db=(10.0, 25.0, 22.0))))
    assert "Below its best: PSNR was 25.00 dB after phase low." in words


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a\"b'c&d", "Grüße 🐈.mp4", "{{ 7 * 7 }}"])
def test_no_name_becomes_more_than_text(make_run: MakeRun, name: str) -> None:
    folder = make_run(clip=name, phases=((name, 60, 64, 9, 8), ("high", 40, 128, 17, 2)))
    (folder / "config.yaml").write_text(f"note: {json.dumps(name)}\n", encoding="utf-8")
    page = _page(folder)
    assert page.count("<script") == 1
    assert name in _words(page)


def test_damaged_files_are_told_and_cost_no_more(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "config.yaml").write_bytes(b"a: [1,\xff\n")
    (folder / "plan.json").write_text('{"phase": 1}')
    (folder / "report.json").write_text('{"status": "comp')
    (folder / "environment.json").write_text("[]")
    for name, line in (("metrics.jsonl", '{"update": "x"}\nnothing\n'), ("evaluations.jsonl", "{}\n[]\n")):
        path = folder / name
        path.write_text(line + path.read_text() + '{"update": 101, "loss')
    words = _words(_page(folder))
    for expected in (
        "config.yaml cannot be read",
        "plan.json cannot be read: must be a list of objects",
        "report.json cannot be read",
        "environment.json cannot be read: must be an object, got list",
        "metrics.jsonl: 2 damaged lines are left out",
        "evaluations.jsonl: 2 damaged lines are left out",
        "The command was not recorded.",
        "22.00 dB",
    ):
        assert expected in words, expected


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_no_numbers_are_told(make_run: MakeRun, value: str) -> None:
    folder = make_run(psnr_db=(10.0, 18.0, float("nan")))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"loss/kl": value, "loss/total": value if row["update"] % 2 else row["loss/total"]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = _words(_page(folder))
    assert "50 of 100 values are not finite and not drawn." in words
    assert "PSNR is no longer a number" in words


def test_wrong_types_in_reports_end_in_no_error(make_run: MakeRun) -> None:
    folder = make_run(time_seconds=["a"], data={"unreadable": [1, {"path": 1}]}, not_saved=[1], error=7)
    told = json.loads((folder / "report.json").read_text()) | {"phases": [1, {"name": "low"}]}
    (folder / "report.json").write_text(json.dumps(told))
    (folder / "plan.json").write_text('[{"phase": "a"}, {"phase": 0, "updates": "many", "height": "x"}]')
    (folder / "environment.json").write_text('{"command": 3, "hardware": 1, "versions": [], "git": "x"}')
    assert "Completed" in _words(_page(folder))


_JUNK: tuple[Any, ...] = (None, True, -1, 1.5, float("nan"), "x", "", [], {}, [None], [{}], 10**30, 1e308)


def _mutated(value: Any, share: float, chance: random.Random) -> Any:
    if chance.random() < share:
        return chance.choice(_JUNK)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if chance.random() > share / 2}
        return {key: _mutated(item, share, chance) for key, item in kept.items()}
    return [_mutated(item, share, chance) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_whatever_files_hold_there_is_a_page(make_run: MakeRun, share: float) -> None:
    """Values of all files are left out or replaced by others, by a seed; JSON itself stays valid."""
    folder = make_run(data={"unreadable": [{"path": "a", "reason": "b"}]}, time_seconds={"train": 1.0})
    chance = random.Random(7)
    names = (
        "plan.json",
        "report.json",
        "start.json",
        "environment.json",
        "metrics.jsonl",
        "evaluations.jsonl",
    )
    texts = {name: (folder / name).read_text() for name in names}
    for _ in range(20):
        for name, text in texts.items():
            values = [json.loads(line) for line in text.splitlines()]
            lines = [json.dumps(_mutated(value, share, chance)) for value in values]
            (folder / name).write_text("\n".join(lines) + "\n")
        assert "How to do it again" in _words(_page(folder, is_running=chance.random() < 0.5))


@pytest.mark.slow
def test_thousands_of_phases_make_a_page_of_bounded_size(make_run: MakeRun) -> None:
    phases = [(f"phase_{index}", 1, 64 + index % 2, 9, 8) for index in range(3000)]
    page = _page(make_run(updates=3000, phases=phases))
    assert len(page) < 1_000_000
    assert "2,900 rows between are left out." in _words(page)


def test_a_long_run_is_drawn_from_a_sample(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run()
    monkeypatch.setattr(record, "_MAX_BYTES_WHOLE", 1000)
    monkeypatch.setattr(record, "_LAST_BYTES", 1000)
    monkeypatch.setattr(record, "_SAMPLED_ROWS", 20)
    rows = record.read_run(folder).rows
    updates = [update for update, _ in rows]
    assert updates == sorted(set(updates))
    assert (updates[0], updates[-1]) == (1, 100)
    assert 15 <= len(updates) < 40
    assert "curves are drawn from 20 of its lines" in _words(_page(folder))


def test_a_page_beyond_its_bound_links_what_does_not_fit(make_run: MakeRun) -> None:
    folder = make_run()
    page = _page(folder, max_bytes=1200)
    assert "files are linked and not inside the page" in _words(page)
    links = re.findall(r'src="(samples/[^"]+)"', page)
    assert links
    assert all((folder / link).is_file() for link in links)
    embedded = [link for link in re.findall(r'src="(data:[^"]+)"', page) if "film" not in link]
    assert sum(map(len, embedded)) <= 1200


def test_what_is_embedded_first_is_the_newest(make_run: MakeRun) -> None:
    folder = make_run()
    newest, first = (folder / f"samples/update_{update:06d}_clip_1.mp4" for update in (100, 0))
    newest.write_bytes(b"newest" * 50)
    first.write_bytes(b"first!" * 50)
    page = _page(folder, max_bytes=2000)
    assert base64.b64encode(newest.read_bytes()).decode() in page
    assert base64.b64encode(first.read_bytes()).decode() not in page


@pytest.mark.parametrize(
    "path", ["../secret.mp4", "/etc/hostname", "samples/../../secret.mp4", "gone.mp4", "\0"]
)
def test_only_files_of_the_folder_are_shown(make_run: MakeRun, path: str) -> None:
    folder = make_run()
    (folder.parent / "secret.mp4").write_bytes(b"secret" * 10)
    medium = Medium(path=path, kind="film", role="preview", caption="", prompt="a prompt")
    own = EvaluationRecord(
        update=100,
        samples=0,
        phase="high",
        phase_index=1,
        reason="asked",
        seconds=1.0,
        metrics={},
        media=(medium,),
    )
    append_evaluation(folder, own)
    page = _page(folder)
    assert "the file is gone" in _words(page)
    assert base64.b64encode(b"secret" * 10).decode() not in page


def test_a_run_of_an_older_version_is_shown(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "evaluations.jsonl").unlink()
    (folder / "start.json").unlink()
    rows = (folder / "metrics.jsonl").read_text()
    before, after = ({"update": update, "evaluation/psnr_db": value} for update, value in ((0, 10), (60, 20)))
    (folder / "metrics.jsonl").write_text(json.dumps(before) + "\n" + rows + json.dumps(after) + "\n")
    samples = folder / "samples"
    (samples / "update_000060_clip_1.mp4").rename(samples / "phase_1_low_clip_1.mp4")
    (samples / "update_000060_clip_2.wav").rename(samples / "phase_1_low_clip_2.wav")
    words = _words(_page(folder))
    assert "20.00 dB from 10.00 dB" in words
    assert "samples/phase_1_low_clip_2.wav" in words
    assert "samples/phase_1_low_clip_1.mp4" in words


def test_what_changed_in_the_configuration_is_told_by_resume(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "config_before_000060.yaml").write_text("trainer: video_vae\noptimizer:\n  weight_decay: 0.1\n")
    (folder / "environment_from_000060.json").write_text('{"command": "again"}')
    words = _words(_page(folder))
    assert "Going on from update 60: what changed in the configuration" in words
    assert "optimizer.weight_decay 0.1 0.01" in words
    assert "Gone on from update 60 again" in words


def test_the_time_of_earlier_starts_is_counted(make_run: MakeRun) -> None:
    """60 updates at 2 s and two evaluations of 3 s before the resume, and what the last start took."""
    folder = make_run(time_seconds={"train": 80.0, "evaluation": 4.0})
    assert "100 of 100 updates · 1 min 24 s spent" in _words(_page(folder))
    (folder / "environment_from_000060.json").write_text('{"command": "again"}')
    words = _words(_page(folder))
    assert "100 of 100 updates · 3 min 30 s spent" in words
    assert "Where the time went since update 60" in words


def test_early_moments_are_thinned(make_run: MakeRun) -> None:
    folder = make_run(psnr_db=())
    for update in range(20):
        medium = Medium(
            path="samples/original_clip_1.mp4", kind="film", role="preview", caption="", prompt="a cat"
        )
        append_evaluation(
            folder,
            EvaluationRecord(
                update=update,
                samples=0,
                phase="low",
                phase_index=0,
                reason="interval",
                seconds=1.0,
                metrics={},
                media=(medium,),
            ),
        )
    words = _words(_page(folder))
    assert "5 earlier, 14 more not shown" in words
    assert "update 19 " in words


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    if what == "empty":
        folder.mkdir()
    elif what == "file":
        folder.write_text("")
    with pytest.raises(DataError, match="must be a run folder"):
        write_page(folder)
