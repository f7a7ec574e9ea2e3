"""Files are written through `files.py` and `appended_file.py`, so that none is torn; what goes around them is
listed here with its reason."""

from __future__ import annotations

import ast
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2] / "aiprod_ds"
_WRITERS = {"write_text", "write_bytes", "savefig", "save_file", "SummaryWriter"}
_OPENS = {"open", "fdopen"}
# Files that write by themselves, and why no half file of theirs counts.
_ALLOWED = {
    "files.py": "it is the place",
    "checkpoint": "a folder that counts once it is renamed",
    "tensor_file.py": "writes for these two",
    "cli_data.py": "opens what `files.replacing` names",
    "cluster/probe.py": "measures the disk and removes the file",
    "cluster/start.py": "a temporary folder",
    "crash.py": "the traceback of an error, in the folder for temporary files",
    "data/latents.py": "a `.part` that is renamed, and removed after an error",
    "data/synthetic.py": "clips for tests and examples",
    "media": "a folder `.unfinished`, or what `files.replacing` names",
    "metrics/tensorboard_media.py": "writes into memory",
    "models/lora.py": "a folder that `convert` renames, or an export, which is removed after an error",
    "report/cost_plot.py": "writes what `files.replacing` names",
    "report/plots.py": "writes what `files.replacing` names",
    "shards/cache.py": "a `.part` that is renamed; a cache is made anew",
    "shards/reader.py": "a descriptor that it is given",
    "shards/storage.py": "writes what `files.replacing` names",
    "shards/writer.py": "the folder for temporary files",
    "starting": "copies for a user, who sees them",
    "testing": "tests",
    "train/resume/shared_folder.py": "a word that is compared and removed",
    "train/watchdog.py": "stacks of a process that is about to end: half of them is better than none",
    "validate": "folders of its own, which are removed",
    "trainers/preview.py": "a folder `.unfinished`",
    "trainers/preview_prompts.py": "writes what `files.replacing` names",
    "trainers/vae_export.py": "an export, which is removed after an error",
    "trainers/video_examples.py": "a folder `.unfinished`",
}


def _writes(path: Path) -> list[int]:
    """Returns the lines that open a file for writing or write one by its name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        texts += [keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and text and set(text) <= set("wxarb+t")]
        is_open = called in _OPENS and any(set(mode) & set("wxa+") for mode in modes)
        if called in _WRITERS or is_open:
            found.append(node.lineno)
    return found


def test_what_writes_around_the_one_place_is_known() -> None:
    writing = {
        path.relative_to(_PACKAGE).as_posix(): lines
        for path in sorted(_PACKAGE.rglob("*.py"))
        if (lines := _writes(path))
    }
    unknown = {
        name: lines
        for name, lines in writing.items()
        if not any(name == allowed or name.startswith(f"{allowed}/") for allowed in _ALLOWED)
    }
    assert not unknown, "write through aiprod_ds.files or aiprod_ds.appended_file, or say here why not"
    stale = [
        allowed
        for allowed in _ALLOWED
        if not any(name == allowed or name.startswith(f"{allowed}/") for name in writing)
    ]
    assert stale == [], "these write nothing any more"
