"""DeepSpeed's own checkpoints, read tensor by tensor: what runs outside this project, or before it, have
saved.

    latest                            text: the name of the folder below, such as `global_step500`

and in that folder, R counting ranks:

    mp_rank_00_model_states.pt                        ZeRO-0 to 2: all weights, 16-bit where training was
    zero_pp_rank_R_mp_rank_00_model_states.pt         ZeRO-3: names, shapes, buffers, shards of frozen weights
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt  ZeRO-1 to 3: fp32 weights, flat, cut over the ranks

Trained parameters come from the fp32 weights; frozen ones and buffers in the type they were saved in.
DeepSpeed's own converter loses the frozen ones of ZeRO-1; here they are read from the model's file. Layout as
of DeepSpeed 0.19.8, utils/zero_to_fp32.py; whole files pass through `restricted_pickle`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.convert.restricted_pickle import load_saved, require_trust
from aiprod_ds.errors import CheckpointError
from aiprod_ds.tensor_file import TensorSource, TensorSpec

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_STATE_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_NAME = re.compile(r"[\w.=-]{1,200}", flags=re.ASCII)
_MAPPED_BYTES = (
    256 << 20
)  # read before the files are mapped anew: pages that were read count as this process's memory


def find_tag_folder(folder: Path) -> Path | None:
    """Returns the folder with DeepSpeed's files: `folder` itself, or the one that `latest` in it names; None
    if there is none.

    Looks at names only, except for the text of `latest`.

    Raises:
        CheckpointError: If `latest` names something outside `folder`, or nothing.
    """
    if any(_model_files(folder)):
        return folder
    latest = folder / "latest"
    if not latest.is_file():
        return None
    with latest.open("rb") as file:
        tag = file.read(1024).decode("utf-8", "replace").strip()
    if not _NAME.fullmatch(tag) or set(tag) == {"."}:
        raise CheckpointError(
            f"{latest}: must be the name of a folder beside it, got {tag[:80]!r}. Name the folder itself."
        )
    return folder / tag if any(_model_files(folder / tag)) else None


class DeepSpeedFolder(TensorSource):
    """The weights in one of DeepSpeed's checkpoints.

    Args:
        folder: The one of a tag, with the files in it, from `find_tag_folder`.
        is_trusted: Whether the user said so. Without it nothing is opened.

    Attributes:
        zero_stage: 0; 2 for 1 and 2, which have one layout; 3.
        world_size: Ranks that saved.
        updates: DeepSpeed's `global_steps`.
        trained: Names of the parameters whose fp32 weights were found.

    Raises:
        CheckpointError: If the folder is not trusted, incomplete, damaged, or of model, pipeline or expert
            parallelism.
    """

    def __init__(self, folder: Path, *, is_trusted: bool) -> None:
        self.folder = folder
        require_trust(folder, is_trusted=is_trusted, what="a checkpoint of DeepSpeed")
        self._model_files, self._state_files = _files(folder)
        self.world_size = max(len(self._state_files), 1)
        self._mapped: dict[Path, dict[str, Any]] = {}
        self._num_read = 0
        with _explained(folder):
            model = self._load(self._model_files[0])
            self.updates = int(model["global_steps"])
            self._shared = dict(model.get("shared_params") or {})
            self._places, self.zero_stage = self._trained(model["param_shapes"])
            self.trained = tuple(self._places)
            self._frozen = dict(model.get("frozen_param_shapes") or {}) if self.zero_stage == 3 else {}
            others = self._others(model)
            self.specs = {
                **{
                    name: TensorSpec(dtype=torch.float32, shape=shape)
                    for name, (_, _, shape) in self._places.items()
                },
                **others,
            }
            self.specs |= {
                alias: self.specs[name] for alias, name in self._shared.items() if name in self.specs
            }

    def __getitem__(self, name: str) -> Tensor:
        name = self._shared.get(name, name)
        spec = self.specs[name]
        with _explained(self.folder):
            if name in self._places:
                value = self._gathered(name)
            elif name in self._frozen:
                files = [self._load(path) for path in self._model_files]
                value = torch.cat([file["frozen_param_fragments"][name].reshape(-1) for file in files])[
                    : spec.numel
                ]
            else:
                value = self._load(self._model_files[0])["module"][name].clone()
        self._forget(value.nbytes)
        return value.reshape(spec.shape)

    def _gathered(self, name: str) -> Tensor:
        group, offset, shape = self._places[name]
        numel = math.prod(shape)
        states = [self._load(path)["optimizer_state_dict"] for path in self._state_files]
        if self.zero_stage == 3:
            own = -(-numel // self.world_size)
            parts = [
                part for state in states for part in _range(state["fp32_flat_groups"], offset, offset + own)
            ]
        else:
            flats = [state["single_partition_of_fp32_groups"][group] for state in states]
            parts = list(_range(flats, offset, offset + numel))
        return torch.cat(parts)[:numel].float()

    def _trained(self, groups: Any) -> tuple[dict[str, tuple[int, int, tuple[int, ...]]], int]:
        """Returns group, offset in its flat tensors and shape of every trained parameter, and the stage."""
        if not self._state_files:
            return {}, 0
        state = self._load(self._state_files[0])["optimizer_state_dict"]
        counts = state["partition_count"]
        if (max(counts) if isinstance(counts, Sequence) else counts) != self.world_size:
            raise CheckpointError(
                f"{self.folder}: must hold the states of {counts} ranks, got {self.world_size} files. It is "
                "incomplete."
            )
        if "fp32_flat_groups" in state:
            shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
            places, end = _placed(shapes, lambda numel: -(-numel // self.world_size), [0] * len(shapes))
            self._require_length(end, sum(flat.numel() for flat in state["fp32_flat_groups"]), exact=True)
            return {name: (0, offset, shapes[name]) for name, offset in places.items()}, 3
        paddings = state.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        found: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        for index, group in enumerate(groups):
            shapes = {name: tuple(shape) for name, shape in group.items()}
            places, end = _placed(shapes, lambda numel: numel, paddings[index])
            lengths = [self._load_flat_length(path, index) for path in self._state_files]
            self._require_length(end, sum(lengths), exact=False)
            found |= {name: (index, offset, shapes[name]) for name, offset in places.items()}
        return found, 2

    def _load_flat_length(self, path: Path, group: int) -> int:
        length: int = self._load(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"][
            group
        ].numel()
        return length

    def _require_length(self, needed: int, found: int, *, exact: bool) -> None:
        unit = 1 if exact else 2 * self.world_size  # ZeRO-1 and 2 pad a group to a multiple of it
        if -(-needed // unit) != -(-found // unit):
            raise CheckpointError(
                f"{self.folder}: must hold {needed} numbers of trained parameters, got {found}. A file is "
                "of another checkpoint."
            )

    def _others(self, model: Mapping[str, Any]) -> dict[str, TensorSpec]:
        if self.zero_stage < 3:
            names = [
                name for name in model["module"] if name not in self._places and name not in self._shared
            ]
            missing = sorted(set(model.get("frozen_param_shapes") or {}) - set(names))
            if missing:
                raise CheckpointError(
                    f"{self.folder}: was saved without frozen parameters ({', '.join(missing[:3])}). Take "
                    "them from their base."
                )
            return {name: TensorSpec.of(model["module"][name]) for name in names}
        fragments = model.get("frozen_param_fragments") or {}
        frozen = {
            name: TensorSpec(dtype=fragments[name].dtype, shape=tuple(shape))
            for name, shape in self._frozen.items()
        }
        return {**frozen, **{name: TensorSpec.of(model["module"][name]) for name in model["buffer_names"]}}

    def _load(self, path: Path) -> dict[str, Any]:
        if path not in self._mapped:
            self._mapped[path] = load_saved(path)
        return self._mapped[path]

    def _forget(self, num_bytes: int) -> None:
        self._num_read += num_bytes
        if self._num_read >= _MAPPED_BYTES:
            self._mapped.clear()
            self._num_read = 0


def _model_files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if _MODEL_FILE.fullmatch(path.name))


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files of the model and of the states by rank, after checking that they are all that there
    must be."""
    names = {path.name: path for path in folder.iterdir()}
    models = {match: path for name, path in names.items() if (match := _MODEL_FILE.fullmatch(name))}
    states = {match: path for name, path in names.items() if (match := _STATE_FILE.fullmatch(name))}
    parallel = [name for name in names if name.startswith("layer_") or "expert" in name]
    parallel += [path.name for match, path in {**models, **states}.items() if int(match[2])]
    if parallel:
        raise CheckpointError(
            f"{folder}: must be of data parallelism alone, got {sorted(parallel)[0]} of model, pipeline or "
            "expert parallelism. "
            "Convert it with DeepSpeed's own tools."
        )
    model_files = _by_rank(folder, {int(match[1] or 0): path for match, path in models.items()})
    state_files = _by_rank(folder, {int(match[1]): path for match, path in states.items()})
    is_zero_3 = any(match[1] for match in models)
    if is_zero_3 and len(model_files) != len(state_files):
        raise CheckpointError(
            f"{folder}: must hold a model file and a state file of every rank, got {len(model_files)} and "
            f"{len(state_files)}. "
            "It is incomplete."
        )
    return model_files, state_files


def _by_rank(folder: Path, paths: Mapping[int, Path]) -> list[Path]:
    missing = sorted(set(range(max(paths, default=-1) + 1)) - paths.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: must hold the files of all ranks, got none of rank {missing[0]}. It is incomplete."
        )
    return [paths[rank] for rank in sorted(paths)]


def _range(flats: Iterable[Tensor], begin: int, end: int) -> Iterator[Tensor]:
    """Yields what lies in [begin, end) of some flat tensors that follow each other."""
    start = 0
    for flat in flats:
        first, last = max(begin, start), min(end, start + flat.numel())
        if first < last or begin == end:
            yield flat.reshape(-1)[first - start : max(last, first) - start]
        start += flat.numel()


def _placed(
    shapes: Mapping[str, tuple[int, ...]], own: Any, paddings: Sequence[int]
) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        offsets[name] = end
        end += own(math.prod(shape)) + padding
    return offsets, end


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: must be laid out as DeepSpeed 0.19 does it, got {type(error).__name__}: {error}. It "
            "is damaged or newer."
        ) from error
