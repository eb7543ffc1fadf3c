"""Named streams of random numbers, each derived from the run's one seed.

Draws from one stream do not affect another: a wider model keeps the same shuffle, and an epoch's
shuffle does not depend on earlier epochs.
"""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """The seed of the stream `names`, in [0, 2**63): the first 63 bits of a sha256."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
