"""Walks the acceptance lines of the deployed consortium and prints PASS, SHORT (number, cause) or SKIP (reason) for each.

    python tests/acceptance/consortium.py [--lines site-killed,exchange] [--work FOLDER]

Lines of tests run the tests that show them. ``deployed`` lines start real SuperLink, SuperNode and agent processes; lines of
figures run one part of `medgen bench federation` and print every bar. The whole walk takes about three quarters of an hour on
two cores; an exchange is wall time, so run that line on a machine that does nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from walk import BIN, Check, Shortfall, Skipped, figure, sh, suite, walk

FAULTS = "tests/simulations/test_faults.py"
DEPLOYED = "tests/simulations/test_deployed.py"
AGENT = "tests/client/test_agent.py"
MASKS = "tests/privacy/test_masking.py"
SUMS = "tests/server/test_aggregation.py"
WIRE = "tests/server/test_exchange.py"
JOIN = "tests/client/test_joining.py"
GUIDE = "tests/acceptance/deployment.py"


def part(name: str, says: str) -> Check:
    """A line that runs one part of the federation's benchmark and prints each figure, with its bar where it has one."""

    def check(work: Path) -> str:
        file = work / f"federation-{name}.json"
        words = [str(BIN / "medgen"), "bench", "federation", "--rows", name, "--json", str(file)]
        done = sh(words, ok=False, timeout=3600)
        if not file.is_file():
            raise Shortfall(f"no result: {(done.stdout + done.stderr)[-500:]}")
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        text = "\n   ".join(_line(row) for row in rows)
        if not all(row["holds"] is not False for row in rows):
            raise Shortfall(text)
        return text

    check.__doc__ = says
    return check


def _line(row: dict[str, object]) -> str:
    verdict = "       " if row["holds"] is None else "holds  " if row["holds"] else "MISSED "
    bar = "" if row["bar"] is None else f" (bar {row['bar']:g})"
    peers = row["peers"]
    beside = ", ".join(f"{name} {number:.4g}" for name, number in peers.items()) if isinstance(peers, dict) else ""
    return f"{verdict}{figure(row)} {row['unit']}{bar}: {row['measure']}{' | ' + beside if beside else ''}"


def guide(work: Path) -> str:
    """The deployment guide's blocks, executed and timed: three sites, from nothing to a finished study, under thirty minutes."""
    done = sh([sys.executable, GUIDE, "--work", str(work / "guide")], ok=False, timeout=3600)
    said = [line for line in done.stdout.splitlines() if line.strip()]
    verdicts = [line.split()[1] for line in said if line[:1].isalnum() and len(line.split()) > 1]
    text = "\n   ".join(said) or done.stderr[-800:]
    if done.returncode != 0 or "PASS" not in verdicts:
        raise (Skipped if verdicts and set(verdicts) == {"SKIP"} else Shortfall)(text)
    return text


def deployed(says: str, *places: str) -> Check:
    """A line whose tests start real processes."""
    return suite(says, *places, marker="deployed")


