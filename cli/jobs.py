"""The verbs that run job files, here or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from cli import output
from cli.options import no_options
from cli.results import RESULTS
from cli.session import WAITING, Session
from engine.masks import masked
from engine.schema import InputError, Progress, RunError, first_line
from jobs.options import LogsOptions, RunOptions, StatusOptions, StopOptions, SubmitOptions

if TYPE_CHECKING:
    from jobs.cluster import Server
    from jobs.run import Job
    from jobs.step import Step


class Reporter:
    """Tells a person, on stderr, of each step of a job; collects what --json tells of them."""

    def __init__(self, ui: Session) -> None:
        self.ui = ui
        self.facts: list[dict[str, Any]] = []
        self.waits = False

    def begins(self, number: int, total: int, step: Step) -> Progress:
        """Tell which step begins, as the command that it is; return a new watcher."""
        self._note(f"[{number}/{total}] {step.label}: {step.command}")
        self.ui.watch = output.Watcher(self.ui.quiet)
        return self.ui.watch

    def ends(self, number: int, total: int, step: Step, result: Any, seconds: float, done_before: bool) -> bool:
        """Tell what came of a step; return whether the job may go on."""
        self.ui.watch.close()
        told = RESULTS[step.verb](step.options, result, self.ui.is_old)
        sentence = told.sentence.replace("done before, ", "") or ", ".join(
            f"{m['metric']} {output.number(m['value'], output.digits_of(m['metric']))}" for m in told.facts.get("metrics", ())
        )
        spent = "done before" if done_before else f"{seconds:,.1f} s"
        self._note(f"[{number}/{total}] {step.label}: {spent} | {' | '.join(sentence.splitlines())}")
        self.facts.append(
            {**told.facts, "step": step.label, "out": step.out, "already_done": done_before, "seconds": round(seconds, 3)}
        )
        self.waits = told.waits
        return not told.waits

    def _note(self, text: str) -> None:
        if not self.ui.quiet:
            output.note(text)


def _run(options: RunOptions, flags: dict[str, bool]) -> None:
    from jobs.results import make_tables
    from jobs.run import begin, open_job, run_steps

    job = open_job(options, options.address)
    ui = Session(flags)
    if options.dry_run:
        _dry_run(job, ui)
        return
    begin(job)
    reporter = Reporter(ui)
    done = run_steps(job, reporter)
    facts = {"command": "run", "job": job.file.name, "out": job.file.out, "state": "done" if done else "waiting"}
    if not done:
        last = reporter.facts[-1]
        ui.result(
            {**facts, "steps": reporter.facts},
            f"{last['step']} waits for labels of {last['num_images']:,} images ({last['folder']}/to_label.csv): put labels.csv "
            f"(id,label) or COCO labels.json into {last['folder']} and run the same command again",
        )
        raise typer.Exit(WAITING)
    tables = make_tables(job.file, job.all_steps)
    for table in tables if not ui.json else ():
        _print_table(table)
    again = sum(step["already_done"] for step in reporter.facts)
    before = f" ({again} done before)" if again else ""
    ui.result(
        {**facts, "steps": reporter.facts, "tables": tables},
        f"{job.file.out}: {len(job.steps)} steps done{before}",
    )


def _print_table(table: dict[str, Any]) -> None:
    from jobs.results import grid

    header, rows = grid(table)
    output.table(table["title"], header, rows)


def _dry_run(job: Job, ui: Session) -> None:
    """Print every step as a command, and whether its folder is there."""
    from jobs.run import is_done

    known, facts = True, []
    for step in job.steps:
        done = None
        try:
            done = is_done(step) if known else None
        except (InputError, RunError, OSError) as error:
            known = False
            output.note(f"{job.file.out} cannot be read, so what is done before is not known: {first_line(error)}")
        facts.append({"step": step.label, "verb": step.verb, "command": masked(step.command), "out": step.out, "done": done})
        if not ui.json:
            output.say(f"{step.command}  # {step.label}{', done before' if done else ''}")
    if ui.json:
        output.print_json({"command": "run", "job": job.file.name, "out": job.file.out, "state": "dry-run", "steps": facts})


def _jobs(options: Any, flags: dict[str, bool]) -> None:
    """List the job files that come with coresift, what they are for and where their figures are from."""
    from jobs.jobfile import shipped
    from jobs.overlay import load

    files = [load(name) for name in shipped()]
    if flags["json"]:
        output.print_json(
            {"jobs": [{"name": f.name, "about": f.about, "source": f.source, "small": f.small is not None} for f in files]}
        )
        return
    for file in files:
        about = " ".join((file.about or "").split())
        source = " ".join((file.source or "").split())
        output.say(f"{file.name}: {about}" + (f" ({source})" if source else ""))


def _submit(options: SubmitOptions, flags: dict[str, bool]) -> None:
    from jobs.cluster import open_server
    from jobs.run import open_job
    from jobs.submit import check_reach, environment, run_to_end, submit

    job = open_job(options)
    check_reach(job)
    environment(options)
    ui = Session(flags)
    if options.dry_run:
        _dry_run(job, ui)
        return
    server = open_server(options.address)
    if not options.follow:
        job_id, new = submit(server, job, options)
        facts = {"command": "submit", "job": job_id, "new": new, "address": server.address}
        ui.result(facts, f"{job_id}: {_begun(new)}; {server.look(job_id)}")
        return

    def begun(job_id: str, new: bool) -> None:
        if not ui.quiet:
            output.note(f"{job_id}: {_begun(new)} on {server.address}; Ctrl-C leaves it running")

    info = run_to_end(server, job, options, begun, lambda job_id: _follow(server, job_id, options.patience, ui))
    _ended("submit", info, server, ui)


def _begun(new: bool) -> str:
    return "submitted" if new else "runs already"


def _follow(server: Server, job_id: str, patience_s: float, ui: Session) -> Any:
    """Print a job's log as it grows, until the job ends; return what Ray knows of it then."""
    from jobs.cluster import follow

    try:
        return follow(server, job_id, patience_s, output.log if ui.json else output.raw, output.note)
    except KeyboardInterrupt:
        output.note(f"the job goes on; look at it again: {server.look(job_id)}")
        raise


