"""Nothing about private data may set a range, a vocabulary, a class weight or a stop: the source is read for it.

Every call of a function that summarises a batch (``std``, ``min``, ``unique``, ``fit`` …) in the rooms that see patients
is either in a module that no patient reaches, or named below with the reason why it sets nothing that leaves. What leaves
is watched by ``tests/client/test_spy.py``; this test catches the habit before it becomes a message.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("client", "privacy")

SUMMARIES = frozenset(
    "std var min max amin amax aminmax ptp nanstd nanvar nanmin nanmax nanmean mean std_mean var_mean median nanmedian mode "
    "quantile nanquantile percentile nanpercentile histogram bincount unique nunique value_counts factorize describe "
    "drop_duplicates Counter most_common fit fit_transform partial_fit get_dummies "
    "compute_scale_factor LabelEncoder OrdinalEncoder OneHotEncoder StandardScaler MinMaxScaler RobustScaler CountVectorizer "
    "TfidfVectorizer build_vocab EarlyStopping ReduceLROnPlateau WeightedRandomSampler compute_class_weight".split()
)
"""Names of calls by which a range, a scale, a vocabulary, a class weight or a stop is usually taken from data."""

HABITS = re.compile(r"early_?stop|patience|best_(loss|epoch|round|step|val)|val(idation)?_loss|class_weights?|vocab")
"""Names that say what they are for."""

PUBLIC = {
    "client/policy.py": "plans, heads and ledger rows",
    "privacy/accounting.py": "numbers of a plan",
    "privacy/accounts.py": "rows of the ledger",
    "privacy/audit/bayesian.py": "counts that are published or stay at the coordinator",
    "privacy/audit/bounds.py": "coins and counts that are published or stay at the coordinator",
    "privacy/audit/gates.py": "published counts",
    "privacy/audit/in_training.py": "coins, and rounds that sites say they answered",
    "privacy/audit/message.py": "counts that leave, declared as not covered",
    "privacy/audit/population.py": "public patients, for attacks",
    "privacy/audit/study_gates.py": "published counts",
    "privacy/audit/table_gates.py": "published counts",
    "privacy/audit/one_run.py": "coins and counts that are published or stay at the coordinator",
    "privacy/audit/transcript.py": "cosines of made-up canaries",
    "privacy/boundary/audit.py": "numbers of guesses in the plan",
    "privacy/boundary/plan.py": "declared numbers of the roster",
    "privacy/gradients.py": "times of a trial on made-up patients",
    "privacy/ledger.py": "rows of the ledger",
    "privacy/peers.py": "made-up patients of a benchmark",
    "privacy/probe.py": "gradients of made-up patients",
    "privacy/restore.py": "heads of ledgers",
}
"""Modules that summarise something, and what: never a patient."""

STANDALONE = (
    "privacy/audit/copies.py",
    "privacy/audit/image_attacks.py",
    "privacy/audit/image_audit.py",
    "privacy/audit/image_gates.py",
    "privacy/audit/image_links.py",
    "privacy/audit/standalone.py",
    "privacy/audit/table_attacks.py",
)
"""The audit of a table or images that somebody else made. It looks at patients, as an attacker with the tables would, and its scales
come from them; it runs by hand where the tables lie, no stage or message of a study calls it, and the test below says so."""

ATTACKERS = (
    "privacy/audit/cohort_attacks.py",
    "privacy/audit/density.py",
    "privacy/audit/discriminator.py",
    "privacy/audit/image_copies.py",
    "privacy/audit/likeness.py",
    "privacy/audit/mixed.py",
    "privacy/audit/neighbours.py",
    "privacy/audit/patient_risks.py",
    "privacy/audit/predicates.py",
    "privacy/audit/reference_models.py",
    "privacy/audit/risks.py",
)
"""Attacks. They look at patients as an attacker with the files would. At a site they run in the audit of a study alone: of
what they find, counts at thresholds that the plan fixed leave, declared as not covered; the test below says who calls them."""

AUDITING = ("client/evidence.py", "client/scoring.py", "client/pictures.py")
"""The audit of a study at a site."""

IMAGE = "one image's own values; no other patient is read"
SAME = "joins rows of tables at the site; what comes out is the patient's own record"
LOCAL_CHECK = "says whether a record can be used; the answer stays at the site"
COUNT = "exact counts, handed to the Gaussian mechanism in the same function or by its caller"
ATTACK = "attack scores at a site; counts at public thresholds leave, declared as not covered"
ALLOWED = {
    ("client/canaries.py", "_scores"): "stages of a plan",
    ("client/scoring.py", "nearest"): "pairs for the site's own annex; they do not leave",
    ("client/records/bids.py", "level_of"): "the longest of public suffixes",
    ("client/records/bids.py", "check_shape"): LOCAL_CHECK,
    ("client/records/dicom.py", "_check_size"): LOCAL_CHECK,
    ("client/records/images.py", "fit_frame"): IMAGE,
    ("client/records/images.py", "stretch"): IMAGE,
    ("client/records/images.py", "checked"): IMAGE,
    ("client/records/load.py", "session_labels"): SAME,
    ("client/records/register.py", "_person"): "rows of one person",
    ("client/records/series.py", "bin_means"): "means within one patient's bins",
    (
        "client/records/series.py",
        "read_slot",
    ): "channel names are looked up in the public schema, unknown ones left out",
    ("client/records/series.py", "_numbers"): LOCAL_CHECK,
    ("client/records/tables.py", "rows_and_visits"): SAME,
    ("privacy/audit/attacks.py", "loss_score"): ATTACK,
    ("privacy/audit/attacks.py", "nearest_neighbour_score"): ATTACK,
    ("privacy/audit/attacks.py", "closer_share"): ATTACK,
    ("privacy/audit/attacks.py", "_share"): ATTACK,
    ("privacy/audit/attacks.py", "combine"): ATTACK,
    ("privacy/audit/attacks.py", "public_thresholds"): "scores of public patients, as its name says",
    ("privacy/audit/validity.py", "_features"): ATTACK,
    ("privacy/marginals.py", "count_table"): COUNT,
    ("privacy/shared_noise.py", "rdp_epsilon"): "numbers of a plan",
    ("privacy/shared_noise.py", "patient_vector"): "one patient's own vector, so that its norm does not overflow",
    ("privacy/shared_noise.py", "squared_norm"): "one patient's own vector, so that its norm does not overflow",
    ("privacy/shared_noise.py", "shared_cohort"): "declared numbers of the roster",
    ("privacy/statistics.py", "noisy_bin_counts"): COUNT,
    ("privacy/statistics.py", "noisy_prototypes"): COUNT,
}
"""(module, function) -> why what it summarises sets nothing that leaves."""


def summaries(source: str) -> list[tuple[str, str]]:
    """(innermost function, what) of every summary and every telling name in a module's source.

    ``min(a, b)`` and ``max(a, b)`` of two things or more are clamps and do not count.
    """
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            here = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            match child:
                case ast.Call(func=ast.Name(id="min" | "max")) if len(child.args) > 1:
                    pass
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in SUMMARIES:
                    found.append((here, ast.unparse(child)[:80]))
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)) if (
                    HABITS.search(name.lower())
                ):
                    found.append((here, name))
            visit(child, here)

    visit(ast.parse(source), "")
    return found


def everywhere() -> dict[tuple[str, str], list[str]]:
    """All summaries of the rooms, by module and function, those of public modules left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        module = path.relative_to(ROOT).as_posix()
        for function, what in summaries(path.read_text(encoding="utf-8")):
            found.setdefault((module, function), []).append(what)
    return found


