"""What an encoding run did, in a few lines for people. The command line prints it."""

from __future__ import annotations

from collections.abc import Iterator

from aiprod_ds.data.latents import AUDIO_LATENTS, CONDITIONS, LATENTS
from aiprod_ds.encode.run import EncodeSummary

_MOST_NAMES = 5


def summary_text(summary: EncodeSummary) -> str:
    """Returns a table of the entries by source, and the clips that have none: five of them by name, the rest
    in a file."""
    return "\n".join(
        [
            f"Encoded into {summary.output_dir} in {summary.seconds:.1f} s.",
            *_table(summary),
            *([summary.shards] if summary.shards else []),
            *(f"Note: {note}." for note in summary.notes),
            *_left_out(summary),
        ]
    )


def _table(summary: EncodeSummary) -> Iterator[str]:
    yield f"{'':<15}{'written':>9}{'present':>9}"
    for source in (CONDITIONS, LATENTS, AUDIO_LATENTS):
        if source in {**summary.written, **summary.present}:
            yield f"  {source:<13}{summary.written.get(source, 0):>9}{summary.present.get(source, 0):>9}"


def _left_out(summary: EncodeSummary) -> Iterator[str]:
    if summary.too_short:
        named = ", ".join(summary.too_short[:_MOST_NAMES])
        yield (
            f"Too short for every shape: {len(summary.too_short)}, "
            f"{named}{', ...' * (len(summary.too_short) > _MOST_NAMES)}"
        )
    if summary.failures:
        yield f"Failed: {len(summary.failures)}"
        yield from (
            f"  {failure.clip}: {failure.what}: {failure.reason}"
            for failure in summary.failures[:_MOST_NAMES]
        )
    if summary.too_short or summary.failures:
        yield f"All of them: {summary.failures_file}"
