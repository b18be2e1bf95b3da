"""Where everything of one run lies: the single place that knows the names in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from privacy.audit.population import POPULATION_FILE
from privacy.identity import IdentityKey


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; nothing is created by asking."""

    path: Path

    @property
    def events(self) -> Path:
        """Progress, one JSON object per line."""
        return self.path / "events.jsonl"

    @property
    def study(self) -> Path:
        """The study as configured."""
        return self.path / "study.json"

    @property
    def schema(self) -> Path:
        """The study's schema."""
        return self.path / "schema.json"

    @property
    def plan(self) -> Path:
        """The signed plan: canonical JSON."""
        return self.path / "plan.json"

    @property
    def plan_signature(self) -> Path:
        """The coordinator's signature over the plan."""
        return self.path / "plan.sig"

    @property
    def coordinator(self) -> Path:
        """The coordinator's keys (0700)."""
        return self.path / "coordinator"

    @property
    def own_key(self) -> Path:
        """The key that signs in this run alone; there for a simulation."""
        return self.coordinator / "identity.key"

    @property
    def key_pointer(self) -> Path:
        """A text file naming the key that signs; there for a deployed study, whose sites pinned it once."""
        return self.coordinator / "key-path.txt"

    def signing_key(self) -> IdentityKey:
        """The key that signs plan and tasks of this run.

        Raises:
            ValueError: it is missing or readable by others.
        """
        named = self.key_pointer
        return IdentityKey.load(Path(named.read_text(encoding="utf-8")) if named.is_file() else self.own_key)

    @property
    def draft(self) -> Path:
        """The plan before it is signed; there for a deployed study."""
        return self.path / "plan-draft.json"

    @property
    def settings(self) -> Path:
        """How the operator wants this run to go on; there for a deployed study."""
        return self.coordinator / "settings.json"

    @property
    def heads(self) -> Path:
        """Heads of the sites' ledgers, as far as they were seen."""
        return self.coordinator / "heads.json"

    @property
    def commitments(self) -> Path:
        """Commitments to the sites' canary coins, as first told; there for a plan with an in-training audit."""
        return self.coordinator / "canaries.json"

    @property
    def lock(self) -> Path:
        """Held by the one coordinator that runs the study."""
        return self.coordinator / "run.lock"

    @property
    def node_keys(self) -> Path:
        """Public keys of the sites' SuperNodes; there for a deployed study."""
        return self.coordinator / "node-keys.json"

    @property
    def stop_wish(self) -> Path:
        """There while the operator wants the study to end after the exchange that is under way."""
        return self.path / "stop"

    @property
    def public_pointer(self) -> Path:
        """A text file naming the folder of the public model (shared between runs)."""
        return self.path / "public-model.txt"

    @property
    def reference(self) -> Path:
        """The public reference population."""
        return self.path / "reference.safetensors"

    @property
    def population(self) -> Path:
        """Features of public patients that the sites' attacks compare with: a part of the plan."""
        return self.path / POPULATION_FILE

    @property
    def public_rows(self) -> Path:
        """Coded table rows of the public patients that were trained on, and where values lie inside bins."""
        return self.path / "public-rows.safetensors"

    @property
    def public_patients(self) -> Path:
        """Tokens and levels of the public patients that were trained on; there for a study with a prototype warm-up."""
        return self.path / "public-patients.safetensors"

    @property
    def statistics(self) -> Path:
        """The descriptive table of all members, noised; there for a study that asks for it."""
        return self.path / "statistics.json"

    @property
    def hospitals(self) -> Path:
        """Generated hospitals of a simulation."""
        return self.path / "hospitals"

    @property
    def sites_dir(self) -> Path:
        """A text file naming the folder of the sites that this run uses."""
        return self.path / "sites-dir.txt"

    @property
    def checkpoints(self) -> Path:
        """Finished rounds."""
        return self.path / "checkpoints"

    @property
    def cohort(self) -> Path:
        """The candidate cohort, as files."""
        return self.path / "cohort"

    @property
    def model(self) -> Path:
        """The finished model as it goes into a bundle; there unless the verdict was BLOCK."""
        return self.path / "model"

    @property
    def bundle(self) -> Path:
        """The release bundle."""
        return self.path / "bundle"

    @property
    def report_json(self) -> Path:
        """The report: source of truth."""
        return self.path / "report" / "report.json"

    @property
    def report_html(self) -> Path:
        """The report, rendered."""
        return self.path / "report" / "report.html"
