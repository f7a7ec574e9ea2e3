"""What a run's evaluations have to show, put together for the page: of every held-out clip its original, its
newest reconstruction and earlier ones; of every preview the newest and earlier ones.

Owns which of them are shown: the first and the newest always, of the rest a few at even distances.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from aiprod_ds.metrics.evaluations import EvaluationRecord, Medium
from aiprod_ds.report.page.media_files import Embedder
from aiprod_ds.report.page.spectrogram import Levels, Scale, levels_of

_MAX_EARLIER = 5
_MAX_SETS = 48  # clips or prompts on one page

Moment = tuple[EvaluationRecord, Medium]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One file as the template draws it.

    Attributes:
        kind: picture, film or sound.
        when: The moment in words, e.g. `update 300, after phase low`; `original` of an original.
        url: Empty if there is no such file.
        note: What to know of it: that it is not inside the page, or is gone.
        spectrogram: URL of its picture, of a sound.
        scale: What the picture's axes and colours mean.
    """

    kind: str
    when: str
    url: str
    file_name: str
    caption: str
    note: str = ""
    spectrogram: str = ""
    scale: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """A held-out clip or a prompt, with everything that is shown of it.

    Attributes:
        title: The file that the clip is of, or the prompt.
        original: None for a preview.
        earlier: From the oldest on.
        num_left_out: Moments between those that are shown.
    """

    title: str
    number: int
    original: Shown | None
    newest: Shown | None
    earlier: tuple[Shown, ...]
    num_left_out: int

    @property
    def has_pair(self) -> bool:
        """Whether original and reconstruction are both there and can be laid over each other."""
        both = (self.original, self.newest)
        return all(shown is not None and shown.url and shown.kind != "sound" for shown in both)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Everything to look at and to listen to."""

    clips: tuple[Exhibit, ...]
    sounds: tuple[Exhibit, ...]
    previews: tuple[Exhibit, ...]
    sheets: tuple[Shown, ...]
    num_linked: int
    num_left_out: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.clips or self.sounds or self.previews or self.sheets)


def gallery_of(records: Sequence[EvaluationRecord], files: Embedder) -> Gallery:
    """Returns what is shown of the evaluations, the newest first taken into the page."""
    moments = [(record, medium) for record in records for medium in record.media]
    films = _by_clip(moments, ("film", "picture"))
    sounds = _by_clip(moments, ("sound",))
    previews = _by_prompt(moments)
    sets = [*films.values(), *sounds.values(), *previews.values()]
    # What matters most is taken into the page before its bound is reached.
    for chosen in (_newest, _first):
        for found in sets[:_MAX_SETS]:
            for medium in chosen(found):
                files.source(medium.path)
    clips = [_exhibit(number, found, files) for number, found in _some(films)]
    heard = [_exhibit(number, found, files) for number, found in _some(sounds)]
    made = [
        _exhibit(place, found, files, title=prompt)
        for place, (prompt, found) in enumerate(_some(previews), start=1)
    ]
    sheets = [moment for moment in moments if moment[1].role in {"sheet", "spectrogram"}]
    return Gallery(
        clips=tuple(clips),
        sounds=tuple(heard),
        previews=tuple(made),
        sheets=tuple(_shown(moment, files) for moment in _ends(sheets)),
        num_linked=files.num_linked,
        num_left_out=max(len(films), len(sounds), len(previews), _MAX_SETS) - _MAX_SETS,
    )


def moment_words(record: EvaluationRecord) -> str:
    """Returns when an evaluation was made, in words."""
    if record.reason == "before":
        return "before training"
    words = f"update {record.update:,}"
    return f"{words}, after phase {record.phase}" if record.reason == "phase_end" else words


def _some(found: dict[str, list[Moment]]) -> Iterable[tuple[str, list[Moment]]]:
    return list(found.items())[:_MAX_SETS]


def _by_clip(moments: Iterable[Moment], kinds: Sequence[str]) -> dict[str, list[Moment]]:
    """Returns originals and reconstructions by the number of their clip, of the first kind that it has."""
    found: dict[str, list[Moment]] = {}
    for moment in moments:
        medium = moment[1]
        if medium.role in {"original", "reconstruction"} and medium.clip is not None and medium.kind in kinds:
            found.setdefault(str(medium.clip), []).append(moment)
    for number, own in found.items():
        kind = next(kind for kind in kinds if any(medium.kind == kind for _, medium in own))
        found[number] = [moment for moment in own if moment[1].kind == kind]
    return found


def _by_prompt(moments: Iterable[Moment]) -> dict[str, list[Moment]]:
    """Returns previews by their prompt, those without one by their number."""
    found: dict[str, list[Moment]] = {}
    for moment in moments:
        medium = moment[1]
        if medium.role == "preview":
            number = "" if medium.clip is None else f" {medium.clip}"
            found.setdefault(medium.prompt or medium.source or f"Preview{number}", []).append(moment)
    return found


def _newest(moments: Sequence[Moment]) -> list[Medium]:
    originals = [medium for _, medium in moments if medium.role == "original"][-1:]
    return originals + [medium for _, medium in moments if medium.role != "original"][-1:]


def _first(moments: Sequence[Moment]) -> list[Medium]:
    return [medium for _, medium in moments if medium.role != "original"][:1]


def _exhibit(number: str | int, moments: Sequence[Moment], files: Embedder, *, title: str = "") -> Exhibit:
    originals = [moment for moment in moments if moment[1].role == "original"]
    made = [moment for moment in moments if moment[1].role != "original"]
    source = next((moment[1].source for moment in reversed(moments) if moment[1].source), "")
    first, newest = _levels(originals[-1:], files), _levels(made[-1:], files)
    scale = next((levels.scale() for levels in (first, newest) if levels is not None), None)
    earlier = _thinned(made[:-1])
    return Exhibit(
        title=title or PurePosixPath(source).name,
        number=int(number),
        original=_shown(originals[-1], files, levels=first, scale=scale) if originals else None,
        newest=_shown(made[-1], files, levels=newest, scale=scale) if made else None,
        earlier=tuple(_shown(moment, files) for moment in earlier),
        num_left_out=max(len(made) - 1 - len(earlier), 0),
    )


def _shown(
    moment: Moment, files: Embedder, *, levels: Levels | None = None, scale: Scale | None = None
) -> Shown:
    record, medium = moment
    source = files.source(medium.path)
    picture, words = "", ""
    if levels is not None and scale is not None:
        picture = files.data(levels.png(scale), "image/png")
        words = f"{levels.axes_text}; {scale.text}"
    return Shown(
        kind=medium.kind if medium.kind in {"picture", "film", "sound"} else "file",
        when="original" if medium.role == "original" else moment_words(record),
        url=source.url,
        file_name=medium.path,
        caption=medium.caption if medium.clip is None else "",  # its card says which clip it is
        note=source.note,
        spectrogram=picture,
        scale=words,
    )


def _levels(moments: Sequence[Moment], files: Embedder) -> Levels | None:
    if not moments or moments[0][1].kind != "sound":
        return None
    path = files.file(moments[0][1].path)
    return None if path is None else levels_of(path)


def _thinned(moments: Sequence[Moment], count: int = _MAX_EARLIER) -> list[Moment]:
    """Returns the first moment and others at even distances."""
    if len(moments) <= count:
        return list(moments)
    places = [round(index * (len(moments) - 1) / (count - 1)) for index in range(count)]
    return [moments[place] for place in places]


def _ends(sheets: Sequence[Moment]) -> list[Moment]:
    """Returns the sheets of the newest evaluation that has some, and those of the first."""
    if not sheets:
        return []
    newest = [moment for moment in sheets if moment[0] is sheets[-1][0]]
    first = [moment for moment in sheets if moment[0] is sheets[0][0]]
    return newest if newest[0] is first[0] else [*newest, *first]
