r"""Merges a LoRA into a transformer's folder and writes another folder: W + scale * B A, summed in fp32.

    python tools/merge_lora.py BASE_FOLDER LORA OUT_FOLDER [--alpha ALPHA] \
        [--dtype {fp32,bf16,fp16}] [--verify]

Memory holds one file of weights and the LoRA. docs/tools.md says which files can be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from aiprod_ds.cli_convert import alpha
from aiprod_ds.convert.lora import Merge
from aiprod_ds.convert.weights_folder import require_absent
from aiprod_ds.crash import guarded
from aiprod_ds.errors import AiprodError, ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    """Returns 0, 1 after a failure, 2 if a model's configuration is not usable."""
    arguments = _parser().parse_args()
    try:
        _run(arguments)
    except AiprodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    require_absent(arguments.out)
    console = Console(stderr=True)
    merge = Merge.of(
        arguments.base, arguments.lora, alpha=arguments.alpha, dtype=_DTYPES.get(arguments.dtype)
    )
    merge.write(arguments.out, console=console)
    ranks = ", ".join(map(str, merge.lora.ranks()))
    scales = ", ".join(f"{scale:g}" for scale in sorted(set(merge.lora.scales().values())))
    print(f"{arguments.out}: merged {len(merge.lora.layers)} layers, rank {ranks}, scale {scales}")
    if arguments.verify:
        merge.verify(arguments.out, console=console)
        print(f"{arguments.out}: verified {len(merge.base)} tensors")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Merges a LoRA into a transformer's folder.")
    parser.add_argument("base", type=Path, metavar="BASE_FOLDER", help="transformer in diffusers' layout")
    parser.add_argument("lora", type=Path, metavar="LORA", help="PEFT folder or safetensors file")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="must not exist")
    parser.add_argument("--alpha", type=alpha, help="of a LoRA that does not say it: a number, or `rank`")
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), help="of all weights (default: as in BASE_FOLDER)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the result again and compare every tensor"
    )
    return parser


if __name__ == "__main__":
    sys.exit(guarded(main, program="tools/merge_lora.py"))
