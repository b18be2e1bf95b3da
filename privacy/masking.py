"""Secure aggregation by double masking: the coordinator learns sums over at least three sites, never one site's numbers.

The protocol is that of Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
Figure 4, on a full graph of at most a few dozen sites. Each function names the round of it that it plays. What differs:

- *AdvertiseKeys*: keys are X25519, long-lived, in the roster of the approved plan, each bound to its site's identity by a
  signature. Masks come from seeds derived for one task digest and one group, so no mask serves twice.
- *ShareKeys* is left out: survivors reveal the seeds themselves (their own self seed, and the pair seeds they had with
  dropped sites) instead of Shamir shares. It is as private; it is less robust: **a site lost between its answer and its
  unmasking makes the round be discarded** (a spare is consumed).
- *ConsistencyCheck* costs no exchange: what a survivor reveals is sealed under a key of which every other survivor of the
  *same* survivor set holds one share (:func:`unmask_seeds`). A coordinator that tells two sites different sets, to get a
  site's self seed from one and its pair seeds from the other, ends with boxes that do not open.
- The self seed is derived by HKDF from the site's masking key and the task digest instead of drawn at random: after a crash
  the site can still unmask its stored answer, and there is no secret file per task to write, sync and purge. Nothing is
  lost: whoever has a survivor's masking key learns its pair seeds anyway, and its self seed is what it reveals.

Covered: a coordinator that is curious, replays, swaps keys, lies about survivors or invites too few, together with up to
(smallest cohort - 2) sites; a masked vector alone is uniformly random. Equality with the plain sum modulo 2^32 is exact.
Not covered: a coordinator together with all other sites of a cohort; a site that sends nonsense (sums cannot be checked);
sites that exist only in the roster (officers compare fingerprints). The promise never rests on masking: every site's
noise is full, so if masks fail the guarantee stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privacy.boundary.plan import MIN_COHORT
from privacy.boundary.refusals import Refused
from privacy.chain import canonical
from privacy.identity import MaskingKey

SEED_BYTES = 32
MAX_SITES = 256
_PIECE = 2**18  # uint32 numbers per piece: 1 MiB, so that masks stay in the processor's cache

Vector = NDArray[np.uint32]


@dataclasses.dataclass(frozen=True)
class Cohort:
    """The sites between which the masks of one group of one task run. Public.

    Attributes:
        task_digest: the task's key.
        group: parameter group or statistic.
        members: site names, sorted.
        smallest: fewest survivors whose sum may be opened; never below three.
    """

    task_digest: str
    group: str
    members: tuple[str, ...]
    smallest: int = MIN_COHORT

    def __post_init__(self) -> None:
        if tuple(sorted(set(self.members))) != self.members or len(self.members) > MAX_SITES:
            raise ValueError(f"expected at most {MAX_SITES} different sites, sorted, got {self.members}")
        if self.smallest < MIN_COHORT:
            raise ValueError(f"expected smallest >= {MIN_COHORT}, got {self.smallest}: a sum of two hides neither")
        if len(self.members) < self.smallest:
            raise Refused("COHORT_TOO_SMALL", f"group {self.group}: {len(self.members)} sites, {self.smallest} needed")

    def survivors(self, survivors: Iterable[str]) -> tuple[str, ...]:
        """The members among ``survivors``, sorted.

        Raises:
            Refused: ``COHORT_TOO_SMALL`` if there are fewer than ``smallest``.
        """
        left = tuple(sorted(set(survivors) & set(self.members)))
        if len(left) < self.smallest:
            raise Refused("COHORT_TOO_SMALL", f"group {self.group}: {len(left)} survivors, {self.smallest} needed")
        return left


@dataclasses.dataclass(frozen=True)
class Party:
    """One site's side: its name, its masking key, and the public masking keys of the approved roster."""

    me: str
    key: MaskingKey
    roster: Mapping[str, bytes]
    _secrets: dict[str, bytes] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.roster.get(self.me) != self.key.public:
            raise Refused("ROSTER_KEYS", f"the roster's masking key for {self.me} is not this site's")


