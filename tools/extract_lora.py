"""Makes a LoRA of the difference between two states of a transformer, and says what it loses.

    python tools/extract_lora.py BASE_FOLDER TUNED_FOLDER OUT_FOLDER --rank R [--targets PATTERN ...]

Writes `peft/` and `comfyui.safetensors`. Printed are the relative error of every layer, its Frobenius norm
over that of the layer's difference, and of the whole model, in which everything counts that differs and got
no adapter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from aiprod_ds.convert.lora import Extraction
from aiprod_ds.convert.weights import total_error
from aiprod_ds.convert.weights_folder import require_absent
from aiprod_ds.crash import guarded
from aiprod_ds.errors import AiprodError, ConfigError

_SHOWN = 5


def main() -> int:
    """Returns 0, 1 after a failure, 2 for a target or a model's configuration that is not usable."""
    arguments = _parser().parse_args()
    try:
        _run(arguments)
    except AiprodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    require_absent(arguments.out)
    extraction = Extraction.of(
        arguments.base, arguments.tuned, rank=arguments.rank, targets=arguments.targets
    )
    parts, lost = extraction.parts(console=Console(stderr=True)), extraction.lost()
    extraction.write(arguments.out, parts)
    for part in parts:
        print(f"{part.layer}: relative error {part.relative_error:.3g}")
    if lost:
        largest = sorted(lost, key=lambda name: lost[name], reverse=True)[:_SHOWN]
        print(f"without adapter, though different: {len(lost)} tensors, most of all {', '.join(largest)}")
    inside, whole = total_error(parts), total_error(parts, lost.values())
    print(f"{arguments.out}: {len(parts)} layers, rank {arguments.rank}, relative error {inside:.3g}")
    print(f"of the whole model: relative error {whole:.3g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes a LoRA of the difference between two states of a transformer."
    )
    parser.add_argument(
        "base", type=Path, metavar="BASE_FOLDER", help="transformer in diffusers' layout, before training"
    )
    parser.add_argument(
        "tuned", type=Path, metavar="TUNED_FOLDER", help="the same transformer after training"
    )
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="must not exist")
    parser.add_argument("--rank", type=_positive, required=True, help="of every adapter")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="as lora.targets (default: every Linear layer of the blocks)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(guarded(main, program="tools/extract_lora.py"))
