"""The same evidence under the headings of five frameworks, so that a reader finds what his rules ask for.

A heading quotes facts of the report, each with its place in ``report.json``, or asks a person to fill something in. No
page claims that a framework is complied with: whether it is, is a person's judgement. Headings are those of the sources
named; what they ask is said in this project's words.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from server.release.facts import FactName

FrameworkName = Literal["gdpr", "edpb", "hipaa", "nist", "iso27559"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a person has to write down, and how many lines it takes."""

    what: str
    lines: int = 2


@dataclasses.dataclass(frozen=True)
class Heading:
    """One heading: what it asks, and what answers it."""

    title: str
    asks: str
    entries: tuple[FactName | Asked, ...]


@dataclasses.dataclass(frozen=True)
class Framework:
    """One framework.

    Attributes:
        name: as in ``medgen audit report --template``.
        title: of the page.
        source: the document whose headings these are.
        limits: what the evidence cannot say for it.
    """

    name: FrameworkName
    title: str
    source: str
    limits: str
    headings: tuple[Heading, ...]


_SIGNED = Asked("Name, function, date, signature.", 2)

GDPR = Framework(
    "gdpr",
    "GDPR, anonymity of the released data",
    "Regulation (EU) 2016/679, recital 26; Article 29 Working Party, Opinion 05/2014 on anonymisation techniques (WP216)",
    "Anonymity is judged against all means reasonably likely to be used, which no list of attacks exhausts.",
    (
        Heading("The data and their purpose", "What leaves, from whose data, for what.",
                ("released", "use", "public", "unit",
                 Asked("Controller of each hospital, and the legal basis on which its patients' data were used."))),
        Heading("Singling out", "Can some or all records that belong to one person be isolated?", ("singling out", "outliers")),
        Heading("Linkability", "Can two records about one person, or a group, be tied together?", ("linkability", "copies")),
        Heading("Inference", "Can an attribute be deduced with significant probability from others?", ("inference", "attacks")),
        Heading("Means reasonably likely to be used", "Who might try, with what, at what cost, now and later?",
                ("cohort", "weights", "transcript", "audit valid",
                 Asked("Which other means must be expected: registers, social media, staff with memory of a patient?"))),
        Heading("Technique: noise addition and differential privacy", "How strong is it, and which mistakes were avoided?",
                ("promise", "parameters", "mechanism", "sampler", "accounting", "spent", "queries", "not covered")),
        Heading("Good practice after release", "Re-assess as attacks and other releases change.",
                ("budget left", "policy", "attempts", "deviations",
                 Asked("Date of the next review, and who withdraws the release if it must be withdrawn."))),
        Heading("Conclusion", "Is it anonymous for the recipients in question?",
                ("verdict", Asked("The conclusion, and its reasons.", 4), _SIGNED)),
    ),
)  # fmt: skip

EDPB = Framework(
    "edpb",
    "EDPB Opinion 28/2024, anonymity of the model",
    "European Data Protection Board, Opinion 28/2024 on certain data protection aspects related to the processing of "
    "personal data in the context of AI models, adopted on 17 December 2024",
    "The Opinion asks for a judgement case by case. The model and the data set are two things: each has its own heading.",
    (
        Heading("The model: direct extraction", "How likely is it that personal data are extracted from the weights?",
                ("weights", "training audit", "refuted", "promise", "parameters")),
        Heading("The model: obtaining data by queries", "How likely is it that queries yield a person's data, meant or not?",
                ("weights", "copies", "inference",
                 Asked("How the model may be queried: by whom, how often, logged where, limited how?"))),
        Heading("The data set that the model made", "Does the released cohort itself say anything about a person?",
                ("released", "cohort", "singling out", "linkability", "inference", "copies", "outliers")),
        Heading("Design: selection and preparation of data", "Were data limited to what is needed?",
                ("visits", "public", "crossings",
                 Asked("Why these patients and these variables, and what was left out."))),
        Heading("Design: training method", "Which methods lower the chance of identification?",
                ("mechanism", "sampler", "divisor", "accounting", "tuning", "trust", "randomness")),
        Heading("Analysis and tests of resistance", "Attribute and membership inference, regurgitation, inversion, "
                "reconstruction: what was tried, and was the test any good?",
                ("audit valid", "attacks", "cohort", "transcript", "training audit", "copies",
                 Asked("Tests that were not run (model inversion, reconstruction by an outside team), and why."))),
        Heading("Documentation", "What can be shown to a supervisory authority?",
                ("plan", "spent", "queries", "policy", "deviations", "attempts",
                 Asked("Reference of the data protection impact assessment, and the opinion of the data protection officer."))),
        Heading("Lawfulness of what went in", "Not a matter of numbers: unlawful training can taint later use.",
                (Asked("Legal basis of training at each hospital; for legitimate interests: interest, necessity, balance.", 4),)),
        Heading("Residual risk and conclusion", "Are both likelihoods insignificant, for every person concerned?",
                ("verdict", "outliers", "not covered", Asked("The conclusion for the model, and for the data set.", 4), _SIGNED)),
    ),
)  # fmt: skip