def _ended(command: str, info: Any, server: Server, ui: Session) -> None:
    """Print how a job ended, and end with its exit code."""
    from jobs.submit import exit_code

    code = exit_code(info, server)
    told = {0: "done", WAITING: "waits for labels: see above, then submit it again"}.get(code, f"failed, exit code {code}")
    ui.result({"command": command, **_facts(info)}, f"{info.submission_id}: {told}")
    if code:
        raise typer.Exit(code)


def _facts(info: Any) -> dict[str, Any]:
    """Return what is told of a job on a cluster: Ray's JobDetails, without what it was sent with."""
    ended = info.end_time or time.time() * 1000
    return {
        "job": info.submission_id,
        "state": str(info.status).lower(),
        "exit_code": info.driver_exit_code,
        "seconds": round((ended - info.start_time) / 1000, 1) if info.start_time else None,
        "out": (info.metadata or {}).get("out"),
        "message": " ".join((info.message or "").split()),
    }


def _status(options: StatusOptions, flags: dict[str, bool]) -> None:
    from jobs.cluster import asked, job_info, open_server

    server = open_server(options.address)
    ui = Session(flags)
    if options.id is not None:
        facts = _facts(job_info(server, options.id))
        code = "" if facts["exit_code"] is None else f", exit code {facts['exit_code']}"
        shown = f"{facts['job']}: {facts['state']}{code}, {facts['seconds'] or 0:,.1f} s, {facts['out']}"
        ui.result({"command": "status", **facts}, shown if facts["state"] != "failed" else f"{shown}: {facts['message']}")
        return
    ours = [info for info in asked(server, server.client.list_jobs) if "coresift" in (info.metadata or {})]
    found = [_facts(info) for info in sorted(ours, key=lambda info: info.start_time or 0)]
    if ui.json:
        output.print_json({"command": "status", "jobs": found})
        return
    rows = [[f["job"], f["state"], f"{f['seconds'] or 0:,.1f}", f["out"] or "-"] for f in found]
    output.table(f"jobs on {server.address}", ["job", "state", "seconds", "out"], rows, figures=0)


def _logs(options: LogsOptions, flags: dict[str, bool]) -> None:
    from jobs.cluster import job_info, job_log, open_server

    server = open_server(options.address)
    ui = Session(flags)
    job_info(server, options.id)
    if options.follow:
        _ended("logs", _follow(server, options.id, options.patience, ui), server, ui)
        return
    text = job_log(server, options.id)
    if ui.json:
        output.print_json({"command": "logs", "job": options.id, "log": text})
    else:
        output.raw(text)


def _stop(options: StopOptions, flags: dict[str, bool]) -> None:
    from jobs.cluster import asked, job_info, open_server

    server = open_server(options.address)
    ui = Session(flags)
    job_info(server, options.id)
    stopped = asked(server, lambda: server.client.stop_job(options.id), options.id)
    told = "stopping; what is done is kept, submitted again it goes on" if stopped else "had ended before"
    ui.result({"command": "stop", "job": options.id, "stopped": bool(stopped)}, f"{options.id}: {told}")


VERBS: dict[str, tuple[type[Any], Callable[[Any, dict[str, bool]], None]]] = {
    "run": (RunOptions, _run),
    "submit": (SubmitOptions, _submit),
    "status": (StatusOptions, _status),
    "logs": (LogsOptions, _logs),
    "stop": (StopOptions, _stop),
    "jobs": (no_options(_jobs), _jobs),
}
"""By name: options, and what runs it."""