@dataclasses.dataclass(frozen=True)
class Reveal:
    """What one survivor sends to open the sum: its sealed seeds, and its shares of the keys to the others' boxes."""

    sealed: bytes
    agreement: Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class Quantised:
    """Numbers on the grid as uint32 (two's complement), and how many had to be held at its ends.

    ``saturated`` is a function of the site's update and stays at the site.
    """

    vector: Vector
    saturated: int


def largest_magnitude(sites: int, step: float) -> float:
    """The largest magnitude that ``sites`` vectors may each hold so that their sum cannot wrap."""
    if not 1 <= sites <= MAX_SITES or not 0 < step < float("inf"):
        raise ValueError(f"expected 1 to {MAX_SITES} sites and a step > 0, got {sites} and {step}")
    return step * _largest_multiple(sites)


def quantise(values: NDArray[np.floating], sites: int, step: float) -> Quantised:
    """Round to multiples of ``step``, held within what ``sites`` such vectors can add up to without wrapping.

    Quantise after the noise: rounding and holding are then post-processing and cost no privacy.

    Raises:
        ValueError: a number is NaN or infinite; such an update must not leave.
    """
    largest_magnitude(sites, step)
    limit = _largest_multiple(sites)
    flat = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(flat).all():
        raise ValueError("expected finite numbers, got NaN or infinity; the update is not sent")
    grid = np.rint(flat / step)
    held = np.clip(grid, -limit, limit)
    return Quantised(held.astype(np.int64).astype(np.uint32), int((held != grid).sum()))


def dequantise(vector: Vector, step: float) -> NDArray[np.float64]:
    """Inverse of :func:`quantise` for a vector or a sum of vectors."""
    return vector.view(np.int32).astype(np.float64) * step


def expand(seed: bytes, length: int) -> Vector:
    """*PRG*: ``length`` uniform uint32 numbers from a 256-bit seed (ChaCha20, RFC 8439, counter and nonce zero)."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"expected a seed of {SEED_BYTES} bytes, got {len(seed)}")
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    out = np.empty(length, dtype="<u4")
    zeros = bytes(4 * min(length, _PIECE))
    for start in range(0, length, _PIECE):
        piece = out[start : start + _PIECE].data.cast("B")
        stream.update_into(zeros[: len(piece)], piece)
    return out.view(np.uint32)


def self_seed(party: Party, cohort: Cohort) -> bytes:
    """*MaskedInputCollection*: b_u, this site's own seed, the same whenever this task is asked again."""
    return _derive(party.key.secret_bytes(), "self seed", cohort.task_digest, cohort.group, party.me)


def pair_seed(party: Party, peer: str, cohort: Cohort) -> bytes:
    """*MaskedInputCollection*: s_{u,v}, the seed that both sites of a pair derive and nobody else can."""
    pair = sorted((party.me, peer))
    return _derive(_shared(party, peer), "pair seed", cohort.task_digest, cohort.group, *pair)


def mask(vector: Vector, party: Party, cohort: Cohort) -> Vector:
    """*MaskedInputCollection*: y_u = x_u + PRG(b_u) + sum_{v>u} PRG(s_{u,v}) - sum_{v<u} PRG(s_{u,v}) mod 2^32.

    Raises:
        Refused: ``NOT_INVITED`` if this site is not in the cohort; ``ROSTER_KEYS`` if a peer's key is missing or bad.
    """
    if party.me not in cohort.members:
        raise Refused("NOT_INVITED", f"group {cohort.group}")
    masked = vector.astype(np.uint32, copy=True)
    masked += expand(self_seed(party, cohort), masked.size)
    for peer in cohort.members:
        if peer != party.me:
            _add_pair(masked, pair_seed(party, peer, cohort), party.me, peer)
    return masked


