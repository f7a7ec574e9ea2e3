"""Whole frames out of interlaced ones: FFmpeg's bwdif, one frame for each frame, exact at any place.

Owns the filter; which frames are its neighbours is `frames.py`'s. Called by `pixels.py`.
"""

from __future__ import annotations

from fractions import Fraction

import av
from av.filter import Graph

# As FFmpeg's tools: one frame a frame, whose parity the frame itself says.
_BWDIF = "mode=send_frame:parity=auto:deint=interlaced"
_TIME_BASE = Fraction(1, 1000)  # of no consequence: times are read before


class Deinterlacer:
    """Gives of an interlaced frame the picture of its first field, with the lines between from its
    neighbours.

    It depends on the frame and its two neighbours alone. Frames that are asked for in order are filtered once
    each; after others it begins anew.
    """

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._last: av.VideoFrame | None = None

    def whole(
        self, frame: av.VideoFrame, *, before: av.VideoFrame | None, after: av.VideoFrame | None
    ) -> av.VideoFrame:
        """Returns `frame` deinterlaced.

        Args:
            frame: Marked as interlaced.
            before: The frame that is displayed before it; None if it is the first.
            after: The frame that is displayed after it; None if it is the last.
        """
        if self._graph is None or self._last is not frame:
            self._begin(frame, before)
        assert self._graph is not None, "just begun"
        self._push(after)
        result = self._graph.vpull()
        self._last = after
        if after is None:
            self._graph = None
        return result

    def _begin(self, frame: av.VideoFrame, before: av.VideoFrame | None) -> None:
        graph = Graph()
        buffer = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base=str(_TIME_BASE),
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
        )
        graph.link_nodes(buffer, graph.add("bwdif", _BWDIF), graph.add("buffersink")).configure()
        self._graph = graph
        if before is not None:
            self._push(before)
        self._push(frame)
        if before is not None:
            graph.vpull()

    def _push(self, frame: av.VideoFrame | None) -> None:
        assert self._graph is not None, "just begun"
        self._graph.vpush(frame)
