"""``site.toml``, read here and nowhere else: what a hospital offers, gives at most, and where its things lie."""

from __future__ import annotations

import contextlib
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from client.hours import Hours
from client.records.config import DataConfig
from privacy.book import Head
from privacy.boundary.plan import Hex32, Label
from privacy.boundary.refusals import LedgerError, Refused
from privacy.chain import ChainFile
from privacy.ledger import EVERYONE, Ledger
from privacy.plan import Ceilings, largest_delta
from privacy.speed import REFUSED

Epsilon = Annotated[float, Field(gt=0.0, allow_inf_nan=True)]
Key = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
QuietHours = Annotated[Hours, BeforeValidator(lambda text: Hours.parse(text) if isinstance(text, str) else text)]
Person = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]

SITE_LOG = "site.log.jsonl"
LEDGER = "ledger.sqlite"


class _Frozen(BaseModel):
    """Frozen, and unknown keys are refused: a typing slip in ``site.toml`` is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteSection(_Frozen):
    """``[site]``: who we are and what we offer, typed in by the data manager, never counted.

    Attributes:
        declared_capacity: patients that the site declares (``N_decl``), a public divisor.
        declared_held_out: patients that never train and serve as control in the audit.
    """

    name: Label
    slots: tuple[Label, ...] = Field(min_length=1)
    declared_capacity: int = Field(ge=1, le=2**31 - 1)
    declared_held_out: int = Field(default=0, ge=0, le=2**31 - 1)


class CeilingSection(_Frozen):
    """``[ceiling]``: what the site gives at most. ``inf`` admits studies that promise nothing (*not private*).

    Attributes:
        plan_epsilon: for one plan, by privacy loss distribution.
        lifetime_epsilon: for all plans together, by a Rényi filter.
        delta: largest delta of a plan, and the delta at which the lifetime is counted.
        uncovered_queries: most queries outside the guarantee for one plan.
    """

    plan_epsilon: Epsilon
    lifetime_epsilon: Epsilon
    delta: float = Field(default=1e-5, gt=0.0, le=1e-5, allow_inf_nan=False)
    uncovered_queries: int = Field(default=0, ge=0)


class PolicySection(_Frozen):
    """``[policy]``.

    Attributes:
        min_contributors: fewest sites whose sum this site joins; 1 also admits updates under its local noise alone.
        deterministic_noise: admits the test switch that makes noise predictable. Never with real patients.
        bad_record: ``null``: a bad record becomes a null patient and is named on site; ``refuse``: the site sits out.
        coordinator_key: hex of the coordinator's public key, if it is not in ``keys/coordinator.pub``.
        officer_key: hex of the privacy officer's public key, who signs a restoration of the ledger; empty: nobody can.
        approvals: how many different approvers must sign a plan; 2 is the rule of two persons.
        approvers: name -> hex of the person's public key. Empty: whoever may write in this folder approves by name.
        quiet_hours: spans of the day, local time, in which no round begins; one that runs is finished.
        peers: which peers' keys a plan may name: ``seen``: those known here, and new ones, which an approval pins;
            ``compared``: only those whose fingerprint somebody here compared (``medgen site peers``).
        max_canaries: most made-up patients that a plan may put into spare coordinates of training, to audit it; 0 refuses
            such plans. They read no record, change no weight and cost no budget.
    """

    min_contributors: int = Field(default=3, ge=1, le=256)
    deterministic_noise: bool = False
    bad_record: Literal["null", "refuse"] = "null"
    coordinator_key: Key = ""
    officer_key: Key = ""
    approvals: Literal[1, 2] = 1
    approvers: dict[Person, Hex32] = Field(default_factory=dict)
    quiet_hours: tuple[QuietHours, ...] = ()
    peers: Literal["seen", "compared"] = "seen"
    max_canaries: int = Field(default=10_000, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_contributors == 2:
            raise ValueError("min_contributors: expected 1, or 3 and more; a sum over two sites hides neither")
        if len(set(self.approvers.values())) != len(self.approvers):
            raise ValueError("approvers: two names share a key; each person makes one, `medgen site approver-key FILE`")
        if self.approvals > max(1, len(self.approvers)):
            raise ValueError(f"approvals = {self.approvals} needs as many approvers, got {len(self.approvers)}")
        return self


class SpeedSection(_Frozen):
    """``[speed]``: how private steps are computed; it cannot change what is promised.

    Attributes:
        engine: how per-patient gradients are taken; ``measured`` runs a short trial on made-up patients before the first
            step of a study and keeps its result.
        chunk: patients per physical batch, where the engine is not measured.
        threads: CPU threads; left out, the trial chooses them. Runs on other backends that set engine, chunk and threads
            alike are bit-identical under the test switch.
    """

    engine: Literal["measured", "expand", "vmap", "loop"] = "measured"
    chunk: int = Field(default=16, ge=1)
    threads: int | None = Field(default=None, ge=1)

    @field_validator("engine", mode="before")
    @classmethod
    def _refuse(cls, value: object) -> object:
        """What Opacus offers beside these is refused with the reason, not as a typing slip."""
        if isinstance(value, str) and value in REFUSED:
            raise ValueError(f"{value!r} is not offered: {REFUSED[value]}; use 'measured'")
        return value


class LimitsSection(_Frozen):
    """``[limits]``: what the agent may take of its machine, applied when it starts.

    Attributes:
        cpu_threads: most CPU threads of one computation; left out: as many as there are cores.
        nice: how much it steps back behind other processes, 0 to 19 (see ``nice(1)``).
        memory_gb: most memory for data, in units of 10^9 bytes; a round that needs more fails and costs a spare.
        gpu: whether it may see a GPU.
    """

    cpu_threads: int | None = Field(default=None, ge=1)
    nice: int = Field(default=0, ge=0, le=19)
    memory_gb: float | None = Field(default=None, ge=1.0, allow_inf_nan=False)
    gpu: bool = True


class SiteConfig(_Frozen):
    """A site folder's ``site.toml``, read here and nowhere else.

    Attributes:
        folder: the site folder that it was read from; not a key of the file.
    """

    folder: Path
    site: SiteSection
    data: DataConfig = DataConfig()
    ceiling: CeilingSection
    policy: PolicySection = PolicySection()
    speed: SpeedSection = SpeedSection()
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _check(self) -> Self:
        most, asked = self.limits.cpu_threads, self.speed.threads
        if most is not None and asked is not None and asked > most:
            raise ValueError(
                f"speed.threads = {asked} is above limits.cpu_threads = {most}; lower one or raise the other"
            )
        return self

    @classmethod
    def load(cls, site_dir: Path) -> SiteConfig:
        """Read ``site_dir/site.toml``.

        Raises:
            ValueError: naming file, key, value and rule of everything that does not fit.
        """
        path = site_dir / "site.toml"
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no such file; `medgen site init` makes a site") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: it is no TOML file: {error}") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ValueError(
                f"{path}: it cannot be read ({reason}); give it to the agent's account, mode 0600"
            ) from None
        if "folder" in tables:
            raise ValueError(f"{path}: unknown key 'folder'; remove it")
        try:
            return cls.model_validate({**tables, "folder": site_dir})
        except ValidationError as error:
            found = error.errors()
            places = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (got {str(e['input'])[:60]!r})" for e in found]
            raise ValueError(f"{path}: {len(places)} keys do not fit; correct them:\n" + "\n".join(places)) from error

    @property
    def ceilings(self) -> Ceilings:
        """The three numbers that the ledger holds every plan against."""
        return Ceilings(
            plan_epsilon=self.ceiling.plan_epsilon,
            lifetime_epsilon=self.ceiling.lifetime_epsilon,
            delta=min(self.ceiling.delta, largest_delta(self.site.declared_capacity)),
        )

    @property
    def data_root(self) -> Path:
        """The data folder; a relative ``[data] root`` is relative to the site folder."""
        return self.folder / self.data.root

    def coordinator_key(self) -> bytes:
        """The coordinator's public key as this site pinned it.

        Raises:
            Refused: ``COORDINATOR_UNKNOWN`` if none is pinned, or file and ``site.toml`` disagree.
        """
        path = self.folder / "keys" / "coordinator.pub"
        filed = path.read_text(encoding="ascii").strip() if path.exists() else ""
        pinned = {key for key in (self.policy.coordinator_key, filed) if key}
        if len(pinned) != 1:
            found = "two different keys are pinned" if pinned else "no key is pinned"
            raise Refused(
                "COORDINATOR_UNKNOWN", found, "put one key in [policy] coordinator_key or in keys/coordinator.pub"
            )
        key = pinned.pop()
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise Refused("COORDINATOR_UNKNOWN", f"{path} holds no key", "expected 64 hexadecimal digits")
        return bytes.fromhex(key)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The data blocks that a plan approved today may read."""
        return self.data.blocks or (EVERYONE,)

    @property
    def ledger_path(self) -> Path:
        """Where the spend file is."""
        return self.folder / LEDGER

    def open_ledger(self) -> Ledger:
        """This site's spend file, opened for writing; the caller closes it.

        Raises:
            LedgerError: as :meth:`Ledger.open`; ``rolled back`` if the site log remembers an approval that the file does
                not; ``foreign`` if today's ``[data] block_column`` is not the one by which its blocks are told apart.
        """
        return self._checked_ledger(writable=True)

    def read_ledger(self) -> Ledger:
        """The same, opened for reading, which works while the agent writes; nothing is created."""
        return self._checked_ledger(writable=False)

    @contextlib.contextmanager
    def look_at_ledger(self) -> Iterator[Ledger]:
        """:meth:`read_ledger`; before the first approval an empty ledger elsewhere, so that looking makes none."""
        if self.ledger_path.exists() or any(link.kind == "approved" for link in self.log().read()):
            with self.read_ledger() as ledger:
                yield ledger
        else:
            with tempfile.TemporaryDirectory(prefix="medgen-") as folder:
                with Ledger.open(Path(folder) / LEDGER, self.site.name) as ledger:
                    yield ledger

    def _checked_ledger(self, *, writable: bool) -> Ledger:
        approvals = [link.data() for link in self.log().read() if link.kind == "approved"]
        remedy = "keep what is there and run `medgen site ledger restore`"
        if approvals and not self.ledger_path.exists():
            raise LedgerError("rolled back", f"{self.ledger_path} is gone, and plans were approved over it", remedy)
        ledger = Ledger.open(self.ledger_path, self.site.name, writable=writable)
        try:
            for head in (Head.parse(entry["ledger"]) for entry in approvals if "ledger" in entry):
                if not ledger.holds(head):
                    raise LedgerError(
                        "rolled back", f"the site log remembers row {head.seq}, the ledger does not", remedy
                    )
            if ledger.block_column not in ("", self.data.block_column):
                raise LedgerError(
                    "foreign",
                    f"its blocks are told apart by {ledger.block_column!r}, [data] block_column is "
                    f"{self.data.block_column!r}",
                    "put the column back: blocks by another column overlap with those that have spent",
                )
        except BaseException:
            ledger.close()
            raise
        return ledger

    def log(self) -> ChainFile:
        """This site's hash-chained log of proposals, approvals and rejections."""
        return ChainFile(self.folder / SITE_LOG)
