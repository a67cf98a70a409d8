"""What training begins with: a student, cut and given adapters as asked."""

from collections.abc import Callable

from pydantic import Field, field_validator

from potstill.core.component import Settings
from potstill.core.errors import UserError
from potstill.edges import ranks
from potstill.edges.adapters import add_lora, check_peft
from potstill.edges.models import Model, config_of, load_model
from potstill.inits import Init
from potstill.stages.refs import ModelRef
from potstill.stages.training import unfreeze


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


def check_start(stage: str, ref: ModelRef, init: Init | None, adapter: Adapter | None) -> None:
    """Refuse, before earlier stages have run, a start that cannot be; what a stage makes is known only when it is there.

    Raises:
        UserError: the model is too small for `init`, or peft is not installed.
    """
    try:
        if adapter is not None:
            check_peft()
        if init is not None and ref.scheme != "stage":
            init.shape(config_of(str(ref)))
    except UserError as error:
        raise UserError(f"{stage}: {error}") from error


def load_student(
    stage: str, where: str, init: Init | None, adapter: Adapter | None, seed: int
) -> tuple[Model, Callable[[], None]]:
    """What is trained, and what makes it a plain model afterwards.

    Raises:
        UserError: the model cannot be loaded, cut or adapted so.
    """
    model = load_model(where)
    try:
        model = unfreeze(init(model) if init is not None else model)
        if adapter is None:
            return model, lambda: None
        if ranks.several():
            raise UserError("adapters are trained by one process only; leave out `adapter`, or start one process")
        return model, add_lora(model, **adapter.model_dump(), seed=seed)
    except UserError as error:
        raise UserError(f"{stage}: {error}") from error
