"""What training begins with: a student, cut and given adapters as asked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, field_validator

from potstill.core.component import Settings
from potstill.core.errors import Problem, UserError
from potstill.edges import ranks
from potstill.edges.adapters import add_lora, check_peft, check_targets
from potstill.edges.models import Model, load_model, size_of
from potstill.edges.packed import check_exact
from potstill.edges.vocabulary import check_rows
from potstill.inits import Init, Read
from potstill.stages.outlook import Outlook, Prospect, made_from
from potstill.stages.refs import ModelRef


class Adapter(Settings):
    """Train low-rank adapters and nothing else, then merge them: LoRA, Hu et al., arXiv:2106.09685."""

    r: int = Field(default=8, ge=1, description="rank of the update of each matrix")
    alpha: float = Field(default=16.0, gt=0, description="the update counts alpha / r times")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapters' inputs")
    targets: tuple[str, ...] = Field(
        default=("all-linear",), min_length=1, description="last names of linear layers, such as q_proj; or all-linear"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_alone(cls, targets: object) -> object:
        return (targets,) if isinstance(targets, str) else targets


def started(model: Prospect | None, init: Init | None) -> Prospect | None:
    """The model that training begins with, cut as asked.

    Raises:
        UserError: it cannot be cut so.
    """
    if model is None or init is None:
        return model
    config = init.shape(model.config)
    return made_from(model, config=config, size=size_of(config), bits=0)


def start_problems(
    outlook: Outlook, place: str, ref: ModelRef, init: Init | None, adapter: Adapter | None
) -> Iterator[Problem]:
    """Why training cannot begin so: the model, its cut, its adapters, its vocabulary, its positions."""
    try:
        model = outlook.model(ref)
    except UserError as error:
        yield Problem(place, str(error), repr(str(ref)))
        return
    if adapter is not None:
        yield from _checked("adapter", check_peft)
    try:
        cut = started(model, init)
        if cut is not None and init is not None and not init.calibration(cut.config).rows:
            check_exact(cut.config)  # of a hybrid, layers of one kind alone may be no model
    except UserError as error:
        yield Problem("init", str(error))
        return
    if cut is None:
        return
    if adapter is not None:
        yield from _checked("adapter", lambda: check_targets(cut.config, adapter.targets))
    tokenizer = cut.tokenizer()
    if tokenizer is not None:
        yield from _checked(place, lambda: check_rows(cut.size.vocab, tokenizer, str(ref)))


def _checked(place: str, check: Callable[[], Any]) -> Iterator[Problem]:
    try:
        check()
    except UserError as error:
        yield Problem(place, str(error))


@dataclass(frozen=True)
class Cut:
    """A smaller model.

    Attributes:
        figures: that decided what it is, with its own NLL on the calibration rows; empty where no rows decided.
        keep: the layers that it has of the model that was cut.
    """

    model: Model
    figures: dict[str, Any]
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Student:
    """What is trained.

    Attributes:
        keep: the layers that it has of the model that was loaded.
        merge: makes it a plain model once training has ended; what it returns, `TrainingStage.write` is given.
        cut: what decided which parts of a larger model it is; empty where nothing was cut, or no rows decided.
        layers: those that it has of the model that was cut first, and how many that one has; see `layers_of`.
    """

    model: Model
    merge: Callable[[], Any]
    cut: dict[str, Any]
    keep: tuple[int, ...]
    layers: dict[str, Any] = field(default_factory=dict)


def load_student(stage: str, where: str, init: Init | None, adapter: Adapter | None, seed: int, nll: Read) -> Student:
    """The model that training begins with.

    Args:
        nll: lets a model read calibration rows, where these decide how it is cut.

    Raises:
        UserError: the model cannot be loaded, cut or adapted so.
    """
    model = load_model(where)
    cut = Cut(model, {}, tuple(range(model.config.num_hidden_layers))) if init is None else cut_model(stage, model, init, nll)
    model = unfreeze(cut.model)
    if adapter is None:
        return Student(model, lambda: None, cut.figures, cut.keep)
    try:
        if ranks.several():
            raise UserError("adapters are trained by one process only; leave out `adapter`, or start one process")
        return Student(model, add_lora(model, **adapter.model_dump(), seed=seed), cut.figures, cut.keep)
    except UserError as error:
        raise UserError(f"{stage}: {error}") from error


def cut_model(stage: str, model: Model, init: Init, nll: Read) -> Cut:
    """The smaller model.

    Raises:
        UserError: it cannot be cut so.
    """
    try:
        rows = init.calibration(model.config).rows
        choice = ranks.on_first(lambda: init.chosen(model, nll))
        made = init.cut(model, choice)
        figures = {**choice.figures, "nll": ranks.on_first(lambda: nll(made, rows))} if rows else {}
        return Cut(made, figures, init.layers_kept(model.config, choice))
    except UserError as error:
        raise UserError(f"{stage}: {error}") from error


def cut_in_words(figures: dict[str, Any]) -> str:
    """What decided a cut, for the line that says a stage is done; "" where no rows did."""
    if not figures:
        return ""
    keep = f"; layers {', '.join(map(str, figures['keep']))} stay" if "keep" in figures else ""
    before = f" (before the cut {figures['nll_before']:.2f})" if "nll_before" in figures else ""
    return f"{keep}, {figures['nll']:.2f} nats a token{before} on {figures['rows']} calibration rows, untrained"


def unfreeze(model: Model) -> Model:
    """Every weight trains; dropout follows the model's config."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
