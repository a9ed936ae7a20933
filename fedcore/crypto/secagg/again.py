"""Another attempt of a round: what a client asks to see that has sent masked words in one before.

A coordinator that had the sum of an attempt could claim that it failed, repeat it without one client, and
subtract. So a client that has sent masked words enters another attempt only where a quorum of the cohort has
signed that the first was given up. Each client signs that or the set that is summed, never both, so while
fewer than a third of them lie no attempt has both quorums.
"""

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.crypto.secagg.cohort import Cohort
from fedcore.crypto.secagg.errors import Aborted
from fedcore.crypto.secagg.parameters import quorum
from fedcore.crypto.secagg.signing import agree, parsed, votes
from fedcore.errors import ProtocolError
from fedcore.messages import Ref
from fedcore.wire.v1 import secagg_pb2 as pb


def receipt(cohort: Cohort) -> bytes:
    """Return what a client has to keep from before it sends masked words: the attempt, and who is in it."""
    ref = cohort.config.ref
    keys = [member.signer for member in cohort.members]
    kept = pb.SentWords(
        run=ref.run,
        round=ref.round,
        attempt=ref.attempt,
        kind=ref.kind,
        transcript=cohort.context.transcript,
        keys=keys,
    )
    return kept.SerializeToString()


def certificate(cohort: Cohort, signatures: Mapping[int, bytes]) -> bytes:
    """Return the proof that an attempt was given up; b"" without a quorum's signatures."""
    if len(signatures) < quorum(len(cohort.members)):
        return b""
    given_up = pb.Certificate(transcript=cohort.context.transcript, aborted=votes(signatures))
    return pb.Certificates(attempts=[given_up]).SerializeToString()


def enter(ref: Ref, sent: bytes, certificate: bytes) -> None:
    """Raise Aborted where a client that has sent masked words (its `receipt`) must not enter an attempt."""
    if not sent:
        return
    before = pb.SentWords.FromString(sent)
    if (before.run, before.round, before.kind) != (ref.run, ref.round, ref.kind):
        return
    if before.attempt >= ref.attempt:
        raise Aborted(
            f"this device has sent masked words in attempt {before.attempt} of round {ref.round}, so it does "
            f"not enter attempt {ref.attempt}"
        )
    try:
        attempts = parsed(pb.Certificates, certificate).attempts
    except ProtocolError as error:
        raise Aborted(f"the certificate of the attempt before is malformed: {error}") from error
    keys = [ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), key) for key in before.keys]
    given_up = before.transcript
    for each in attempts:
        if each.transcript == given_up and agree(keys, each.aborted, "aborted", given_up, b""):
            return
    raise Aborted(
        f"this device has sent masked words in attempt {before.attempt} of round {ref.round}, and nothing "
        f"proves that it was given up: {quorum(len(keys))} of its {len(keys)} clients would have signed that"
    )
