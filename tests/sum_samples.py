"""One valid message of each kind of secure sums, for the tests of the wire."""

from __future__ import annotations

import numpy as np

from p2pfl.wire.secure_messages import (
    CheckValue,
    HeldTotals,
    LastSignedRequest,
    MaskedDigest,
    MaskedSubtotal,
    Opening,
    SessionEnd,
    SignedTotal,
    Total,
)
from p2pfl.wire.sum_codec import SumPresence

TRANSCRIPT = b"\xbb" * 32
SIGNATURE = b"\x51" * 64
OF_SUM = {"transcript": TRANSCRIPT, "sum_id": "cc" * 32, "position": 1}
BY = {"member": 2, "signature": SIGNATURE}
LIMBS = np.array([[1, 2], [2**64 - 1, 2**63]], dtype=np.uint64)

OPENING = Opening(
    study="5a" * 32,
    plan="0f" * 32,
    participants=(0, 1, 2),
    session=3,
    public=b"\x11" * 32,
    nonce=b"\x22" * 32,
    member=2,
    signature=SIGNATURE,
)
HELD = HeldTotals(transcript=TRANSCRIPT, macs=(("cc" * 32, b"\x33" * 32),), **BY)
DIGEST = MaskedDigest(**OF_SUM, digest=b"\x44" * 32, **BY)
SIGNED = SignedTotal(**OF_SUM, participants=(0, 1, 2), mac=b"\x55" * 32, **BY)
CHECK = CheckValue(**OF_SUM, own=2**127 + 1, received=((0, 1),), sent=2**127 + 2, **BY)
END = SessionEnd(study="5a" * 32, session=3, reason="clinic-1: away", names=(1,), **BY)
LAST = LastSignedRequest(member=2)
SUBTOTAL = MaskedSubtotal(**OF_SUM, limbs=LIMBS)
TOTAL = Total(**OF_SUM, limbs=LIMBS)
PRESENCE = SumPresence(incarnation=22, echo=11, sent=5, lost=1, done=b"\x05")

EVERY_SUM_MESSAGE = (OPENING, HELD, DIGEST, SIGNED, CHECK, END, LAST, SUBTOTAL, TOTAL, PRESENCE)
