"""What fuzzers share: values that nobody means, and a seed's source of them."""

import random

INTEGERS = [
    "-1",
    "1.5",
    "1e3",
    "x",
    "",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5000,
    "-" + "9" * 30,
    "0x10",
    "--",
    "1 2",
    "None1",
]
FLOATS = ["nan", "inf", "-inf", "1e999", "-1", "x", "", "9" * 400, "0,5", "1/2"]
WORDS = [
    "nonsense",
    "",
    " ",
    ":",
    "..x:y",
    ".x:y",
    "os:system",
    "math:pi",
    "a\0b",
    "\ud800",
    "x" * 300,
    "*",
    "[",
    "../x",
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four accidents: flipped bits, lost, doubled, moved or foreign pieces."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        where, length = rng.randrange(len(found) + 1), rng.choice([1, 1, 2, 8, 64])
        piece = bytes(found[where : where + length])
        kind = rng.randrange(7)
        if kind == 0 and piece:
            found[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[where : where + length]
        elif kind == 2:
            found[where:where] = piece * rng.choice([1, 3])
        elif kind == 3:
            found[where : where + length] = rng.randbytes(length)
        elif kind == 4:
            del found[where:]
        elif kind == 5:
            found[where : where + length] = (
                rng.choice([b"\0", b"\xff", b"1", b"9", b'"', b"{", b"[", b"-", b"null"]) * length
            )
        else:
            found += rng.randbytes(length)
    return bytes(found)
