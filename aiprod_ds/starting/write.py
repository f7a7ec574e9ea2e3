"""The text of a first configuration: every line that a reader may want to change has a comment that says why
it is so.

Owns the words; what they say is `draft.py`'s and `fit.py`'s. The text is read back by `aiprod_ds.config.load`
before it is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiprod_ds.config.merge import read_document
from aiprod_ds.models.families import registry
from aiprod_ds.starting.draft import CPU, Kind, PhaseDraft, Wish, held_out_share
from aiprod_ds.starting.look import Facts

_PLAIN = re.compile(r"[A-Za-z_/.][\w/.-]*")
_WORDS = {"true", "false", "null", "on", "off", "yes", "no", "y", "n"}
_VIDEO_VAE = "AutoencoderKLLTXVideo"
_COMMENT_AT = 34


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """What an audio VAE takes."""

    sample_rate_hz: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What goes into the files.

    Attributes:
        settings: Name of shipped DeepSpeed settings.
        has_vgg: Whether the weights of the perceptual loss are on this machine.
        notes: What was decided otherwise than usual, in words; they stand at the top.
    """

    wish: Wish
    facts: Facts
    phases: tuple[PhaseDraft, ...]
    settings: str
    sound: Sound | None = None
    has_vgg: bool = False
    notes: tuple[str, ...] = ()

    def trainer(self) -> str:
        """Returns the configuration of `train`."""
        parts = (
            self._head(),
            f"trainer: {'diffusion' if self.wish.kind.is_diffusion else self.wish.kind.value}",
            _line("output_dir", quoted(self.wish.output_dir), "the run folder"),
            *self._models(),
            *self._data(),
            *self._loss(),
            *self._curriculum(),
            *self._rest(),
        )
        return "\n".join(parts) + "\n"

    def encode(self) -> str:
        """Returns the configuration of `encode` that makes the latents of a transformer's training."""
        model = quoted(self.wish.model or "")
        precision = self.wish.precision
        missing = self.facts.clips - self.facts.captioned
        return "\n".join(
            (
                f"# Encodes the clips and captions of {self.wish.data}",
                f"# in the shapes of the phases of {self.wish.file.name}.",
                "#",
                f"#     aiprod-ds launch {self.wish.encode_file}",
                "data:",
                _line("  media", quoted(self.wish.data), "latents go into a folder beside it: ..._latents"),
                *self._unusable("max_failed_fraction"),
                "video:",
                f"  model: {{source: {_VIDEO_VAE}, pretrained: {model}, subfolder: vae}}",
                f"  precision: {precision}",
                "text:",
                f"  pretrained: {model}",
                "  subfolder: text_encoder",
                f"  tokenizer: {model}",
                "  tokenizer_subfolder: tokenizer",
                f"  precision: {precision}",
                "  max_tokens: 128",
                _line("  long_captions", "truncate", "as the pipelines of diffusers do"),
                _line("  mask_padding", "false", "LTX-Video was trained so"),
                *([_line("  default_caption", '""', f"of {missing} clips without one")] if missing else []),
                _line("curriculum", quoted(self.wish.file.name), "encode again after a change of it"),
            )
        ) + "\n"  # fmt: skip

    def _head(self) -> str:
        wish, facts = self.wish, self.facts
        what = [f"{facts.clips} clips"]
        what += [f"{facts.short_side} pixels and more in the shorter side"] if facts.short_side else []
        what += [f"{facts.frames} frames and more"] if facts.frames > 1 else []
        what += [f"{facts.seconds:.1f} s and more"] if wish.kind is Kind.AUDIO_VAE else []
        where = f"{wish.ranks} process{'es' if wish.ranks > 1 else ''} of a CPU" if wish.machine == CPU else (
            f"{wish.ranks} x {wish.machine}"
        )  # fmt: skip
        lines = [
            "Written by `aiprod-ds init`",
            f"  for {wish.data}: {', '.join(what)};",
            f"  and {where}.",
            "",
        ]
        if wish.kind.is_diffusion:
            lines.append(f"    aiprod-ds launch {wish.encode_file}    # once: latents and embeddings")
        machine = "" if wish.machine == CPU else f" --machine {wish.machine} --gpus {wish.ranks}"
        lines += [
            f"    aiprod-ds check {wish.file}{machine}",
            f"    aiprod-ds plan {wish.file}{machine}",
            f"    aiprod-ds launch {wish.file}",
            "",
            "Nothing here was tuned on these clips: lengths and rates are what is usual for such a run.",
            *self.notes,
        ]
        return "\n".join(f"# {line}".rstrip() for line in lines)

    def _models(self) -> Iterator[str]:
        wish = self.wish
        if wish.kind.is_diffusion:
            yield from (
                "model:",
                f"  source: {registry.FIRST.transformer_class}",
                f"  pretrained: {quoted(wish.model or '')}",
                "  subfolder: transformer",
                _line("vae", "", "that of the latents, for previews and the export"),
                f"  source: {_VIDEO_VAE}",
                f"  pretrained: {quoted(wish.model or '')}",
                "  subfolder: vae",
            )
            if wish.kind is Kind.LTX_LORA:
                yield _line("training_mode", "lora", "full: all weights, which takes ten times the memory")
                yield "lora:"
                yield _line("  rank", "32", "more learns more and takes more")
            return
        source = _VIDEO_VAE if wish.kind is Kind.VIDEO_VAE else "AutoencoderOobleck"
        if wish.model is not None:
            yield "model:"
            yield f"  source: {source}"
            yield f"  pretrained: {quoted(wish.model)}"
        elif wish.machine == CPU:
            yield _line("model", "", "a toy that a CPU can train; leave config out for the real size")
            yield "\n".join(_section(tiny_model(wish.kind), depth=1))
        else:
            yield "model:"
            yield _line(
                f"  source: {source}", "", "its default size, random weights; or `pretrained: FOLDER`"
            )

    def _data(self) -> Iterator[str]:
        yield "data:"
        kind = ", of which the latents beside it are read" if self.wish.kind.is_diffusion else ""
        yield _line("  train", quoted(self.wish.data), f"a folder or a table{kind}")
        yield _line(
            "  holdout_fraction",
            f"{held_out_share(self.facts.clips):g}",
            "of the clips are measured, never trained on",
        )
        if self.sound is not None:
            yield _line("  sample_rate_hz", str(self.sound.sample_rate_hz), "what the model takes")
            yield f"  channels: {self.sound.channels}"
        yield from self._unusable("max_unreadable_fraction")
        workers = 1 if self.wish.machine == CPU else 4
        yield _line("  num_workers", str(workers), "processes per rank that decode ahead")

    def _unusable(self, key: str) -> Iterator[str]:
        share = self.facts.unusable_share
        if share > 0:
            yield _line(
                f"  {key}",
                f"{min(1.0, round(share + 0.05, 2)):g}",
                f"{self.facts.unusable} files cannot be used",
            )

    def _loss(self) -> Iterator[str]:
        if self.wish.kind is Kind.VIDEO_VAE:
            why = (
                "LPIPS with VGG16"
                if self.has_vgg
                else "1.0 for sharp pictures, with VGG16's weights, which are not on this machine"
            )
            yield "loss:"
            yield _line("  perceptual_weight", "1.0" if self.has_vgg else "0.0", why)

    def _curriculum(self) -> Iterator[str]:
        yield "curriculum:"
        yield "  phases:"
        for number, phase in enumerate(self.phases):
            yield f"    - name: {phase.name}"
            if phase.height:
                yield _line(
                    "      resolution",
                    f"{phase.height}x{phase.width}",
                    "height x width" if number == 0 else "",
                )
            seconds = "" if self.sound is None else f"{phase.length / self.sound.sample_rate_hz:.2f} s"
            yield _line("      duration", f"{{frames: {phase.length}}}", seconds)
            if self.facts.is_mixed and phase.height:
                yield _line(
                    "      buckets",
                    "auto",
                    "clips keep their shapes, within this size" if number == 0 else "",
                )
            yield _line(
                "      global_batch_size",
                str(phase.global_batch_size),
                "clips an update" if number == 0 else "",
            )
            if phase.micro_batch_size is not None:
                why = "clips a rank at once; the rest is added up" if number == 0 else ""
                yield _line("      micro_batch_size", str(phase.micro_batch_size), why)
            if phase.is_recomputed is not None:
                why = "saves memory, costs a third of the time" if number == 0 else ""
                yield _line("      activation_checkpointing", str(phase.is_recomputed).lower(), why)
            yield f"      updates: {phase.updates}"
            yield f"      learning_rate: {phase.learning_rate:.1e}".replace("e-0", "e-")
            yield f"      warmup_updates: {phase.warmup_updates}"

    def _rest(self) -> Iterator[str]:
        total = sum(phase.updates for phase in self.phases)
        every = max(1, total // 8)
        if self.wish.kind is Kind.LTX_FULL:
            yield _line("ema: {}", "", "an average of the weights is evaluated and exported")
        yield "engine:"
        yield _line(
            "  deepspeed_config",
            self.settings,
            "shipped settings; `aiprod-ds examples ds_configs` copies them",
        )
        yield "checkpoint:"
        yield _line("  every_updates", str(every), "a run that is killed goes on from the newest")
        yield _line("  keep_last", "2", "older ones are deleted")
        yield "evaluation:"
        yield f"  every_updates: {every}"
        if self.wish.machine == CPU:
            yield _line("  max_clips", "3", "are measured: a CPU is slow")


def tiny_model(kind: Kind) -> Mapping[str, Any]:
    """Returns the section `model` of the shipped toy."""
    model: Mapping[str, Any] = read_document(Path(f"{kind.value}/tiny")).values["model"]
    return model


def tiny_sound() -> Sound:
    """Returns the sound of the shipped toy."""
    data = read_document(Path("audio_vae/tiny")).values["data"]
    return Sound(sample_rate_hz=data["sample_rate_hz"], channels=data["channels"])


def quoted(text: str) -> str:
    """Returns text as YAML reads it back."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and text.strip("."):
        return text
    return json.dumps(text, ensure_ascii=False)


def commands(wish: Wish) -> Sequence[str]:
    """Returns what to type next, in order."""
    encode = [f"aiprod-ds launch {wish.encode_file}"] if wish.kind.is_diffusion else []
    return (*encode, f"aiprod-ds launch {wish.file}")


def _section(values: Mapping[str, Any], *, depth: int) -> Iterator[str]:
    """Yields the lines of a mapping of plain values and lists."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{'  ' * depth}{key}:"
            yield from _section(value, depth=depth + 1)
        else:
            yield f"{'  ' * depth}{key}: {quoted(value) if isinstance(value, str) else json.dumps(value)}"


def _line(key: str, value: str, comment: str) -> str:
    plain = key if ":" in key else f"{key}: {value}".rstrip()
    return f"{plain.ljust(_COMMENT_AT - 1)} # {comment}" if comment else plain
