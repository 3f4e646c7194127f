"""Members of a study that add numbers: their terms, and stores that outlive a restart."""

from __future__ import annotations

from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.privacy.fixed_point import FixedPoint
from p2pfl.protocol.sum_terms import PlannedSum, SumTerms

STATISTICS = FixedPoint(bits=128, fraction_bits=60)
STUDY = "5a" * 32


@cache
def signing_key(member):
    return Ed25519PrivateKey.from_private_bytes(bytes([member + 1] * 32))


def identity(member):
    return signing_key(member).public_key().public_bytes_raw().hex()


def terms_of(num_members, participants=None, *, num_sums=2, shape=(3,), bound=1e6, study=STUDY, number_format=STATISTICS, **more):
    sums = [PlannedSum(statistic=f"sum {each}", shape=shape, number_format=number_format, bound=bound) for each in range(num_sums)]
    return SumTerms(
        study=study,
        sums=tuple(sums),
        participants=tuple(range(num_members) if participants is None else participants),
        names=tuple(f"clinic-{each}" for each in range(num_members)),
        identities=tuple(identity(each) for each in range(num_members)),
        **more,
    )
