"""The pages of a tiny video, audio and diffusion run in a real browser: nothing is logged as an error or
asked of a network, films and sounds play, a phone need not scroll sideways. One run is killed at 60 %."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from aiprod_ds.cli import main
from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.report.page.compare_page import write_comparison
from aiprod_ds.testing.browser import Browser, Page, find_browser, open_browser
from aiprod_ds.testing.dist import run_forked
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_oobleck
from aiprod_ds.train import reporting
from aiprod_ds.trainers.audio_vae import AudioVAETrainer
from aiprod_ds.trainers.diffusion import DiffusionTrainer
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs chromium"),
]

RATE_HZ, UPDATES, KILLED_AT = 8_000, 4, 60
KINDS = ("video", "audio", "diffusion")
WIDTHS = {"desktop": 1280, "phone": 390}
_READY = """(async () => {
  const media = [...document.querySelectorAll("video, audio")], began = Date.now();
  for (const medium of media) medium.preload = "auto";
  while (media.some((medium) => medium.readyState < 2) && Date.now() - began < 20000)
    await new Promise((done) => setTimeout(done, 20));
  return media.map((medium) => [medium.tagName, medium.readyState, medium.duration > 0]);
})()"""

_PICTURES = """Promise.all([...document.images].map(async (image) => {
  image.loading = "eager";
  await image.decode().catch(() => {});
  return image.naturalWidth > 0;
}))"""
_TOO_WIDE = """[...document.querySelectorAll("main *")]
  .filter((part) => !part.closest(".scroll, .strip, pre, nav"))
  .filter((part) => part.getBoundingClientRect().right > innerWidth + 1)
  .map((part) => part.outerHTML.slice(0, 200))"""
_COLOURS = """(() => {
  const behind = (part) => {
    const colour = getComputedStyle(part).backgroundColor;
    return colour.endsWith(", 0)") ? behind(part.parentElement) : colour;
  };
  const small = "h1, h2, p, .now, .delta, .label, figcaption *, th, td, summary, a, .pill, dd, dt";
  return [...document.querySelectorAll(small)]
    .filter((part) => part.textContent.trim())
    .map((part) => [getComputedStyle(part).color, behind(part)]);
})()"""
_BEFORE_AND_WITH_SLIDER = """(() => {
  const pair = document.querySelector(".pair.can-slide"), tools = pair.nextElementSibling;
  const films = [...pair.querySelectorAll("video")];
  const places = () => films.map((film) => film.getBoundingClientRect().left);
  const before = places();
  tools.querySelector("[aria-pressed]").click();
  const range = tools.querySelector("input");
  range.value = "30";
  range.dispatchEvent(new Event("input"));
  return [before, places(), getComputedStyle(films[1]).clipPath, range.hidden];
})()"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by kind."""
    root = tmp_path_factory.mktemp("pages")
    trainers: dict[str, Callable[[Path], Any]] = {
        "video": _video,
        "audio": _audio,
        "diffusion": _diffusion,
    }
    found = {kind: root / kind for kind in KINDS}
    with dist.process_group(), patch.object(reporting, "save_plots", lambda *_, **__: ()):
        for kind, folder in found.items():
            trainers[kind](folder).train()
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def page(kind: str, folders: dict[str, Path], browser: Browser) -> Page:
    return browser.open(folders[kind] / "report.html")


def test_a_page_logs_no_error_and_asks_nothing_of_a_network(page: Page) -> None:
    page.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert page.errors == []
    assert page.requests == []


def test_every_film_and_sound_of_a_page_plays(kind: str, page: Page) -> None:
    media = page.evaluate(_READY)
    assert [entry for entry in media if entry[1] < 2 or not entry[2]] == []
    assert {name for name, *_ in media} == {"AUDIO" if kind == "audio" else "VIDEO"}
    assert len(media) >= 4, "original and reconstruction, or previews, now and earlier"
    sizes = page.evaluate('[...document.querySelectorAll("video")].map((film) => film.videoWidth)')
    assert all(size > 0 for size in sizes)
    pictures = page.evaluate(_PICTURES)
    assert all(pictures)


