"""`vouch distil`: trained sequential runs become one run, which answers at the cost of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vouch.cli import shared

if TYPE_CHECKING:
    from vouch.data import Dataset, Split
    from vouch.recommenders.runs import OpenRun

METRICS = ["NDCG@10", "HR@10", "MRR"]


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: vouch distil --teachers runs/sasrec,runs/gru4rec --out runs/one")(distil)


def distil(
    teachers: Annotated[str, typer.Option("--teachers", "-t", help="Folders of trained sequential runs, by commas.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new run.")],
    student: Annotated[str, typer.Option("--student", help="The sequential method that learns from them.")] = "sasrec",
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="What to learn on; the teachers' own data by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the student or, as meal.NAME=VALUE, of the distillation. Repeatable."),
    ] = None,
    label_weight: Annotated[
        float, typer.Option("--label-weight", help="Share of the next-item loss; the rest is the teachers'.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every source of chance.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    device: shared.Device = "auto",
    precision: shared.Precision = "auto",
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop after the epoch in which this passes.")
    ] = None,
    format: shared.Format = None,
    columns: shared.Columns = None,
    items: shared.Items = None,
    as_json: shared.Json = False,
) -> None:
    """Distil an ensemble of trained sequential runs into one run, and compare it with them on validation."""
    from vouch import registry
    from vouch.data import check_leaks
    from vouch.distillation.sequences import distil_recommender
    from vouch.distillation.teachers import Together, check_teachers
    from vouch.errors import ConfigError
    from vouch.evaluation import evaluate
    from vouch.recommenders.runs import begin_run, finish_run, open_run
    from vouch.recommenders.sequential.base import SequentialRecommender
    from vouch.training import Run
    from vouch.training.devices import parse_device

    parse_device(device)
    folders = [folder.strip() for folder in teachers.split(",") if folder.strip()]
    if not folders:
        raise ConfigError("--teachers names no run", hint="--teachers runs/a,runs/b")
    if any(Path(folder).resolve() == out.resolve() for folder in folders):
        raise ConfigError(f"{str(out)!r} is one of the teachers", hint="choose another --out")
    kind = registry.method(student)
    if not issubclass(kind, SequentialRecommender) or student == "meal":
        hint = "sasrec is the student of meal" if student == "meal" else "for example sasrec or gru4rec"
        raise ConfigError(f"{student!r} cannot be a student here", hint=hint)
    opened = [open_run(folder) for folder in folders]
    dataset, source, keep = _dataset(opened[0], data, format, columns, items)
    made = _split(opened, folders, dataset)
    check_leaks(made)
    given = list(settings or [])
    # the folders are kept as settings, so that the run says who taught it
    config = kind.Config.parse([*given, "objective+=meal", f"meal.teachers={','.join(folders)}"])
    model, models = kind(config), [run.model for run in opened]
    check_teachers(models, _prepared(model, made), made)
    begin_run(out, dataset, source, keep_data=keep)
    run = Run(out, seed, device, precision, resume, True, max_seconds)  # type: ignore[arg-type]
    try:
        report = distil_recommender(model, models, made, run, label_weight=label_weight)
    except KeyboardInterrupt:
        shared.say(f"\nstopped: the same command with --resume goes on from the last checkpoint ({out})")
        raise typer.Exit(130) from None
    rows: dict[str, dict[str, float]] = {}
    for name, each in [*zip(folders, models, strict=True), ("together", Together(models)), (str(out), model)]:
        rows[name] = evaluate(each, made.valid, metrics=METRICS, train=made.train).metrics
    finish_run(out, model, made, report, source=source, seed=seed, metrics=rows[str(out)])
    if as_json:
        shared.emit(
            {
                "run": str(out),
                "method": student,
                "teachers": {folder: rows[folder] for folder in folders},
                "together": rows["together"],
                "validation": rows[str(out)],
                "seconds": report.seconds,
                "epochs": report.epochs,
                "best_epoch": report.best_epoch,
                "stopped": report.stopped,
            }
        )
        return
    _show(rows, [*(teacher.card.slug for teacher in models), "their mean answer", f"{student}, distilled"])
    shared.console().print(f"next: vouch evaluate {out}")


def _dataset(
    first: OpenRun, data: str | None, format: str | None, columns: str | None, items: str | None
) -> tuple[Dataset, str, bool]:
    """What to learn on, where it comes from, and whether the new run must keep it."""
    from vouch.data.readers import read

    if data is not None:
        found = read(data, format=format, columns=shared.parse_columns(columns), items=items)
        return found, data, not shared.is_prepared(data)
    prepared = str(first.header["data"]["prepared"])
    inside = prepared == "data"  # the teacher's run may be deleted one day
    return first.dataset, str(first.header["data"]["source"]) if inside else prepared, inside


def _split(opened: list[OpenRun], folders: list[str], dataset: Dataset) -> Split:
    """The teachers' split.

    Raises:
        ConfigError: they were not split alike, so that one has learned from what another is tested on.
    """
    from vouch.data import split
    from vouch.errors import ConfigError

    described = [run.header["split"] for run in opened]
    for folder, other in zip(folders[1:], described[1:], strict=True):
        if (other["protocol"], other["settings"]) != (described[0]["protocol"], described[0]["settings"]):
            raise ConfigError(
                f"{folder} was split by {other['protocol']}, {folders[0]} by {described[0]['protocol']}",
                where=folder,
                hint="what one learned from may be what another is tested on: train them with the same --split",
            )
    for folder, run in zip(folders, opened, strict=True):
        if run.dataset.interactions.fingerprint != dataset.interactions.fingerprint:
            shared.say(f"note: {folder} was trained on other data, and may know what is validated or tested on here")
    settings = described[0]["settings"]
    shares = {name: settings[name] for name in ("valid_share", "test_share", "min_history") if name in settings}
    return split(dataset, described[0]["protocol"], **shares)


def _prepared(model: Any, made: Split) -> Any:
    """The student, knowing its items."""
    model.prepare(made.train)
    return model


def _show(rows: dict[str, dict[str, float]], what: list[str]) -> None:
    """A table for people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="on validation")
    for number, name in enumerate(("run", "model", *METRICS)):
        table.add_column(name, justify="left" if number < 2 else "right")
    for (name, metrics), model in zip(rows.items(), what, strict=True):
        table.add_row(escape(name), model, *(f"{metrics[each]:.4f}" for each in METRICS))
    shared.console().print(table)
