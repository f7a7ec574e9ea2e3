"""Named random streams: every draw is a function of (seed, names), never of what was drawn before.

No generator lives longer than one draw site, so there is no random state to save and a resumed run draws what
the uninterrupted one would have drawn. Pure Python; callers make their own numpy or torch generator from the
seed.
"""

import hashlib


def stream_seed(seed: int, *names: str | int) -> int:
    """Returns the 63-bit seed of the stream called `names` under the run's `seed`.

    Streams of different names are independent; the same names give the same seed on every machine and Python
    version. Example: `stream_seed(0, "clip", sample_index, epoch)`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *names):
        kind = b"i" if isinstance(part, int) else b"s"
        digest.update(kind + str(part).encode() + b"\x00")
    return int.from_bytes(digest.digest(), "little") >> 1