HIPAA = Framework(
    "hipaa",
    "HIPAA, expert determination",
    "45 CFR 164.514(b)(1); HHS Office for Civil Rights, guidance on de-identification (2012)",
    "The rule gives no number for a very small risk. The expert decides; this page gives the expert evidence.",
    (
        Heading("The expert", "A person with knowledge and experience of accepted statistical methods.",
                (Asked("Name, qualifications, experience with such data, independence.", 3),)),
        Heading("The anticipated recipient", "To whom, under which conditions, with what at hand?",
                ("released", "use", Asked("Recipient, contract, access control, other data that the recipient can reach.", 3))),
        Heading("Replicability", "Would what is seen be seen again about the same person?",
                ("unit", "linkability", "copies", Asked("Which features of these patients stay the same over time?"))),
        Heading("Data source availability", "Where else do the features stand, for all to read?",
                ("public", "cohort", Asked("Registers and commercial data that hold the same features."))),
        Heading("Distinguishability", "How far do features tell one person from all others?",
                ("singling out", "outliers", "inference")),
        Heading("Assessment of the risk", "Methods and results.",
                ("promise", "parameters", "mechanism", "accounting", "spent", "attacks", "refuted", "audit valid", "queries")),
        Heading("Documentation of methods and results", "What the rule wants kept.",
                ("plan", "policy", "integrity", "attempts", "deviations")),
        Heading("Determination", "The risk is very small that the information could be used, alone or with other "
                "reasonably available information, by an anticipated recipient to identify an individual.",
                ("verdict", Asked("The determination, its grounds, and any condition.", 4),
                 Asked("Date on which it ends and must be made again."), _SIGNED)),
    ),
)  # fmt: skip

NIST = Framework(
    "nist",
    "NIST SP 800-226, evaluating a differential privacy guarantee",
    "NIST Special Publication 800-226, Guidelines for Evaluating Differential Privacy Guarantees (March 2025)",
    "A block is only as good as the blocks below it; what a site's administrators do is not measured here.",
    (
        Heading("Epsilon", "The strength of the guarantee.", ("promise", "parameters", "relation")),
        Heading("Unit of privacy", "What one record is.", ("unit", "visits", "two sites")),
        Heading("Algorithms and correctness", "Mechanism, clipping, sampling and accounting as they really ran.",
                ("mechanism", "sampler", "divisor", "accounting", "randomness")),
        Heading("Utility and bias", "What the noise costs, and whom.", ("usefulness", "outliers")),
        Heading("Composition and privacy budget", "Everything that is released counts together.",
                ("tuning", "spent", "queries", "budget left", "attempts")),
        Heading("Trust model", "Who must be trusted with what.", ("trust", "crossings", "transcript")),
        Heading("Hazards in practice", "Floating point, side channels, bugs: was the running system tested?",
                ("training audit", "refuted", "audit valid", "deviations",
                 Asked("Whether response times matter here: they are not hidden."))),
        Heading("Security and access control", "Not measured by this report.",
                (Asked("Last run of medgen site doctor at each site, and its findings."),)),
        Heading("Data collection exposure", "What was gathered, and what is kept after the study.",
                ("public", Asked("How the patients' data were collected; how long models, caches and ledgers are kept."))),
        Heading("Conclusion", "Does the guarantee hold, and is it the right one?",
                ("verdict", "not covered", Asked("The conclusion.", 3), _SIGNED)),
    ),
)  # fmt: skip

ISO27559 = Framework(
    "iso27559",
    "ISO/IEC 27559, de-identification framework",
    "ISO/IEC 27559:2022, Information security, cybersecurity and privacy protection: privacy enhancing data "
    "de-identification framework; numbers are its clauses",
    "The standard is a frame for a process. What follows fills its clauses as far as one study's evidence reaches.",
    (
        Heading("6.2 Threat modelling", "Who may try, how well equipped, and why?",
                ("cohort", "weights", "transcript", Asked("Motives and capacity of the recipients; their security practices.", 3))),
        Heading("6.3 Transparency and impact assessment", "What people are told, and what harm could come.",
                ("use", Asked("How patients were informed; harms that were considered.", 3))),
        Heading("7.2 Data features", "Whose data, of what kind, with which properties?",
                ("released", "unit", "visits", "public")),
        Heading("7.3.2 Maximum or average risk", "Is the worst-placed person considered, or the mean?",
                ("outliers", "attacks")),
        Heading("7.3.3 Population or sample-based attack", "Does the attacker know who is in the sample?",
                ("weights", "singling out")),
        Heading("7.3.4 Data privacy models", "The formal promise.",
                ("promise", "parameters", "relation", "two sites", "not covered")),
        Heading("8.2.2 Quantifying identifiability", "Numbers with their uncertainty.",
                ("singling out", "linkability", "inference", "copies", "refuted")),
        Heading("8.2.3 Adversarial testing", "Was it attacked, and was the attack any good?",
                ("audit valid", "attacks", "training audit")),
        Heading("8.3.2 Reconfiguring the environment", "What protects by access and contract?",
                ("trust", "crossings", Asked("Access control and contract of the recipients."))),
        Heading("8.3.3 Transforming the data", "What protects by changing data?", ("mechanism", "sampler", "divisor")),
        Heading("8.3.4 Re-evaluation", "Was it judged again after the change, and how often?",
                ("verdict", "attempts", "policy", "usefulness")),
        Heading("9.2 Before data are made available", "Roles, procedures, stakeholders.",
                ("plan", "integrity", Asked("Roles and responsibilities; principles; whom you told.", 3))),
        Heading("9.3 After data are made available", "Who watches the environment of the data?",
                ("budget left", Asked("Who watches for new attacks and releases, how often; date of the next review."))),
        Heading("9.4 Mitigation in case of incident", "How a release is withdrawn.",
                ("deviations", Asked("Contact; how recipients are reached. medgen release revoke writes the revocation."), _SIGNED)),
    ),
)  # fmt: skip

FRAMEWORKS: tuple[Framework, ...] = (GDPR, EDPB, HIPAA, NIST, ISO27559)


def framework(name: FrameworkName) -> Framework:
    """The framework of that name."""
    return next(known for known in FRAMEWORKS if known.name == name)
