"""The commands `convert` and `inspect`: their arguments, and the request made of them. Called by cli.py,
which prints."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from aiprod_ds.convert.request import Request

_FORMS = ("diffusers", "single-file", "safetensors", "peft", "comfyui", "diffusers-lora")
_MOST_RANK = 1_000_000  # no matrix of a model has so many rows
_DTYPES = ("fp32", "bf16", "fp16")
_EXAMPLES = """\
SOURCE is looked at and need not be described. OUT must not exist; it appears when it is whole.

  from                                    to
  run folder or checkpoint                diffusers, single-file, safetensors; of adapters also peft, comfyui,
                                          diffusers-lora
  diffusers folder or safetensors file    diffusers, single-file, safetensors; with --base and --rank a LoRA
  LoRA (PEFT folder or a file)            peft, comfyui, diffusers-lora; with --base merged into diffusers or
                                          single-file
  DeepSpeed checkpoint folder             diffusers (--config), safetensors; both only with --trust-checkpoint
  torch.distributed.checkpoint folder     the same

  diffusers       folder with config.json and safetensors for from_pretrained and model.pretrained
  single-file     one file with the names of the model's publication (ComfyUI): LTX-Video, LTX-2, Wan
  safetensors     folder (or one file, if OUT ends in .safetensors) with the names as they are

examples:
  aiprod-ds convert runs/my_run out/model --ema --dtype bf16 --verify
  aiprod-ds convert runs/my_run/export out/model.safetensors --to single-file
  aiprod-ds convert ltxv.safetensors out/transformer --config /models/LTX-Video/transformer
  aiprod-ds convert lora.safetensors out/peft --to peft --base /models/LTX-Video/transformer
  aiprod-ds convert output/global_step500 out/model --trust-checkpoint
"""


def add_convert(commands: Any) -> argparse.ArgumentParser:
    """Adds `convert` to the subparsers and returns its parser, which `request` reads."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="convert checkpoints, weights and LoRA between forms",
        description="Converts checkpoints, weights and LoRA between forms, one tensor at a time.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="what to convert")
    parser.add_argument("out", type=Path, metavar="OUT", help="must not exist")
    parser.add_argument(
        "--to",
        choices=_FORMS,
        help="form of OUT (default: diffusers, or safetensors where no class is known)",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of all floating tensors (default: fp32 of what was trained, others as is)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read OUT again and compare every tensor with a second conversion",
    )
    parser.add_argument("--ema", action="store_true", help="of a run: the average of the weights")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="of a run: which one, e.g. update_000500 (default: the newest)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="config.json of the model, or its folder, for weights without",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="PATH",
        help="base model of a LoRA, a folder or (with --config) a single file; or the folder before training",
    )
    parser.add_argument(
        "--alpha", type=alpha, help="of a LoRA that does not say it: a number, or `rank` (the factor is 1)"
    )
    parser.add_argument(
        "--rank",
        type=partial(count, most=_MOST_RANK),
        help="extract a LoRA of this rank: the difference of SOURCE and --base",
    )
    parser.add_argument(
        "--targets", nargs="+", default=["*"], metavar="PATTERN", help="layers to extract, as lora.targets"
    )
    parser.add_argument(
        "--parts-from",
        type=Path,
        metavar="FILE",
        help="of --to single-file: keep the other parts (VAE, text encoder, ...) and metadata of this file",
    )
    parser.add_argument(
        "--allow-unknown",
        action="store_true",
        help="leave out tensors that belong to nothing that is known, which are an error otherwise",
    )
    parser.add_argument("--prefix", help="take only tensors whose names begin so, without it")
    parser.add_argument(
        "--shard-gb",
        type=partial(number, least=1e-9, most=1e6),
        default=10.0,
        metavar="GB",
        help="the most that one file of a folder holds (10)",
    )
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="open folders of pickles: only for your own"
    )
    return parser


def add_inspect(commands: Any) -> argparse.ArgumentParser:
    """Adds `inspect` to the subparsers and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="say what a run folder, checkpoint, LoRA or file of weights is, verify it and list its tensors",
        description="Says what a folder or file is, verifies it and lists its checkpoints or tensors: a run "
        "folder, one "
        "checkpoint, an export, a safetensors file, a LoRA, a checkpoint of DeepSpeed or "
        "torch.distributed.checkpoint.",
    )
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print JSON with every tensor")
    parser.add_argument("--all", action="store_true", help="list all tensors, not the first 40")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="list tensors of folders of pickles: only of your own"
    )
    return parser


def alpha(text: str) -> float | Literal["rank"]:
    """Returns what `--alpha` gives: a number, or `rank`."""
    return "rank" if text == "rank" else number(text, least=-1e6, most=1e6)


def number(text: str, *, most: float, least: float = 0.0) -> float:
    """Returns the finite number that an option gives.

    Raises:
        argparse.ArgumentTypeError: If it is not within [least, most].
    """
    value = float(text)
    if not least <= value <= most:  # also if it is NaN
        raise argparse.ArgumentTypeError(f"must be a number from {least:g} to {most:g}, got {text[:40]}")
    return value


def count(text: str, *, most: int) -> int:
    """Returns the whole number that an option gives.

    Raises:
        argparse.ArgumentTypeError: If it is not within [1, most].
    """
    value = int(text)
    if not 1 <= value <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}, got {text[:40]}")
    return value


def request_of(arguments: argparse.Namespace) -> Request:
    """Returns what `convert` was asked for."""
    import torch  # takes seconds

    from aiprod_ds.convert.request import Request

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Request(
        source=arguments.source,
        out=arguments.out,
        form=arguments.to,
        dtype=dtypes.get(arguments.dtype),
        ema=arguments.ema,
        checkpoint=arguments.checkpoint,
        config=arguments.config,
        base=arguments.base,
        alpha=arguments.alpha,
        rank=arguments.rank,
        targets=arguments.targets,
        prefix=arguments.prefix,
        parts_from=arguments.parts_from,
        allow_unknown=arguments.allow_unknown,
        is_trusted=arguments.trust_checkpoint,
        shard_bytes=max(int(arguments.shard_gb * 1e9), 1),
    )
