"""The golden vectors: the code gives them, and docs/secagg-protocol.md alone is enough to read them.

The reader below shares nothing with the package: protocol buffers, X25519 (RFC 7748), AES-256 (FIPS 197),
GCM (SP 800-38D), ECDSA on P-256 and Shamir's scheme from their definitions, slow and plain.
"""

import hmac
import json
import runpy
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedcore.wire.v1 import secagg_pb2 as pb

VECTORS = Path(__file__).parents[2] / "vectors"
LABEL = b"fedcore secagg 1\0"


@cache
def stored() -> dict[str, Any]:
    vectors: dict[str, Any] = json.loads((VECTORS / "secagg.json").read_text())
    return vectors


def test_the_code_gives_the_vectors() -> None:
    assert json.loads(json.dumps(runpy.run_path(str(VECTORS / "secagg.py"))["vectors"]())) == stored()


def test_the_page_has_the_fields_of_all_messages() -> None:
    page = (VECTORS.parents[1] / "docs" / "secagg-protocol.md").read_text().replace("\\*", "")
    kept = {"SentWords", "Recorded", "From"}  # by one side for itself
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        told = (f"{field.number} `{field.name}`" for field in message.fields)
        assert name in kept or f"| `{name}` | {', '.join(told)} |" in page


# --- the reader: primitives


def fields(message: bytes) -> dict[int, list[Any]]:
    """Return a protocol buffer's fields by number: numbers and bytes."""
    found: dict[int, list[Any]] = {}
    rest = iter(message)

    def number() -> int:
        value = shift = 0
        for byte in rest:
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        return value

    for byte in rest:
        field, kind = byte >> 3, byte & 7
        assert kind in (0, 2)
        value = number() if kind == 0 else bytes([next(rest) for _ in range(number())])
        found.setdefault(field, []).append(value)
    return found


def x25519(private: bytes, public: bytes) -> bytes:
    """Return the Montgomery ladder's result (RFC 7748, section 5)."""
    p = 2**255 - 19
    k = int.from_bytes(private, "little") & ~7 & (1 << 255) - 1 | 1 << 254
    u = int.from_bytes(public, "little") & (1 << 255) - 1
    x2, z2, x3, z3 = 1, 0, u, 1
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, e = d * a, c * b, a * a - b * b
        x3, z3 = (da + cb) ** 2 % p, u * (da - cb) ** 2 % p
        x2, z2 = a * a * b * b % p, e * (a * a + 121665 * e) % p
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, -1, p) % p).to_bytes(32, "little")


BASE = (9).to_bytes(32, "little")


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """Return HKDF-SHA256 (RFC 5869)."""
    extracted, block, out = hmac.digest(salt, secret, "sha256"), b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([i]), "sha256")
        out += block
    return out[:length]


def times(a: int, b: int) -> int:
    """Return a product in AES's field."""
    product = 0
    while b:
        product ^= a * (b & 1)
        a, b = a << 1 ^ (a >> 7) * 0x11B, b >> 1
    return product


def substituted(x: int) -> int:
    """Return AES's S-box: the inverse x^254, then an affine map."""
    inverse = 1
    for _ in range(254):
        inverse = times(inverse, x)
    rotated = [inverse << i | inverse >> 8 - i for i in range(5)]
    return (rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ rotated[4] ^ 0x63) & 255


SBOX = [substituted(x) for x in range(256)]


