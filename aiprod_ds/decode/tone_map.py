"""HDR and wide-gamut pictures as an SDR display shows them: BT.709 primaries, BT.1886 curve, 8 bits.

Owns the curves and the primaries. Called by `pixels.py`. Shapes: H height, W width, three channels last.

    light = EOTF(code)                          PQ: ST 2084;  HLG: BT.2100 with its OOTF at 1000 cd/m2
    light = light * EETF(m) / m,  m = max RGB   BT.2390's roll-off from 1000 to 203 cd/m2
    code  = (M light / 203) ** (1 / 2.4)        M: to BT.709's primaries; clipped to [0, 1]

203 cd/m2 is HDR's reference white (BT.2408) and becomes the most that SDR shows. Up to 88 cd/m2 nothing is
compressed; above 1000 all is white. Worked numbers: HLG's 75 % and PQ's 58.07 % are 203 cd/m2, which become
0.903. SDR in the primaries of BT.2020 or Display P3 only gets BT.709's primaries.

Source: ITU-R BT.2100-2 tables 4 and 5, BT.2390-10 section 5.4.1, BT.2408-4, BT.1886. Deviations: the roll-off
is applied to the largest of R, G, B, so that hues stay; the peak is taken as 1000 cd/m2 whatever a file says
of itself, so that frames and files are treated alike; what leaves BT.709's gamut is clipped.
"""

from __future__ import annotations

import functools
from typing import Literal, cast

import av
import numpy as np
from numpy.typing import NDArray

Transfer = Literal["pq", "hlg", "sdr"]
Floats = NDArray[np.float32]