def test_a_film_runs_and_its_reconstruction_with_it(folders: dict[str, Path], browser: Browser) -> None:
    page = browser.open(folders["video"] / "report.html")
    seconds = page.evaluate("""(async () => {
      const films = [...document.querySelectorAll(".pair video")].slice(0, 2), began = Date.now();
      films[0].closest(".exhibit").querySelector(".slide-tools button").click();
      while (films.some((film) => film.currentTime === 0) && Date.now() - began < 20000)
        await new Promise((done) => setTimeout(done, 20));
      return films.map((film) => film.currentTime);
    })()""")
    assert all(moved > 0 for moved in seconds)
    assert page.errors == []


def test_a_slider_lays_one_film_over_the_other(folders: dict[str, Path], browser: Browser) -> None:
    page = browser.open(folders["video"] / "report.html")
    places = page.evaluate(_BEFORE_AND_WITH_SLIDER)
    (left, right), (over, under), clip, is_hidden = places
    assert left < right, "side by side until it is asked for"
    assert over == under
    assert "30%" in clip
    assert not is_hidden


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(width: str, kind: str, folders: dict[str, Path], browser: Browser) -> None:
    page = browser.open(folders[kind] / "report.html", width=WIDTHS[width])
    page.evaluate('document.querySelectorAll("details").forEach((part) => { part.open = true; })')
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert page.evaluate(_TOO_WIDE) == []