def aes(key: bytes, block: bytes) -> bytes:
    """Return AES-256 of a block."""
    words, power = [list(key[i : i + 4]) for i in range(0, 32, 4)], 1
    for i in range(8, 60):
        word = words[-1]
        if i % 8 == 0:
            word = [SBOX[byte] for byte in word[1:] + word[:1]]
            word[0] ^= power
            power = times(power, 2)
        elif i % 8 == 4:
            word = [SBOX[byte] for byte in word]
        words.append([a ^ b for a, b in zip(words[-8], word, strict=True)])
    keys = [[byte for word in words[i : i + 4] for byte in word] for i in range(0, 60, 4)]
    state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
    for each in keys[1:]:
        state = [SBOX[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]
        if each is not keys[-1]:
            columns = [state[i : i + 4] for i in range(0, 16, 4)]
            state = [
                times(c[r], 2) ^ times(c[(r + 1) % 4], 3) ^ c[(r + 2) % 4] ^ c[(r + 3) % 4]
                for c in columns
                for r in range(4)
            ]
        state = [a ^ b for a, b in zip(state, each, strict=True)]
    return bytes(state)


def key_stream(key: bytes, count: int, start: int = 0) -> bytes:
    blocks = (aes(key, (start + i).to_bytes(16, "big")) for i in range(-(-count // 16)))
    return b"".join(blocks)[:count]


def gcm_opened(key: bytes, sealed: bytes, bound: bytes) -> bytes:
    """Return what AES-256-GCM encrypted under a nonce of zeros; asserts the tag."""
    content, tag = sealed[:-16], sealed[-16:]
    h = int.from_bytes(aes(key, bytes(16)), "big")
    padded = b"".join(part + bytes(-len(part) % 16) for part in (bound, content))
    padded += (8 * len(bound)).to_bytes(8, "big") + (8 * len(content)).to_bytes(8, "big")
    y = 0
    for i in range(0, len(padded), 16):
        x, y, v = y ^ int.from_bytes(padded[i : i + 16], "big"), 0, h
        for bit in range(127, -1, -1):
            y ^= v * (x >> bit & 1)
            v = v >> 1 ^ (v & 1) * (0xE1 << 120)
    mask = int.from_bytes(aes(key, (1).to_bytes(16, "big")), "big")
    assert (y ^ mask).to_bytes(16, "big") == tag
    stream = key_stream(key, len(content), 2)
    return bytes(a ^ b for a, b in zip(content, stream, strict=True))


P = 2**256 - 2**224 + 2**192 + 2**96 - 1
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
Point = tuple[int, int] | None


def added(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % P == 0:
        return None
    slope = (3 * a[0] ** 2 - 3) * pow(2 * a[1], -1, P) if a == b else (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope**2 - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def multiplied(k: int, point: Point) -> Point:
    result: Point = None
    for bit in bin(k)[2:]:
        result = added(result, result)
        if bit == "1":
            result = added(result, point)
    return result


def signed(certificate: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether ECDSA's signature (DER) is that of the key in a certificate."""
    r_end = 4 + signature[3]
    r, s = int.from_bytes(signature[4:r_end], "big"), int.from_bytes(signature[r_end + 2 :], "big")
    inverse, e = pow(s, -1, ORDER), int.from_bytes(sha256(message).digest(), "big")
    found = added(multiplied(e * inverse % ORDER, G), multiplied(r * inverse % ORDER, signer(certificate)))
    return found is not None and found[0] % ORDER == r


def signer(certificate: bytes) -> tuple[int, int]:
    """Return the P-256 key of a certificate: the bit string that follows the curve's name."""
    at = certificate.index(bytes.fromhex("06082a8648ce3d03010703420004")) + 14
    x, y = (int.from_bytes(certificate[at + i : at + i + 32], "big") for i in (0, 32))
    assert (y * y - x**3 + 3 * x) % P == 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
    return x, y


PRIME = 2**256 + 297


def combined(shares: dict[int, bytes]) -> bytes:
    """Return Lagrange's interpolation at 0."""
    total = 0
    for x, share in shares.items():
        weight = 1
        for other in shares.keys() - {x}:
            weight = weight * other * pow(other - x, -1, PRIME) % PRIME
        total += weight * int.from_bytes(share, "big")
    return (total % PRIME).to_bytes(32, "big")


def words(key: bytes, bits: int, count: int) -> list[int]:
    stream, size = key_stream(key, count * bits // 8), bits // 8
    return [int.from_bytes(stream[i : i + size], "little") for i in range(0, len(stream), size)]


def members(bits: bytes) -> list[int]:
    return [i for i in range(8 * len(bits)) if bits[i // 8] >> i % 8 & 1]


def u32(*positions: int) -> bytes:
    return b"".join(position.to_bytes(4, "big") for position in positions)


# --- the reader: the page


def digest_of(config: dict[str, Any]) -> bytes:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return sha256(LABEL + b"config\0" + text.encode()).digest()


DIGEST = digest_of(stored()["config"]["fields"])


def test_configuration_and_transcript() -> None:
    assert DIGEST.hex() == stored()["config"]["digest"]
    cohort = bytes.fromhex(stored()["transcript"]["cohort"])
    transcript = sha256(LABEL + b"transcript\0" + DIGEST + cohort).hexdigest()
    assert transcript == stored()["transcript"]["transcript"]


def test_keys() -> None:
    given = {name: bytes.fromhex(value) for name, value in stored()["keys"].items()}
    secret, transcript = given["secret"], given["transcript"]
    assert x25519(secret, given["peer"]) == given["agreed"]
    assert sha256(LABEL + b"seed\0" + DIGEST + secret).digest() == given["commitment"]
    info = LABEL + b"self\0" + u32(2) + transcript
    assert hkdf(secret, DIGEST, info, 64) == given["self mask of member 2"]
    info = LABEL + b"pair\0" + u32(1, 2) + transcript
    assert hkdf(given["agreed"], DIGEST, info, 64) == given["pair mask of members 2 and 1"]
    info = LABEL + b"share\0" + u32(1, 2) + transcript
    key = hkdf(given["agreed"], DIGEST, info, 32)
    assert gcm_opened(key, given["ciphertext from member 1 to 2"], info) == given["shares from member 1 to 2"]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_mask(bits: int) -> None:
    given = stored()["mask"]
    assert words(bytes.fromhex(given["key"]), bits, 6) == given[f"uint{bits}"]


def test_shares() -> None:
    given = stored()["shamir"]
    points, shares = given["points"], [bytes.fromhex(share) for share in given["shares"]]
    draw = bytes.fromhex(given["draw"])
    coefficients = [int(given["secret"], 16)] + [int.from_bytes(draw[i : i + 48], "big") for i in (0, 48)]
    values = [sum(c * x**i for i, c in enumerate(coefficients)) % PRIME for x in points]
    assert [int.from_bytes(share, "big") for share in shares] == values
    for chosen in ([0, 1, 2], [1, 2, 3], [3, 0, 2]):
        assert combined({points[i]: shares[i] for i in chosen}).hex() == given["secret"]


def test_bitmap() -> None:
    given = stored()["bitmap"]
    assert members(bytes.fromhex(given["bytes"])) == given["members"]


class Exchange:
    """The messages of the attempt, read: contents by step and by who said them, all signatures checked."""

    def __init__(self) -> None:
        self.given = stored()["exchange"]
        self.names = sorted(self.given["draws"])
        certificates: dict[str, bytes] = {}
        self.contents: dict[str, dict[str, bytes]] = {}
        context = DIGEST
        for each in self.given["said"]:
            said = fields(bytes.fromhex(each["message"]))
            step, content, signature = said[1][0].decode(), said.get(2, [b""])[0], said[3][0]
            speaker = each.get("from", "coordinator")
            if step == "advertise":
                certificates[speaker] = fields(content)[5][0]
            if step == "cohort":
                certificates["coordinator"] = fields(content)[3][0]
            message = LABEL + step.encode() + b"\0" + context + content
            assert signed(certificates[speaker], signature, message)
            if step == "cohort":
                self.transcript = context = sha256(LABEL + b"transcript\0" + DIGEST + content).digest()
            for name in each.get("to", [speaker]):
                self.contents.setdefault(step, {})[name] = content
        self.certificates = certificates

    def content(self, step: str) -> bytes:
        """Return what all were told."""
        (content,) = set(self.contents[step].values())
        return content


@pytest.fixture(scope="module")
def exchange() -> Exchange:
    return Exchange()


def drawn(exchange: Exchange, name: str) -> list[bytes]:
    return [bytes.fromhex(each) for each in exchange.given["draws"][name]]


def test_the_steps_of_the_exchange(exchange: Exchange) -> None:
    assert list(exchange.contents) == [
        "advertise", "cohort", "share", "delivery", "receive", "edges", "confirm", "confirmed", "included",
        "agree", "quorum", "reveal",
    ]  # fmt: skip


def test_the_advertisements_of_the_exchange(exchange: Exchange) -> None:
    told = [fields(said) for said in fields(exchange.content("cohort"))[1]]
    for said, name in zip(told, exchange.names, strict=True):
        assert said[2][0] == exchange.contents["advertise"][name]
        s, c, b, nonce = drawn(exchange, name)[:4]
        advertisement = fields(said[2][0])
        commitment = sha256(LABEL + b"seed\0" + DIGEST + b).digest()
        assert [advertisement[i][0] for i in (1, 2, 3, 4)] == [
            x25519(s, BASE), x25519(c, BASE), commitment, nonce
        ]  # fmt: skip


def test_the_shares_of_the_exchange(exchange: Exchange) -> None:
    """Each opens with the keys of its two ends, and any t of a secret's give it."""
    for i, name in enumerate(exchange.names):
        others = [j for j in range(4) if j != i]
        s, c, b = drawn(exchange, name)[:3]
        opened: dict[int, bytes] = {}
        for j, sealed in zip(others, fields(exchange.contents["share"][name])[1], strict=True):
            info = LABEL + b"share\0" + u32(i, j) + exchange.transcript
            theirs = x25519(drawn(exchange, exchange.names[j])[1], BASE)
            opened[j + 1] = gcm_opened(hkdf(x25519(c, theirs), DIGEST, info, 32), sealed, info)
            arrived = fields(exchange.contents["delivery"][exchange.names[j]])[1]
            assert sealed == arrived[i - (i > j)]
        two = dict(list(opened.items())[1:])  # t = floor(2 n / 3) = 2 of 4
        assert combined({x: both[:33] for x, both in two.items()}) == b
        assert combined({x: both[33:] for x, both in two.items()}) == s


def test_the_quorums_of_the_exchange(exchange: Exchange) -> None:
    edges = exchange.content("edges")
    for i, holder in enumerate(fields(holder) for holder in fields(edges)[1]):
        assert holder[2][0] == exchange.contents["receive"][exchange.names[i]]
        assert members(holder[2][0]) == [j for j in range(4) if j != i]
        message = LABEL + b"receive\0" + exchange.transcript + holder[2][0]
        assert signed(exchange.certificates[exchange.names[i]], holder[3][0], message)
    confirmed, agreed = sha256(edges).digest(), sha256(edges).digest() + exchange.content("included")
    assert set(exchange.contents["confirm"].values()) == {confirmed}
    assert set(exchange.contents["agree"].values()) == {agreed}
    for step, shown, content in (("confirm", "confirmed", confirmed), ("agree", "quorum", agreed)):
        voters = [fields(vote) for vote in fields(exchange.content(shown))[1]]
        assert len(voters) == 3  # floor(2 n / 3) + 1 of 4, and one is lost
        for vote in voters:
            name = exchange.names[vote.get(1, [0])[0]]
            message = LABEL + step.encode() + b"\0" + exchange.transcript + content
            assert signed(exchange.certificates[name], vote[2][0], message)


MODULI = {"narrow": 2**32, "wide": 2**64}
Kinds = dict[str, list[int]]  # the narrow words, and the wide ones


def masks(secret: bytes, purpose: bytes, positions: list[int], transcript: bytes) -> Kinds:
    """Return the words of a mask."""
    config = stored()["config"]["fields"]
    info = LABEL + purpose + b"\0" + u32(*sorted(positions)) + transcript
    keys = hkdf(secret, DIGEST, info, 64)
    narrow = words(keys[:32], config["bits"], config["narrow"])
    return {"narrow": narrow, "wide": words(keys[32:], 64, config["wide"])}


def with_masks(rows: list[Kinds], terms: list[tuple[int, Kinds]]) -> Kinds:
    """Return the sum of rows, with masks added (1) or subtracted (-1)."""
    summands = [*((1, row) for row in rows), *terms]
    return {
        kind: [
            sum(sign * row[kind][at] for sign, row in summands) % modulus for at in range(len(rows[0][kind]))
        ]
        for kind, modulus in MODULI.items()
    }


def test_the_masked_words_of_the_exchange(exchange: Exchange) -> None:
    keys = [drawn(exchange, name)[0] for name in exchange.names]
    for i, name in enumerate(exchange.names):
        if name not in exchange.given["masked"]:
            continue
        terms = [(1, masks(drawn(exchange, name)[2], b"self", [i], exchange.transcript))]
        for j in (j for j in range(4) if j != i):
            agreed = x25519(keys[i], x25519(keys[j], BASE))
            terms.append((1 if i < j else -1, masks(agreed, b"pair", [i, j], exchange.transcript)))
        assert with_masks([exchange.given["words"][name]], terms) == exchange.given["masked"][name]


def test_the_sum_of_the_exchange(exchange: Exchange) -> None:
    """From what the coordinator sees alone: revealed shares, public keys and masked words."""
    included = members(exchange.content("included"))
    revealed: dict[int, dict[int, bytes]] = {i: {} for i in range(4)}
    for name, content in exchange.contents["reveal"].items():
        holder = exchange.names.index(name)
        owners = [i for i in range(4) if i != holder]
        for owner, share in zip(owners, fields(content)[1], strict=True):
            revealed[owner][holder + 1] = share
    secrets = {i: combined(dict(list(shares.items())[:2])) for i, shares in revealed.items()}
    public = [fields(exchange.contents["advertise"][name])[1][0] for name in exchange.names]
    terms = [(-1, masks(secrets[i], b"self", [i], exchange.transcript)) for i in included]
    for lost in set(range(4)) - set(included):
        assert x25519(secrets[lost], BASE) == public[lost]
        for i in included:
            agreed = x25519(secrets[lost], public[i])
            terms.append((-1 if i < lost else 1, masks(agreed, b"pair", [i, lost], exchange.transcript)))
    names = [exchange.names[i] for i in included]
    bare = with_masks([exchange.given["masked"][name] for name in names], terms)
    assert bare == exchange.given["sum"] == with_masks([exchange.given["words"][name] for name in names], [])