SDR_WHITE = 203.0
"""In cd/m2."""
HDR_PEAK = 1000.0
"""In cd/m2."""
_SDR_GAMMA = 2.4
_HLG_SYSTEM_GAMMA = 1.2
_HLG_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
# Numbers of ISO/IEC 23091-2, as FFmpeg counts.
_TRANSFERS: dict[int, Transfer] = {16: "pq", 18: "hlg"}
_UNSPECIFIED_PRIMARIES, _BT709, _BT2020, _DISPLAY_P3 = 2, 1, 9, 12
_CHROMATICITIES = {
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    _BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    _DISPLAY_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_WHITE = (0.3127, 0.3290)
_STEPS = 2**16


def transfer_of(frame: av.VideoFrame) -> Transfer:
    """Returns the transfer curve that the frame says it has."""
    return _TRANSFERS.get(frame.color_trc, "sdr")


def is_wide(frame: av.VideoFrame) -> bool:
    """Returns whether `to_sdr` is needed: the frame is HDR or in wider primaries than BT.709's."""
    return frame.color_trc in _TRANSFERS or frame.color_primaries in (_BT2020, _DISPLAY_P3)


def to_sdr(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """Returns a frame of which `is_wide` holds, [H,W,3] uint8 RGB."""
    codes = cast("NDArray[np.uint16]", frame.to_ndarray(format="rgb48le"))
    return sdr_of_codes(codes, transfer_of(frame), frame.color_primaries)


def sdr_of_codes(codes_HWC: NDArray[np.uint16], transfer: Transfer, primaries: int) -> NDArray[np.uint8]:
    """Returns RGB codes of 16 bits as SDR.

    Args:
        codes_HWC: [H,W,3] uint16, full range.
        transfer: Their curve.
        primaries: Their primaries as ISO/IEC 23091-2 numbers them; of others than BT.2020, Display P3 and
            BT.709, HDR is taken as BT.2020 and SDR as BT.709.

    Returns:
        [H,W,3] uint8.
    """
    light_HWC = _light_table(transfer)[codes_HWC]
    if transfer == "hlg":
        luminance_HW = light_HWC @ _HLG_LUMINANCE
        light_HWC *= (luminance_HW ** np.float32(_HLG_SYSTEM_GAMMA - 1))[..., None]
    if transfer != "sdr":
        red_HW, green_HW, blue_HW = np.moveaxis(light_HWC, -1, 0)
        largest_HW = np.maximum(np.maximum(red_HW, green_HW), blue_HW)  # numpy's max over three is slow
        light_HWC *= _gain_table()[_index(largest_HW)][..., None]
    known = primaries if primaries in _CHROMATICITIES else (_BT709 if transfer == "sdr" else _BT2020)
    if known != _BT709:
        light_HWC = light_HWC @ _to_bt709(known).T
    return _code_table(transfer)[_index(light_HWC)]


def pq_light(code: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the light in cd/m2 of PQ codes in [0,1] (BT.2100 table 4)."""
    power = code ** (1 / _PQ_M2)
    light: NDArray[np.float64] = 10_000 * (np.maximum(power - _PQ_C1, 0) / (_PQ_C2 - _PQ_C3 * power)) ** (
        1 / _PQ_M1
    )
    return light


def pq_code(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the PQ codes of light in cd/m2; the inverse of `pq_light`."""
    power = (light / 10_000) ** _PQ_M1
    code: NDArray[np.float64] = ((_PQ_C1 + _PQ_C2 * power) / (1 + _PQ_C3 * power)) ** _PQ_M2
    return code


_PQ_M1, _PQ_M2 = 2610 / 16384, 2523 / 4096 * 128
_PQ_C1, _PQ_C2, _PQ_C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_HLG_A = 0.17883277
_HLG_B, _HLG_C = 1 - 4 * _HLG_A, 0.5 - _HLG_A * float(np.log(4 * _HLG_A))


def rolled_off(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns what BT.2390's EETF makes of light in cd/m2: at most `SDR_WHITE`, with black at 0."""
    peak = float(pq_code(np.array(HDR_PEAK)))
    most = float(pq_code(np.array(SDR_WHITE))) / peak
    knee = 1.5 * most - 0.5
    code = np.minimum(pq_code(light) / peak, 1.0)
    t = np.maximum(code - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    )
    return pq_light(np.where(code < knee, code, spline) * peak)


# Tables, because a power of every pixel of a 4K frame would take a second. Light is relative to `HDR_PEAK`,
# of SDR to its white. Tables over light have its square root as index, which keeps dark steps fine.
def _index(light: Floats) -> NDArray[np.uint16]:
    index = light.clip(0, 1)
    np.sqrt(index, out=index)
    index *= _STEPS - 1
    index += 0.5
    return index.astype(np.uint16)


def _indexed_light() -> NDArray[np.float64]:
    light: NDArray[np.float64] = np.linspace(0, 1, _STEPS) ** 2
    return light


@functools.cache
def _light_table(transfer: Transfer) -> Floats:
    code = np.linspace(0, 1, _STEPS)
    if transfer == "pq":
        light = pq_light(code) / HDR_PEAK
    elif transfer == "hlg":
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - _HLG_C) / _HLG_A) + _HLG_B) / 12)
    else:
        light = code**_SDR_GAMMA
    return light.astype(np.float32)


@functools.cache
def _gain_table() -> Floats:
    light = _indexed_light() * HDR_PEAK
    gain = np.ones(_STEPS)
    gain[1:] = rolled_off(light[1:]) / light[1:]
    return gain.astype(np.float32)


@functools.cache
def _code_table(transfer: Transfer) -> NDArray[np.uint8]:
    white = 1.0 if transfer == "sdr" else SDR_WHITE / HDR_PEAK
    code = (_indexed_light() / white).clip(0, 1) ** (1 / _SDR_GAMMA)
    return (code * 255 + 0.5).astype(np.uint8)


@functools.cache
def _to_bt709(primaries: int) -> Floats:
    matrix = np.linalg.inv(_to_xyz(_BT709)) @ _to_xyz(primaries)
    return matrix.astype(np.float32)


def _to_xyz(primaries: int) -> NDArray[np.float64]:
    """Returns the matrix from linear RGB of those primaries, with D65 as white, to XYZ."""
    columns = np.array([_xyz(x, y) for x, y in _CHROMATICITIES[primaries]]).T
    scales = np.linalg.solve(columns, np.array(_xyz(*_WHITE)))
    matrix: NDArray[np.float64] = columns * scales
    return matrix


def _xyz(x: float, y: float) -> tuple[float, float, float]:
    return x / y, 1.0, (1 - x - y) / y