LINES: dict[str, Check] = {
    # -- what is built -------------------------------------------------------------------------------------------------
    "agent": suite(
        "Site agent: one task at a time, same task same bytes, survives restarts; stop, quiet hours, limits; a light courier",
        "tests/client/test_daemon.py",
        "tests/client/test_control.py",
        "tests/client/test_courier.py",
    ),
    "approval": suite(
        "Approval: canonical signed plan, deny by default, ceilings win, a changed byte, two persons, the site log",
        "tests/client/test_approvals.py",
        "tests/client/test_policy.py",
    ),
    "enrolment": suite(
        "Enrolment: keys made at the site, request, fingerprint, kit, revocation and re-enrolment",
        "tests/client/test_founding.py",
        JOIN,
        "tests/client/test_peers.py",
        "tests/server/test_enrolment.py",
        "tests/server/test_kit.py",
        "tests/server/test_coordinator.py",
        "tests/server/test_authority.py",
    ),
    "server": suite(
        "Server: SuperLink with TLS and node authentication on loopback; doctor finds every planted weakness with its remedy",
        "tests/server/test_server_doctor.py",
        "tests/server/test_flower.py",
        "tests/server/test_processes.py",
        "tests/client/test_site_doctor.py",
    ),
    "study": suite(
        "Study: planned over enrolled sites, signed, a deadline on every wait, late sites return, one coordinator, status",
        "tests/server/test_studies.py",
        "tests/server/test_attendance.py",
        "tests/server/test_runlock.py",
        "tests/server/test_deployed_run.py",
        "tests/server/test_preparation.py",
        WIRE,
    ),
    "masks": suite(
        "Secure aggregation: equals the plain sum, dropouts, seeds of 256 bits, cohorts, and added as answers arrive",
        MASKS,
        SUMS,
    ),
    "recipes": suite(
        "Recipes: proxy that opens /v1/fleet/ alone, units, firewall, images, wheelhouse with hashes, log export",
        "tests/server/test_recipes.py",
        "tests/client/test_recipes.py",
        "tests/simulations/test_slow_link.py",
    ),
    # -- over real processes -------------------------------------------------------------------------------------------
    "end-to-end": deployed(
        "A whole study over SuperLink and SuperNodes, TLS and node authentication: the weights of the in-process run",
        f"{DEPLOYED}::test_three_hospitals_over_superlink_and_supernodes_train_what_one_process_trains",
    ),
    "deployed-faults": deployed("Faults on real processes: everything in the file of the deployed study", DEPLOYED),
    # -- faults, each ending in a finished study and an intact ledger --------------------------------------------------
    "site-killed-training": suite(
        "A site killed during training",
        f"{FAULTS}::test_two_sites_killed_while_they_train_cost_their_own_round_and_no_other",
    ),
    "site-killed-before-reply": suite(
        "A site killed after training, before it replies",
        f"{FAULTS}::test_two_sites_killed_after_training_before_they_reply_are_left_out_of_one_sum",
    ),
    "site-killed-unmasking": suite(
        "A site killed during unmasking",
        f"{FAULTS}::test_a_site_killed_while_it_unmasks_discards_the_attempt_and_each_site_pays_a_spare",
    ),
    "agent-restarted": suite(
        "An agent restarted in the middle of a task, in process and as a process",
        f"{FAULTS}::test_an_agent_killed_in_mid_task_and_started_again_answers_the_same_task_for_one_spare",
        "tests/client/test_daemon.py::test_killed_while_it_works_it_goes_on_at_the_price_of_one_spare",
        "tests/client/test_durability.py",
    ),
    "coordinator-killed": suite(
        "The coordinator killed between rounds, during a round and during unmasking",
        f"{FAULTS}::test_a_killed_coordinator_resumes_for_free_with_the_same_weights",
        "tests/simulations/test_simulate.py::test_killed_in_the_middle_of_a_round_and_resumed",
    ),
    "superlink-restarted": deployed(
        "The SuperLink killed in a round and started again, with coordinator and a SuperNode",
        f"{DEPLOYED}::test_superlink_and_coordinator_killed_in_a_round_and_a_supernode_with_them",
    ),
    "link-cut": suite(
        "A link cut for a while and one cut for good",
        f"{FAULTS}::test_a_link_cut_for_a_while_costs_nothing_and_one_cut_for_good_ends_no_study",
        f"{FAULTS}::test_sites_that_are_away_at_the_roll_call_are_not_waited_for_after_the_deadline",
        f"{FAULTS}::test_too_few_sites_stop_the_study_and_when_they_are_back_it_goes_on_as_if_nothing_had_been",
    ),
    "late": suite(
        "A site that answers after the deadline",
        f"{FAULTS}::test_a_site_that_answers_after_the_deadline_is_in_no_sum_and_in_the_next_round",
    ),
    "duplicates": suite(
        "Messages that arrive twice, or again later",
        f"{FAULTS}::test_messages_that_arrive_twice_or_once_more_later_change_nothing",
        f"{SUMS}::test_an_answer_is_added_as_it_arrives_and_dropped_and_only_the_first_counts",
    ),
    "two-coordinators": suite(
        "Two coordinators at once: in one folder, from a copy of it, and with other sites",
        f"{FAULTS}::test_two_coordinators_at_once_charge_nobody_twice",
        f"{FAULTS}::test_a_second_coordinator_that_invites_others_is_refused_and_opens_nothing",
    ),
    # -- attacks that must fail ----------------------------------------------------------------------------------------
    "unenrolled": suite(
        "An unenrolled key and a revoked site, at a real SuperLink; an unknown or second holder of a name at the roll call",
        "tests/server/test_sign_in.py",
        f"{WIRE}::test_strangers_and_second_holders_of_a_name_are_ignored",
    ),
    "swapped-key": suite(
        "A stolen roster entry with a swapped masking key",
        "tests/client/test_peers.py::test_a_peers_masking_key_swapped_by_the_coordinator_is_refused",
        f"{MASKS}::test_a_swapped_masking_key_is_found_by_its_owner_and_opens_nothing",
        f"{AGENT}::test_a_swapped_key_is_noticed",
    ),
    "hostile-app": suite(
        "A Flower app that reads the data folder, opens the ledger, or raises an exception with patient text",
        "tests/client/test_hostile_app.py",
        "tests/client/test_control.py::test_the_supernodes_account_opens_the_socket_and_nothing_else",
        "tests/client/test_courier.py::test_the_text_of_an_exception_stays_behind",
        "tests/client/test_courier.py::test_nothing_that_a_run_brings_decides_what_is_opened",
        f"{AGENT}::test_whatever_breaks_inside_leaves_as_one_code",
    ),
    "less-noise": suite(
        "A plan with less noise than the ceiling allows",
        "tests/client/test_policy.py::test_the_promise_must_fit_the_ceilings",
        f"{AGENT}::test_todays_site_file_rules_and_not_that_of_the_approval",
    ),
    "claimed-dropout": suite(
        "A coordinator that claims a dropout to unmask one site",
        f"{MASKS}::test_two_survivor_sets_for_one_attempt_open_nothing",
        f"{MASKS}::test_never_both_seeds_of_one_site",
        f"{AGENT}::test_one_survivor_set_is_answered_and_never_a_second",
        "tests/client/test_outbox.py::test_of_two_survivor_sets_at_once_exactly_one_is_settled",
    ),
    "replayed-round": suite(
        "A replayed round",
        f"{MASKS}::test_a_replayed_round_does_not_cancel",
        f"{AGENT}::test_the_same_task_gets_the_same_bytes_for_free",
        f"{AGENT}::test_an_attempt_is_one_task",
    ),
    "wrong-update": suite(
        "A wrong-group or wrong-length update is refused; a non-finite or oversized one is stopped before any mask",
        f"{SUMS}::test_an_answer_that_was_not_asked_for_is_no_answer",
        f"{MASKS}::test_what_does_not_belong_in_a_sum_leaves_it_as_it_was",
        f"{AGENT}::test_an_update_that_is_no_number_or_too_large_for_the_sum_is_stopped_before_any_mask",
    ),
    "cohort-under-three": suite(
        "A request for a cohort under three",
        f"{AGENT}::test_every_refusal_before_the_charge_has_its_code_and_is_free",
        f"{AGENT}::test_a_sum_over_fewer_than_three_stays_closed",
        f"{MASKS}::test_the_coordinator_cannot_open_the_sum_of_two",
        f"{SUMS}::test_two_survivors_open_nothing_and_the_study_stops_with_codes",
    ),
    # -- bad input -----------------------------------------------------------------------------------------------------
    "bad-kit": suite(
        "A malformed kit",
        f"{JOIN}::test_a_malformed_kit",
        f"{JOIN}::test_a_kit_that_another_key_signed_or_that_was_edited",
    ),
    "bad-certificate": suite(
        "An expired certificate and a wrong clock",
        f"{JOIN}::test_an_authority_outside_its_validity",
        f"{JOIN}::test_an_uplink_with_an_expired_authority_or_a_wrong_clock_is_named",
        "tests/server/test_authority.py::test_the_wrong_day_is_named_with_the_clock_as_a_possible_cause",
        "tests/server/test_server_doctor.py::test_a_clock_that_is_off",
    ),
    "bad-site-file": suite(
        "An unreadable site.toml",
        f"{JOIN}::test_an_unreadable_site_toml",
        "tests/client/test_control.py::test_a_site_file_that_cannot_be_opened_is_named",
        f"{AGENT}::test_a_damaged_site_folder_is_an_unavailable_site",
    ),
    "socket-in-use": suite(
        "A socket that is in use",
        "tests/client/test_daemon.py::test_a_socket_that_a_live_program_holds_and_what_is_no_socket_stay",
        "tests/client/test_daemon.py::test_what_keeps_it_from_starting_is_said_and_nothing_is_left",
    ),
    "disk-full": suite(
        "A full disk",
        "tests/client/test_daemon.py::test_a_full_disk_is_said_and_leaves_nothing_behind",
        "tests/client/test_durability.py::test_cut_short_before_every_call_that_touches_the_disk",
        f"{JOIN}::test_a_folder_that_cannot_be_written_at_any_step_is_left_as_it_was",
        "tests/server/test_coordinator.py::test_an_interruption_at_any_step_leaves_nothing",
    ),
    "superlink-unreachable": suite(
        "A SuperLink that cannot be reached",
        "tests/client/test_supernode.py",
        "tests/client/test_site_doctor.py::test_the_endpoint_and_its_clock",
        "tests/server/test_flower.py",
    ),
    # -- figures -------------------------------------------------------------------------------------------------------
    "masking": part("masking", "Masking: megabytes a second, and bytes a number against 8 for Flower's SecAgg+"),
    "memory": part("memory", "Coordinator memory against the number of sites: flat"),
    "exchange": part(
        "exchange", "Seconds and bytes of an exchange against a stock FedAvg app on this machine: 7 s at most"
    ),
    "hundred-sites": part("sites", "A simulated hundred-site study: time and memory linear or better"),
    # -- done when -----------------------------------------------------------------------------------------------------
    "guide": guide,
}


def main(checks: dict[str, Callable[[Path], str]]) -> int:
    """Walk the lines that were asked for."""
    return walk(checks, "Acceptance walk of the deployed consortium.", ",".join(checks))


if __name__ == "__main__":
    sys.exit(main(LINES))