def test_every_summary_of_a_private_batch_has_its_reason() -> None:
    known = {*PUBLIC, *STANDALONE, *ATTACKERS}
    strange = {place: what for place, what in everywhere().items() if place[0] not in known and place not in ALLOWED}
    assert strange == {}, "make it a query of privacy/statistics.py, or name it here with the reason"


def test_no_reason_outlives_its_summary() -> None:
    found = everywhere()
    assert set(ALLOWED) - set(found) == set()
    assert set(PUBLIC) - {module for module, _ in found} == set()
    assert all(len(reason) > 8 for reason in (*ALLOWED.values(), *PUBLIC.values()))


def test_no_stage_of_a_study_reaches_the_standalone_audit() -> None:
    names = {module.removesuffix(".py").replace("/", ".") for module in STANDALONE}
    for path in sorted(path for room in (*ROOMS, "server") for path in (ROOT / room).rglob("*.py")):
        module = path.relative_to(ROOT).as_posix()
        if module in (*STANDALONE, *ATTACKERS, "privacy/audit/table_gates.py") or module.startswith("server/audit_"):
            continue
        source = path.read_text(encoding="utf-8")
        assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", source)], module


def test_at_a_site_only_the_audit_attacks() -> None:
    names = {module.removesuffix(".py").replace("/", ".") for module in ATTACKERS}
    for path in sorted((ROOT / "client").rglob("*.py")):
        if path.relative_to(ROOT).as_posix() not in AUDITING:
            source = path.read_text(encoding="utf-8")
            assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", source)], path.name


@pytest.mark.parametrize(
    "line",
    [
        "scale = 1 / tokens.z_BVNW.std()",
        "low, high = values.min(), values.max()",
        "highest = max(ages)",
        "low = np.nanquantile(batch.values['ehr'], 0.01)",
        "levels = sorted(table['ward'].unique())",
        "codes, levels = pd.factorize(table['ward'])",
        "weights = Counter(labels)",
        "vocabulary = {word for note in notes for word in note}",
        "encoder = LabelEncoder().fit(labels)",
        "if val_loss > previous: pass",
        "train(stage, patience=3)",
        "loss = F.cross_entropy(logits, y, weight=class_weights)",
        "factor = compute_scale_factor(autoencoder, loader)",
    ],
)
def test_planted_habits_are_found(line: str) -> None:
    """Each in the middle of a private stage, as somebody might add it one day."""
    source = (ROOT / "client" / "rounds.py").read_text(encoding="utf-8")
    assert summaries(source) == []
    place = "    records = read_records(config, plan, model, token, memory)\n"
    assert place in source
    planted = source.replace(place, f"{place}    {line}\n", 1)
    assert {function for function, _ in summaries(planted)} == {"_recentre"}


def test_clamps_are_no_summaries() -> None:
    assert summaries("def f(a, b): return max(a, 1.0) + min(a, b) + np.maximum(a, b)") == []
