"""HDR as SDR: known points of the standards, the closed form for whole films, and what is left as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aiprod_ds.decode.probe import probe
from aiprod_ds.decode.tone_map import HDR_PEAK, SDR_WHITE, pq_code, pq_light, rolled_off, sdr_of_codes
from aiprod_ds.decode.video import decode_clip
from aiprod_ds.testing.awkward import Coding, write_codes

_PQ, _HLG = 16, 18
_BT709, _BT2020, _P3 = 1, 9, 12


def _grey(codes: list[float], transfer: str, primaries: int = _BT2020) -> list[int]:
    array = np.round(np.array(codes)[None, :, None].repeat(3, axis=2) * 65535).astype(np.uint16)
    return sdr_of_codes(array, transfer, primaries)[0, :, 0].tolist()  # type: ignore[arg-type]


def test_pq_is_that_of_the_standard() -> None:
    # BT.2100 and BT.2408, table 1: 10,000 cd/m2 are 100 %, 1000 are 75 %, 203 are 58 %, 100 are 51 %.
    codes = pq_code(np.array([10_000, 1000, 203, 100, 0.0]))
    np.testing.assert_allclose(codes, [1.0, 0.7518, 0.5807, 0.5081, 0.0], atol=1e-4)
    np.testing.assert_allclose(pq_light(codes), [10_000, 1000, 203, 100, 0.0], rtol=1e-9, atol=1e-9)


def test_the_roll_off_keeps_dark_light_and_never_exceeds_white() -> None:
    light = np.linspace(0.01, 4000, 20_000)
    rolled = rolled_off(light)
    # The knee: BT.2390's KS = 1.5 maxLum - 0.5 of the PQ range up to 1000 cd/m2, which is 88 cd/m2.
    most = float(pq_code(np.array(SDR_WHITE)) / pq_code(np.array(HDR_PEAK)))
    knee = float(pq_light((1.5 * most - 0.5) * pq_code(np.array(HDR_PEAK))))
    assert knee == pytest.approx(88, abs=0.5)
    np.testing.assert_allclose(rolled[light < knee], light[light < knee], rtol=1e-6)
    assert (np.diff(rolled) >= -1e-9).all()
    assert rolled[light >= HDR_PEAK] == pytest.approx(SDR_WHITE)


@pytest.mark.parametrize(
    ("transfer", "codes"),
    [
        ("pq", [0.0, 0.5807, 0.7518, 1.0]),
        # BT.2408, table 1: HLG's 75 % are 203 cd/m2 on a display of 1000.
        ("hlg", [0.0, 0.75, 1.0, 1.0]),
    ],
)
def test_reference_white_and_peak_become_the_numbers_of_the_docstring(
    transfer: str, codes: list[float]
) -> None:
    # 203 cd/m2 are rolled off to 159.0: (159.0 / 203) ** (1 / 2.4) = 0.903.
    assert float(rolled_off(np.array(203.0))) == pytest.approx(159.0, abs=0.1)
    found = _grey(codes, transfer)
    assert found == pytest.approx([0, 0.903 * 255, 255, 255], abs=1)


def _sdr_codes(rgb: list[float], transfer: str) -> np.ndarray:
    """Returns the closed form of one colour of BT.2020, in float64 with the matrices of BT.2087."""
    code = np.array(rgb)
    if transfer == "pq":
        light = 10_000 * (
            np.maximum(code ** (32 / 2523) - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * code ** (32 / 2523))
        ) ** (16384 / 2610)
    else:
        scene = np.where(
            code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
        )
        light = 1000 * float(scene @ [0.2627, 0.6780, 0.0593]) ** 0.2 * scene
    largest = light.max()
    light = light * float(rolled_off(np.array(largest))) / largest
    # BT.2087-0, annex 1, inverted: linear BT.2020 to linear BT.709.
    to_bt709 = np.linalg.inv([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    return 255 * ((to_bt709 @ light) / 203).clip(0, 1) ** (1 / 2.4)


@pytest.mark.parametrize(("transfer", "tag"), [("pq", _PQ), ("hlg", _HLG)])
@pytest.mark.parametrize("rgb", [[0.75, 0.75, 0.75], [0.6, 0.45, 0.4], [0.35, 0.5, 0.45], [0.7, 0.7, 0.65]])
def test_a_film_in_hdr_is_trained_on_as_sdr(
    tmp_path: Path, transfer: str, tag: int, rgb: list[float]
) -> None:
    # BT.2100: Y'CbCr of R'G'B' without constant luminance, in 10 bits of limited range.
    luma = float(np.array(rgb) @ [0.2627, 0.6780, 0.0593])
    blue, red = (rgb[2] - luma) / 1.8814, (rgb[0] - luma) / 1.4746
    codes = np.round([64 + 876 * luma, 512 + 896 * blue, 512 + 896 * red]).astype(np.uint16)
    tags = {"color_range": 1, "color_trc": tag, "color_primaries": _BT2020, "colorspace": 9}
    path = write_codes(
        tmp_path / "hdr.mp4",
        np.broadcast_to(codes[:, None, None], (3, 32, 48)),
        Coding(codec="libx264", pixel_format="yuv444p10le", options={"qp": "0"}, tags=tags),
    )
    record = probe(path)
    assert (record.hdr, record.is_wide_gamut) == (transfer, False)
    (frame,) = decode_clip(path, start_seconds=0, num_frames=1, frame_rate_hz=None)
    # Tolerance: steps of 10 bits, which are steep in the dark, and of 8.
    assert np.abs(frame[16, 24].astype(float) - _sdr_codes(rgb, transfer)).max() < 3
    # Read as SDR it would be another picture.
    assert np.abs(frame[16, 24].astype(float) - 255 * np.array(rgb)).max() > 10


def test_sdr_in_wide_primaries_gets_those_of_bt709() -> None:
    # Greys stay; BT.709's green in BT.2020 is (0.3293, 0.9195, 0.0880) of light (BT.2087), and comes back.
    assert _grey([0.0, 0.25, 0.5, 1.0], "sdr") == pytest.approx([0, 64, 128, 255], abs=1)
    light = np.array([0.3293, 0.9195, 0.0880])
    codes = np.round(light ** (1 / 2.4) * 65535).astype(np.uint16)[None, None]
    assert sdr_of_codes(codes, "sdr", _BT2020)[0, 0].tolist() == pytest.approx([0, 255, 0], abs=8)


def test_greys_of_every_primaries_are_alike() -> None:
    codes = [0.1, 0.4, 0.6]
    assert _grey(codes, "pq", _BT2020) == _grey(codes, "pq", _P3) == _grey(codes, "pq", 2)


def test_a_film_tagged_as_bt709_is_not_converted(tmp_path: Path) -> None:
    codes = np.broadcast_to(np.uint16([502, 512, 512])[:, None, None], (3, 32, 48))
    tags = {"color_range": 1, "color_trc": 1, "color_primaries": _BT709, "colorspace": 1}
    coding = Coding(codec="libx264", pixel_format="yuv444p10le", options={"qp": "0"}, tags=tags)
    path = write_codes(tmp_path / "sdr.mp4", codes, coding)
    assert (probe(path).hdr, probe(path).is_wide_gamut) == (None, False)
    (frame,) = decode_clip(path, start_seconds=0, num_frames=1, frame_rate_hz=None)
    assert frame[16, 24].tolist() == pytest.approx([(502 - 64) / 876 * 255] * 3, abs=1)