def unmask_seeds(party: Party, cohorts: Sequence[Cohort], survivors: Iterable[str]) -> Reveal:
    """*Unmasking* with *ConsistencyCheck*: seal this site's self seeds and its pair seeds with dropped sites.

    For no site are a self seed and a pair seed both revealed: a site is either a survivor (it reveals its own self seed,
    and nobody reveals a pair seed with it) or dropped. Groups with fewer than ``smallest`` survivors stay closed. The
    answer depends on nothing but its arguments; that a site gives it for one survivor set only is the outbox's duty.

    Raises:
        Refused: ``NOT_A_SURVIVOR``; ``COHORT_TOO_SMALL`` if no group has survivors enough.
        ValueError: the cohorts are not of one task, or name a group twice.
    """
    everyone = frozenset(survivors)
    digest = _one_task(cohorts)
    if party.me not in everyone:
        raise Refused("NOT_A_SURVIVOR")
    seeds: dict[str, str] = {}
    for cohort in _open_cohorts(cohorts, everyone):
        if party.me in cohort.members:
            seeds[f"{cohort.group} self"] = self_seed(party, cohort).hex()
            for dropped in sorted(set(cohort.members) - everyone):
                seeds[f"{cohort.group} pair {dropped}"] = pair_seed(party, dropped, cohort).hex()
    partners = _partners(cohorts, everyone)
    needed = {peer: _share(party, peer, opens=party.me, digest=digest, partners=partners) for peer in partners}
    key = _box_key({peer: share for peer, share in needed.items() if peer != party.me}, party.me, digest)
    given = {peer: _share(party, peer, opens=peer, digest=digest, partners=partners) for peer in partners}
    box = ChaCha20Poly1305(key).encrypt(bytes(12), canonical(seeds).encode(), digest.encode())
    return Reveal(box, {peer: share for peer, share in given.items() if peer != party.me})


def open_reveals(
    reveals: Mapping[str, Reveal], cohorts: Sequence[Cohort], survivors: Iterable[str]
) -> dict[str, bytes]:
    """*Unmasking* at the coordinator: open every box with the shares of all others; seeds by ``group kind … site``.

    Raises:
        Refused: ``SURVIVORS_CONFLICT`` if a survivor is missing or a box does not open, because not everyone answered
            the same survivor set. The round is discarded then.
    """
    everyone = frozenset(survivors)
    digest = _one_task(cohorts)
    partners = _partners(cohorts, everyone)
    seeds: dict[str, bytes] = {}
    for site in partners:
        try:
            shares = {peer: reveals[peer].agreement[site] for peer in partners if peer != site}
            box = ChaCha20Poly1305(_box_key(shares, site, digest))
            text = box.decrypt(bytes(12), reveals[site].sealed, digest.encode())
            seeds |= {f"{name} of {site}": bytes.fromhex(seed) for name, seed in json.loads(text).items()}
        except (KeyError, InvalidTag, ValueError, TypeError, AttributeError, RecursionError) as error:
            detail = f"the seeds of {site} do not open"
            raise Refused("SURVIVORS_CONFLICT", detail, "discard the round and start another attempt") from error
    return seeds


class MaskedSum:
    """*MaskedInputCollection* and *Unmasking* at the coordinator: one group's sum, a vector added as it arrives and dropped.

    Holds four bytes a number however many sites there are. Addition modulo 2^32 commutes exactly, so the order of arrival
    changes nothing. The survivors of the group are the sites that were added, and no others.
    """

    def __init__(self, cohort: Cohort, length: int) -> None:
        self.cohort = cohort
        self._total = np.zeros(length, dtype=np.uint32)
        self._sites: set[str] = set()

    @property
    def sites(self) -> tuple[str, ...]:
        """Whose vectors are in the sum, sorted."""
        return tuple(sorted(self._sites))

    def add(self, site: str, vector: Vector) -> None:
        """Add y_u of one site.

        Raises:
            ValueError: the site is not in the cohort or was added before, or the vector has another length or type.
        """
        if site not in self.cohort.members or site in self._sites:
            raise ValueError(f"group {self.cohort.group}: {site} is not of the cohort, or was added before; drop it")
        if vector.dtype != np.uint32 or vector.shape != self._total.shape:
            raise ValueError(
                f"group {self.cohort.group}: expected {self._total.size} uint32 numbers, got {vector.shape} of "
                f"{vector.dtype}; drop the answer"
            )
        self._total += vector
        self._sites.add(site)

    def open(self, seeds: Mapping[str, bytes], step: float) -> NDArray[np.float64]:
        """The sum of the survivors' numbers, all masks removed.

        sum_u x_u = sum_u y_u - sum_u PRG(b_u) -/+ sum_{u, dropped v} PRG(s_{u,v}) over survivors u, modulo 2^32.

        Args:
            seeds: from :func:`open_reveals`.
            step: grid step of :func:`quantise`.

        Raises:
            Refused: ``COHORT_TOO_SMALL``; ``SURVIVORS_CONFLICT`` if a seed is missing.
        """
        group, alive = self.cohort.group, self.cohort.survivors(self._sites)
        dropped = sorted(set(self.cohort.members) - self._sites)
        total = self._total.copy()
        for site in alive:
            try:
                total -= expand(seeds[f"{group} self of {site}"], total.size)
                for other in dropped:
                    _add_pair(total, seeds[f"{group} pair {other} of {site}"], other, site)
            except KeyError as error:
                raise Refused("SURVIVORS_CONFLICT", f"group {group}: a seed of {site} is missing") from error
        return dequantise(total, step)


