"""Pictures and sound as an MP4 that any player opens: H.264 in 4:2:0, and AAC.

Owns the encoding and nothing of what is shown; the bytes can travel between processes. Shapes: T frames, H x
W pixels, C channels, N samples.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

_LAYOUTS = {1: "mono", 2: "stereo"}
_FALLBACK_RATE_HZ = 48_000
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sound:
    """What is heard beside pictures.

    Attributes:
        samples: [1 or 2, N] float in [-1, 1].
        sample_rate_hz: Samples per second.
    """

    samples: Tensor
    sample_rate_hz: int


def encode_mp4(frames_THWC: Pixels, *, frame_rate_hz: float, sound: Sound | None = None) -> bytes:
    """Returns the file's bytes.

    A last row or column is doubled where height or width are odd, because 4:2:0 has no odd sizes. Samples
    outside [-1, 1] are clipped. A sound with samples that are not finite is left out, and the log says so.

    Args:
        frames_THWC: [T, H, W, 3] RGB bytes.
        frame_rate_hz: Frames per second.
        sound: Begins with the first frame. AAC knows some rates only; others are resampled to 48 kHz.

    Raises:
        ValueError: If the sound has more than two channels or no sample.
    """
    even_THWC = np.pad(
        frames_THWC,
        ((0, 0), (0, frames_THWC.shape[1] % 2), (0, frames_THWC.shape[2] % 2), (0, 0)),
        mode="edge",
    )
    samples_CN = None if sound is None else _finite(sound)
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        rate = Fraction(frame_rate_hz).limit_denominator(1001)  # NTSC's rates are n * 1000/1001
        # Three times as fast as x264's own preset at the same crf: a signal waits for the film under way.
        picture = container.add_stream("h264", rate=rate, options={"crf": "16", "preset": "veryfast"})
        picture.height, picture.width, picture.pix_fmt = even_THWC.shape[1], even_THWC.shape[2], "yuv420p"
        voice = None
        if sound is not None and samples_CN is not None:
            voice = container.add_stream(
                "aac", rate=_aac_rate_hz(sound.sample_rate_hz), layout=_LAYOUTS[len(samples_CN)]
            )
        for image in even_THWC:
            container.mux(
                picture.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
            )
        container.mux(picture.encode(None))
        if sound is not None and samples_CN is not None and voice is not None:
            container.mux(voice.encode(_audio_frame(samples_CN, sound.sample_rate_hz)))
            container.mux(voice.encode(None))
    return file.getvalue()


def _finite(sound: Sound) -> npt.NDArray[np.float32] | None:
    samples_CN = sound.samples.detach().to("cpu", torch.float32)
    if samples_CN.ndim != 2 or samples_CN.shape[0] not in _LAYOUTS or samples_CN.shape[1] == 0:
        raise ValueError(
            f"sound: must be [1 or 2, N] with N above 0, got {list(samples_CN.shape)}. Mix it down to stereo."
        )
    if not bool(samples_CN.isfinite().all()):
        _LOG.warning("sound_not_written reason=samples_not_finite")
        return None
    clipped: npt.NDArray[np.float32] = samples_CN.clamp(-1, 1).contiguous().numpy()
    return clipped


def _aac_rate_hz(sample_rate_hz: int) -> int:
    known = av.Codec("aac", "w").audio_rates or []
    return sample_rate_hz if sample_rate_hz in known else _FALLBACK_RATE_HZ


def _audio_frame(samples_CN: npt.NDArray[np.float32], sample_rate_hz: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(samples_CN, format="fltp", layout=_LAYOUTS[len(samples_CN)])
    frame.sample_rate, frame.pts, frame.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
    return frame
