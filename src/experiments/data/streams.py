"""Named streams of random numbers, each derived from the run's one seed.

What draws from a stream of its own is not disturbed by what another draws: a wider model has
the same shuffle, and the shuffle of an epoch needs no history to be known.
"""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """The seed, in [0, 2**63), of the stream that `names` name: the head of a sha256."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
