"""Flower ServerApp: the study's stages, in order, in one screenful. It never sees a record."""

from __future__ import annotations

import traceback
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the planned study in the run folder that the run config names; how it ended is in its event file."""
    from server.events import EventLog
    from server.exchange import StudyStopped
    from server.runfolder import RunFolder
    from server.runlock import RunLocked, only_coordinator

    folder = RunFolder(Path(str(context.run_config["run-dir"])))
    events = EventLog(folder.events)
    try:
        with only_coordinator(folder.lock):
            events.write("started")
            try:
                verdict = run_study(grid, context)
            except StudyStopped as wish:
                events.write("stopped", reason=str(wish))
            except Exception as error:
                (folder.path / "coordinator.log").write_text(traceback.format_exc(), encoding="utf-8")
                events.write("failed", reason=str(error)[:500])
            else:
                events.write("finished", verdict=verdict)
    except RunLocked as other:
        events.write("turned-away", reason=str(other))


def run_study(grid: Grid, context: Context) -> str:
    """All stages from roll call to report; each continues after its last finished round. Returns the verdict."""
    from medgen_models.assembly import StudyModel, assemble
    from medgen_models.public_model import PublicModel
    from medgen_models.table_prior import variables
    from server import auditing, canaries, description, publishing, stages
    from server.events import EventLog
    from server.runfolder import RunFolder
    from server.session import attend, gather, open_session

    folder = RunFolder(Path(str(context.run_config["run-dir"])))
    session = open_session(grid, folder, EventLog(folder.events))
    public = PublicModel.load(Path(folder.public_pointer.read_text(encoding="utf-8")), session.schema)

    def model(state: stages.State) -> StudyModel:
        return assemble(public, state, session.plan.training.group, session.plan.training.lora_rank)

    sites = gather(session)
    domain = [len(column.levels) for column in variables(session.schema, session.config.table.bins)]
    description.statistics(session, sites)
    counts = stages.marginals(session, sites, domain)
    state = stages.codecs(session, sites, model({}), {})
    state = stages.recentre(session, sites, model(state), state)
    state = stages.prototypes(session, sites, public, model(state), state)
    state = stages.core(session, sites, model(state), state)

    final, sites = model(state), attend(session, sites)
    training = canaries.open_coins(session, sites)
    cohort = publishing.sample(session, final, counts)
    audit = auditing.attack_cohort(session, sites, state, folder.cohort, publishing.outcome_of(session.schema))
    return publishing.publish(session, final, cohort, audit, sites, training)
