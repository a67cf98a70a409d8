"""Which model of a run a user means."""

from pathlib import Path

from potstill.core.artifact import Artifact
from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.run.folder import find_run, stages_of, whole
from potstill.stages.lineage import Place, as_chosen, trained_as


def pick(target: str) -> Artifact:
    """The model artifact that `RUN[:MODEL]` names; without a name the last distilled, else the last; of the first seed.

    Raises:
        UserError: no such run, no such model, or its files are damaged.
    """
    folder, _, name = target.partition(":")
    run = find_run(folder)
    return whole(run, _named(run, name))


def _named(run: Path, name: str) -> Artifact:
    stages = stages_of(run)
    finished = {ident: artifact for ident, artifact in stages.items() if artifact is not None}
    models = {ident: artifact for ident, artifact in finished.items() if artifact.makes == "model"}
    if not name:
        distilled = [ident for ident, artifact in models.items() if _distilled(Place("", artifact))]
        name = next(reversed(distilled or [*models]), "").partition("@")[0]
    if not models:
        waiting = f" yet; unfinished: {', '.join(ident for ident in stages if ident not in finished)}"
        raise UserError(f"{run}: the run made no model{waiting if len(finished) < len(stages) else ''}")
    of_name = [ident for ident in stages if name in (ident, ident.partition("@")[0])]
    there = [ident for ident in of_name if ident in models]
    if there:
        return models[there[0]]
    if any(ident not in finished for ident in of_name):
        has = f"(it has: {', '.join(models)})"
        raise UserError(f"{run}: '{name}' is not finished, or its manifest is damaged; run the recipe again {has}")
    raise UserError(f"{run}: no model '{name}'{suggest(name, models)} (it has: {', '.join(models)})")


def _distilled(place: Place) -> bool:
    """Whether a teacher taught the model, and what it learned was kept."""
    return place.trained is not None and place.trained.teacher is not None and not place.as_it_was


def talks_in_turns(artifact: Artifact) -> bool:
    """Whether the model was trained on more than single questions; of one picked or quantised: what it was made from."""
    data = trained_as(as_chosen(artifact)).stage.get("data") or {}
    return bool(data.get("messages"))
