"""Sounds of any layout as mono or stereo, by a stated matrix.

Owns the matrix. Called by `audio.py` and `probe.py`. Shapes: C channels, N samples.

    L = g (FL + 0.7071 FC + 0.7071 SL + 0.5 SC)     R likewise; LFE is left out
    g = 1 / (sum of a row's weights)                5.1: 1 / 2.414 = 0.4142

Worked number: 0.5 in the front left and 0.5 in the centre of 5.1 become 0.3536 on the left and 0.1464 on the
right.

Source: ITU-R BS.775-4, table 2. SL stands for each channel at the side or back, also above; SC for a single
one in the middle, with FFmpeg's weight. Deviation: normalised by g, so that nothing is clipped; 5.1 becomes
up to 7.7 dB quieter, which `data.loudness_lufs` undoes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiprod_ds.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_SIDE, _BOTH = 0.5**0.5, 0.5
# What each of FFmpeg's channels gives to left and right.
_WEIGHTS = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (_SIDE, _SIDE),
    "LFE": (0.0, 0.0),
    "LFE2": (0.0, 0.0),
    "FLC": (1.0, 0.0),
    "FRC": (0.0, 1.0),
    "DL": (1.0, 0.0),
    "DR": (0.0, 1.0),
    "BC": (_BOTH, _BOTH),
    "TC": (_BOTH, _BOTH),
    "TFC": (_BOTH, _BOTH),
    "TBC": (_BOTH, _BOTH),
    **dict.fromkeys(("SL", "BL", "WL", "SDL", "TFL", "TBL", "TSL"), (_SIDE, 0.0)),
    **dict.fromkeys(("SR", "BR", "WR", "SDR", "TFR", "TBR", "TSR"), (0.0, _SIDE)),
}
# WAV and others may leave names out; these two numbers of channels have one order that all use.
_UNNAMED = {
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}
_NO_NAMES = frozenset({"NONE", "UNK"})
_MAX_PLAIN_CHANNELS = 2


def check_layout(channels: int, layout: Sequence[str] | None) -> None:
    """Checks that a sound can be mixed down.

    Args:
        channels: How many.
        layout: Their names as FFmpeg has them, all `NONE` where a file leaves them out; None for a tensor,
            which may have anything in that axis.

    Raises:
        DataError: If it is neither mono nor stereo and its channels have no known places; names no file.
    """
    if channels <= _MAX_PLAIN_CHANNELS:
        return
    names = None if layout is None else _names(channels, layout)
    unknown = [] if names is None else sorted(set(names) - set(_WEIGHTS))
    if names is None or unknown:
        got = f"{channels} channels" + (f", among them {', '.join(unknown)}" if unknown else "")
        raise DataError(f"it must be mono or stereo, or name its channels, got {got}. Mix it down to stereo")


def with_channels(wave_CN: Tensor, channels: int, layout: Sequence[str] | None = None) -> Tensor:
    """Returns the sound with 1 or 2 channels: mono is repeated, stereo averaged, more are mixed to stereo
    first.

    Args:
        wave_CN: [C,N] floating in [-1,1].
        channels: 1 or 2.
        layout: Names of the channels; see `check_layout`, which must have passed.

    Returns:
        [channels,N] in [-1,1].
    """
    if wave_CN.shape[0] > _MAX_PLAIN_CHANNELS:
        wave_CN = _matrix(wave_CN, layout) @ wave_CN
    if wave_CN.shape[0] == channels:
        return wave_CN
    return wave_CN.mean(dim=0, keepdim=True) if channels == 1 else wave_CN.expand(channels, -1)


def _matrix(wave_CN: Tensor, layout: Sequence[str] | None) -> Tensor:
    import torch  # not above: looking into files needs no torch, which takes seconds to load

    names = None if layout is None else _names(wave_CN.shape[0], layout)
    assert names is not None, "see check_layout"
    matrix_2C = torch.tensor([_WEIGHTS[name] for name in names], dtype=torch.float64).T
    # One factor for both sides, or a layout that is not symmetric would move to a side.
    return (matrix_2C / matrix_2C.sum(dim=1).max()).to(wave_CN.dtype)


def _names(channels: int, layout: Sequence[str]) -> Sequence[str] | None:
    return _UNNAMED.get(channels) if set(layout) <= _NO_NAMES else layout