def test_a_page_can_be_read_without_its_script(
    folders: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    text = (folders["video"] / "report.html").read_text(encoding="utf-8")
    bare = tmp_path / "bare.html"
    bare.write_text(text[: text.rindex("<script>")], encoding="utf-8")
    page = browser.open(bare)
    seen = page.evaluate("document.body.innerText")
    for words in (
        "Completed",
        "PSNR",
        "Loss and curriculum",
        "How to do it again",
        "samples/original_clip_1.mp4",
    ):
        assert words in seen
    assert page.evaluate('[...document.querySelectorAll("video")].every((film) => film.controls)')


def test_values_appear_under_the_pointer(folders: dict[str, Path], browser: Browser) -> None:
    page = browser.open(folders["video"] / "report.html")
    words = page.evaluate("""(() => {
      const area = document.querySelector(".chart.wide .area"), box = area.getBoundingClientRect();
      area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1, clientY: box.top + 5}));
      return area.querySelector(".tip").textContent;
    })()""")
    assert words.startswith(f"update {UPDATES}")


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(
    is_dark: bool, folders: dict[str, Path], browser: Browser
) -> None:
    """At least 4.5 to 1, as WCAG 2 asks of small text; by its formula of relative luminance."""
    page = browser.open(folders["video"] / "report.html", is_dark=is_dark)
    pairs = page.evaluate(_COLOURS)
    assert len(pairs) > 50
    assert min(_contrast(*pair) for pair in set(map(tuple, pairs))) >= 4.5


def test_the_comparison_of_runs_is_a_good_page_too(
    folders: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    output = write_comparison(list(folders.values()), tmp_path / "comparison.html")
    for width in WIDTHS.values():
        page = browser.open(output, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(_TOO_WIDE) == []
        assert (page.errors, page.requests) == ([], [])
        assert all(ready >= 2 for _, ready, _ in page.evaluate(_READY))


def test_a_run_that_was_killed_has_a_page_that_says_so(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SIGKILL, as the machine's memory killer does it, once 60 of 100 updates stand in metrics.jsonl."""
    folder = tmp_path / "killed"
    with pytest.raises(EngineError, match=rf"exited with \[-{signal.SIGKILL:d}\]"):
        run_forked(train_and_die, arguments={"folder": str(folder)}, timeout_seconds=300)
    assert "Running" in (folder / "report.html").read_text(encoding="utf-8"), "what it wrote while it lived"
    assert not (folder / "report.json").exists()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = browser.open(folder / "report.html")
    seen = page.evaluate("document.body.innerText")
    assert f"Killed {KILLED_AT} %" in seen
    assert "60 of 100 updates" in seen
    assert " left" in page.evaluate('document.querySelector(".facts").textContent')
    assert page.errors == []


def _video(folder: Path, *, updates: int = UPDATES, dataset: Any = None) -> VideoVAETrainer:
    phase = {
        "name": "only",
        "resolution": "16x16",
        "duration": {"frames": 5},
        "updates": updates,
        "learning_rate": 1e-2,
        "global_batch_size": 2,
    }
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given_in_code"},
            "data": {"train": "given_in_code", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0},
            "curriculum": {"phases": [phase]},
            "engine": {"kind": "local", "deepspeed_config": {}},
            "evaluation": {"max_clips": 2, "num_pictures": 2, "every_updates": updates // 2},
            "report": {"flush_updates": 1},
        }
    )
    torch.manual_seed(0)
    return VideoVAETrainer(
        config, model=TinyVideoVAE(), dataset=dataset or _clips(), validation=_clips(seed=1)
    )


def _clips(seed: int = 0) -> SyntheticVideoDataset:
    return SyntheticVideoDataset(num_clips=6, frames=6, height=16, width=16, seed=seed)


def _audio(folder: Path) -> AudioVAETrainer:
    seconds = torch.arange(4_000) / RATE_HZ
    sounds = [0.3 * torch.sin(2 * torch.pi * pitch * seconds) for pitch in (200, 300, 400, 500)]
    phase = {
        "name": "only",
        "duration": {"frames": 2_000},
        "updates": UPDATES,
        "learning_rate": 1e-3,
        "global_batch_size": 2,
    }
    model = {**tiny_oobleck(), "audio_channels": 1, "sampling_rate": RATE_HZ}
    config = AudioVAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "AutoencoderOobleck", "config": model},
            "data": {"train": "given_in_code", "num_workers": 0, "sample_rate_hz": RATE_HZ, "channels": 1},
            "loss": {"spectral": {"fft_sizes": [256, 64]}},
            "curriculum": {"phases": [phase]},
            "engine": {"kind": "local", "deepspeed_config": {}},
            "evaluation": {"max_clips": 2, "num_pictures": 2, "every_updates": UPDATES // 2},
        }
    )
    return AudioVAETrainer(config, dataset=sounds, validation=sounds[:2])


def _diffusion(folder: Path) -> DiffusionTrainer:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 3, 4, 4), "prompt_embeds": (3, 16)}
    clips = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(6)
    ]
    phase = {
        "name": "only",
        "resolution": "16x16",
        "duration": {"frames": 5},
        "updates": UPDATES,
        "learning_rate": 3e-3,
        "global_batch_size": 2,
    }
    vae = {"source": "aiprod_ds.testing.tiny:TinyVideoVAE", "spatial_stride": 4, "temporal_stride": 2}
    config = DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": LTXVideo.transformer_class, "config": LTXVideo.tiny_config()},
            "vae": vae,
            "data": {"train": "given_in_code", "num_workers": 0},
            "curriculum": {"phases": [phase]},
            "engine": {"kind": "local", "deepspeed_config": {}},
            "evaluation": {"max_clips": 2, "num_pictures": 2, "noise_levels": [0.5]},
            "preview": {"num_forwards": 2, "guidance_scale": 1.0, "decode_precision": "fp32"},
        }
    )
    return DiffusionTrainer(config, dataset=clips[:4], validation=clips[4:])


def _contrast(first: str, second: str) -> float:
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


class _Killing(SyntheticVideoDataset):
    """Clips that kill the process once `KILLED_AT` updates are written."""

    metrics: Path

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.metrics.is_file() and f'"update": {KILLED_AT},' in self.metrics.read_text(encoding="utf-8"):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return super().__getitem__(index)


def train_and_die(folder: str) -> None:
    clips = _Killing(num_clips=6, frames=6, height=16, width=16, seed=0)
    clips.metrics = Path(folder) / "metrics.jsonl"
    with dist.process_group():
        _video(Path(folder), updates=100, dataset=clips).train()
