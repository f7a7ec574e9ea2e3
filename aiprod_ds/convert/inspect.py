"""What a file or folder holds, verified as far as it can be without running anything: what
`aiprod-ds inspect` says.

Owns the facts; how they look is `aiprod_ds.report.inspect_view`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aiprod_ds.checkpoint.consistency import require_layout
from aiprod_ds.checkpoint.manifest import read_manifest
from aiprod_ds.checkpoint.shard_files import ShardReader
from aiprod_ds.checkpoint.store import Checkpoint, CheckpointStore
from aiprod_ds.convert.checkpoint_weights import CheckpointWeights
from aiprod_ds.convert.deepspeed_folder import DeepSpeedFolder
from aiprod_ds.convert.diffusers_config import read_diffusers_config
from aiprod_ds.convert.distributed_folder import DistributedFolder
from aiprod_ds.convert.identify import IN_WORDS, Found, identify
from aiprod_ds.convert.uses import describe_lora, uses_of
from aiprod_ds.convert.weights_folder import CONFIG, WeightsFolder, open_tensors
from aiprod_ds.errors import AiprodError, CheckpointError
from aiprod_ds.files import read_text
from aiprod_ds.models.lora_opened import WEIGHTS_FILE
from aiprod_ds.report.inspect_view import CheckpointRow, Inspection, TensorRow
from aiprod_ds.tensor_file import TensorSource
from aiprod_ds.train.resume.data_change import read_clips


def inspect_path(path: Path, *, is_trusted: bool = False) -> Inspection:
    """Returns what `path` is and holds.

    Args:
        path: Anything that `identify` knows.
        is_trusted: Whether folders of pickles may be opened; without it they are told by their names and
            sizes.

    Raises:
        CheckpointError: If it is nothing that is known.
    """
    found = identify(path)
    try:
        if found.kind == "run":
            return _run(found)
        if found.kind == "checkpoint":
            return _checkpoint(found)
        page = _weights(found, is_trusted=is_trusted)
        return replace(page, uses=uses_of(found, is_trusted=is_trusted))
    except AiprodError as error:
        return Inspection(
            kind=IN_WORDS[found.kind],
            path=str(found.path),
            facts={},
            problem=str(error),
            uses=uses_of(found, is_trusted=is_trusted, problem=str(error)),
        )


def _run(found: Found) -> Inspection:
    store = CheckpointStore(found.path / "checkpoints")
    names = store.names()
    if not names:
        raise CheckpointError(
            f"{found.path}: must be a run folder with checkpoints, got none. Name the folder given as "
            "--output-dir."
        )
    read = {name: _read(store, name) for name in names}
    rows = tuple(_checkpoint_row(name, checkpoint) for name, checkpoint in read.items())
    broken = [row.name for row in rows if row.problem]
    problem = f"{len(broken)} of {len(rows)} checkpoints are not whole" if broken else None
    newest = next((each for each in read.values() if isinstance(each, Checkpoint)), None)
    uses = uses_of(found, is_trusted=False, newest=newest, problem=rows[0].problem)
    return Inspection(
        kind=IN_WORDS["run"],
        path=str(found.path),
        facts={},
        checkpoints=rows,
        problem=problem,
        uses=uses,
    )


def _read(store: CheckpointStore, name: str) -> Checkpoint | CheckpointError:
    try:
        checkpoint = store.read(store.folder / name)
        require_layout(checkpoint.state.layout, where=str(checkpoint.folder))
    except CheckpointError as error:
        return error
    return checkpoint


def _checkpoint_row(name: str, checkpoint: Checkpoint | CheckpointError) -> CheckpointRow:
    if isinstance(checkpoint, CheckpointError):
        return CheckpointRow(name=name, problem=str(checkpoint))
    return CheckpointRow(
        name=name,
        clock=asdict(checkpoint.state.clock),
        layout=dict(checkpoint.state.layout),
        num_bytes=_bytes_of(checkpoint),
    )


def _checkpoint(found: Found) -> Inspection:
    checkpoint = CheckpointStore(found.path.parent).read(found.path)
    with ShardReader(checkpoint.engine_folder) as reader:
        kinds = {kind: len(reader.names(kind)) for kind in ("master", "exp_avg", "ema", "frozen", "buffer")}
    weights = CheckpointWeights(checkpoint.folder)
    facts = {**asdict(checkpoint.state.clock), **checkpoint.state.layout, "bytes": _bytes_of(checkpoint)}
    facts["data"] = _data_of(checkpoint)
    facts |= {
        "trained": kinds["master"],
        "with moments": kinds["exp_avg"],
        "averaged": kinds["ema"],
        "frozen": kinds["frozen"],
    }
    if weights.missing_base is not None:
        facts["frozen weights"] = f"not here but of {weights.missing_base}"
    verified = "every file has the bytes and the hash of the manifest; every tensor is whole"
    page = _with_tensors(found, weights, facts, verified=verified)
    return replace(page, uses=uses_of(found, is_trusted=False, newest=checkpoint))


def _data_of(checkpoint: Checkpoint) -> str:
    clips = read_clips(checkpoint.folder)
    if clips is None:
        return "not told: the checkpoint is from before lists of clips"
    counts = f"{clips.num_training} clips trained on, {clips.num_held_out} held out"
    return f"{counts}, compared by {clips.by}, sha256 {clips.sha256}"


def _bytes_of(checkpoint: Checkpoint) -> int:
    return sum(record.bytes for record in read_manifest(checkpoint.folder).values())


def _weights(found: Found, *, is_trusted: bool) -> Inspection:
    if found.kind == "tensors" or (found.kind == "lora" and found.path.is_file()):
        with open_tensors(found.path) as file:
            facts: dict[str, Any] = {"metadata": file.metadata}
            if found.kind == "lora":
                facts |= _facts_of_keys(found.path)
            return _with_tensors(found, file, facts, verified="the header fits the file")
    if found.kind == "lora":
        with open_tensors(found.path / WEIGHTS_FILE) as file:
            return _with_tensors(found, file, _lora_facts(found.path), verified="the header fits the file")
    if found.kind == "weights":
        return _folder_of_weights(found)
    files = [path for path in sorted(found.path.rglob("*")) if path.is_file()]
    facts = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    if not is_trusted:
        facts["tensors"] = "not listed: its files are pickles. If it is your own, give --trust-checkpoint"
        return Inspection(kind=IN_WORDS[found.kind], path=str(found.path), facts=facts)
    if found.kind == "deepspeed":
        folder = DeepSpeedFolder(found.path, is_trusted=True)
        stage = {0: "0", 2: "1 or 2", 3: "3"}[folder.zero_stage]
        facts |= {
            "ZeRO stage": stage,
            "ranks": folder.world_size,
            "updates": folder.updates,
            "trained": len(folder.trained),
        }
        return _with_tensors(found, folder, facts, verified="all ranks' files are there and fit")
    sharded = DistributedFolder(found.path, is_trusted=True)
    return _with_tensors(
        found, sharded, {**facts, "top level": ", ".join(sharded.top_level)}, verified="all chunks are named"
    )


def _folder_of_weights(found: Found) -> Inspection:
    folder = WeightsFolder(found.path)
    facts: dict[str, Any] = {"files": len({folder.file_of(name) for name in folder})}
    verified = "headers fit the files, and the index"
    if (found.path / CONFIG).is_file():
        model = read_diffusers_config(found.path)
        folder.require_shapes(model.shapes)
        facts["class"] = model.class_name
        verified += f"; names and shapes are those of {model.class_name}"
    return _with_tensors(found, folder, facts, verified=verified)


def _facts_of_keys(path: Path) -> Mapping[str, Any]:
    lora = describe_lora(path)
    alpha = {} if lora.has_alpha else {"alpha": "not said"}
    return {
        "rank": ", ".join(map(str, lora.ranks)),
        **alpha,
        **({"beside": lora.special} if lora.special else {}),
    }


def _lora_facts(folder: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(read_text(folder / "adapter_config.json"))
        return {"rank": values["r"], "alpha": values["lora_alpha"], "layers": len(values["target_modules"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}/adapter_config.json: must be PEFT's, got {error!r}. Load it again."
        ) from error


def _with_tensors(
    found: Found, source: TensorSource, facts: Mapping[str, Any], *, verified: str
) -> Inspection:
    rows = tuple(
        TensorRow(
            name=name, dtype=str(spec.dtype).removeprefix("torch."), shape=spec.shape, num_bytes=spec.nbytes
        )
        for name, spec in source.specs.items()
    )
    return Inspection(
        kind=IN_WORDS[found.kind], path=str(found.path), facts=dict(facts), tensors=rows, verified=verified
    )