def _largest_multiple(sites: int) -> int:
    return (2**31 - 1) // sites


def _add_pair(vector: Vector, seed: bytes, me: str, peer: str) -> None:
    """Add this pair's mask as ``me`` does: plus if the peer's name is greater. With names exchanged it is removed."""
    if peer > me:
        vector += expand(seed, vector.size)
    else:
        vector -= expand(seed, vector.size)


def _open_cohorts(cohorts: Sequence[Cohort], survivors: frozenset[str]) -> list[Cohort]:
    """The groups with survivors enough."""
    found = [cohort for cohort in cohorts if len(survivors & set(cohort.members)) >= cohort.smallest]
    if not found:
        raise Refused("COHORT_TOO_SMALL", "no group has survivors enough", "start another attempt")
    return found


def _partners(cohorts: Sequence[Cohort], survivors: frozenset[str]) -> tuple[str, ...]:
    """The survivors that open anything, sorted: those who must all have answered the same set."""
    return tuple(sorted({site for cohort in _open_cohorts(cohorts, survivors) for site in cohort.members} & survivors))


def _one_task(cohorts: Sequence[Cohort]) -> str:
    digests, groups = {cohort.task_digest for cohort in cohorts}, {cohort.group for cohort in cohorts}
    if len(digests) != 1 or len(groups) != len(cohorts):
        raise ValueError("expected cohorts of one task, each group once")
    return digests.pop()


def _share(party: Party, peer: str, *, opens: str, digest: str, partners: tuple[str, ...]) -> bytes:
    """The share of the key to the box of ``opens`` that this pair of sites knows, for exactly this set of partners."""
    if peer == party.me:
        return b""
    pair = sorted((party.me, peer))
    return _derive(_shared(party, peer), "agreement", digest, canonical(list(partners)), opens, *pair)


def _box_key(shares: Mapping[str, bytes], site: str, digest: str) -> bytes:
    """The key to one site's box; it takes the shares of all its partners."""
    joined = b"".join(share for _, share in sorted(shares.items()))
    return _derive(hashlib.sha256(joined).digest(), "box", digest, site, canonical(sorted(shares)))


def _shared(party: Party, peer: str) -> bytes:
    """The secret of a pair, agreed once for all groups and purposes; every use derives its own seed from it."""
    if peer not in party._secrets:
        try:
            party._secrets[peer] = party.key.shared(party.roster[peer])
        except (KeyError, ValueError) as error:
            raise Refused("ROSTER_KEYS", f"the masking key of {peer} is missing or unusable") from error
    return party._secrets[peer]


def _derive(secret: bytes, purpose: str, *context: str) -> bytes:
    """HKDF-SHA256 (RFC 5869) to 32 bytes; purpose and context are framed as JSON, so that no two contexts collide."""
    info = canonical(["medgen masking 1", purpose, *context]).encode()
    return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=None, info=info).derive(secret)
