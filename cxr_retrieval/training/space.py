"""What a sweep searches: a file of `tune_spaces/`, its values checked against the schema before anything starts."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator
from ray import tune

from cxr_retrieval import storage
from cxr_retrieval.config import NAME, Section, Settings, settings_fields, with_values
from cxr_retrieval.errors import UserError

# Not to be searched: where things are, what a trial's corpus is, and what it takes of the cluster.
FIXED = (
    *("workspace", "model", "corpus.", "phantom.", "index.", "publish.", "search.", "privacy."),
    *("embedding.", "evaluation."),
    *("training.workers", "training.gpu", "training.cpus_per_worker"),  # how many trials fit is counted once
)
SCHEDULE = ("losses.contrastive_from", "training.crop_from")
MOST_TRIALS = 10_000
MOST_POINTS = 1024  # that are checked of a space that has more


class Axis(Section):
    """The values of one setting that a sweep looks at: exactly one of the four."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integers: tuple[int, int] | None = None
    choice: list[Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Axis":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, log_uniform, integers, choice")
        ((kind, value),) = given.items()
        if kind == "choice":
            if len(value) < 2:
                raise ValueError("a choice needs two values or more")
        elif not value[0] < value[1]:
            raise ValueError(f"{kind} needs a lower and a higher bound, in this order")
        elif kind == "log_uniform" and value[0] <= 0:
            raise ValueError("log_uniform needs bounds above 0")
        return self

    @property
    def extremes(self) -> list[Any]:
        """The values that decide whether all of them are allowed: every choice, or both bounds."""
        return list(self.choice or self.uniform or self.log_uniform or self.integers or ())

    @property
    def domain(self) -> Any:
        """The axis as Ray Tune knows it."""
        if self.choice is not None:
            return tune.choice(self.choice)
        if self.integers is not None:
            return tune.randint(self.integers[0], self.integers[1] + 1)
        if self.log_uniform is not None:
            return tune.loguniform(*self.log_uniform)
        assert self.uniform is not None
        return tune.uniform(*self.uniform)

    def facts(self, key: str, default: Any) -> dict[str, Any]:
        """The axis as a report shows it."""
        low, high = (None, None) if self.choice is not None else self.extremes
        scale = "choice" if self.choice is not None else "log" if self.log_uniform is not None else "linear"
        meaning = {name: field.description for name, field in settings_fields()}[key]
        return {
            "key": key,
            "meaning": meaning,
            "scale": scale,
            "low": low,
            "high": high,
            "choices": self.choice,
            "default": default,
        }


class Space(Section):
    """A file of `tune_spaces/`: which settings are searched, how, and with what budget."""

    name: str = Field(pattern=NAME, description="name of the sweep")
    search: Literal["random", "grid", "optuna"] = Field("random", description="how points are chosen")
    trials: int = Field(16, ge=1, le=MOST_TRIALS, description="points to try (random and optuna)")
    epochs: int = Field(4, ge=1, description="training.epochs of a trial")
    scheduler: Literal["asha", "none"] = Field("asha", description="asha: stop trials early that are behind")
    grace_epochs: int = Field(1, ge=1, description="epochs that every trial gets (asha)")
    reduction: int = Field(3, ge=2, description="one of so many trials goes on at every rung (asha)")
    seed: int = Field(0, ge=0, description="seed of the points")
    settings: dict[str, Any] = Field(
        {},
        description="settings of all trials; the best config has them too, but keeps its own schedule, as its epochs",
    )
    space: dict[str, Axis] = Field(min_length=1, description="settings to search, each with its values")

    @model_validator(mode="after")
    def _consistent(self) -> "Space":
        if self.search == "grid" and any(axis.choice is None for axis in self.space.values()):
            raise ValueError("search: grid needs a choice for every setting of the space")
        if self.count > MOST_TRIALS:
            raise ValueError(f"a grid of {self.count:,} points is more than {MOST_TRIALS:,}")
        if self.scheduler == "asha" and self.grace_epochs > self.epochs:
            raise ValueError("grace_epochs is more than epochs")
        for key in (*self.space, *self.settings):
            if key.startswith(FIXED):
                raise ValueError(f"{key} cannot be searched: a sweep looks at how a model is trained")
        if "training.epochs" in {*self.space, *self.settings}:
            raise ValueError("training.epochs is the budget: set epochs")
        if "training.unseen" in self.space:
            raise ValueError("training.unseen cannot be searched: trials would be judged on different images")
        return self

    @property
    def count(self) -> int:
        """How many trials there are to run."""
        return (
            math.prod(len(axis.choice or ()) for axis in self.space.values()) if self.search == "grid" else self.trials
        )

    def points(self) -> list[dict[str, Any]]:
        """The points of a random or grid search, in their order; the same ones every time."""
        if self.search == "grid":
            combinations = itertools.product(*(axis.choice or () for axis in self.space.values()))
            return [dict(zip(self.space, values, strict=True)) for values in combinations]
        state = np.random.RandomState(self.seed)
        return [
            {key: plain(axis.domain.sample(random_state=state)) for key, axis in self.space.items()}
            for _ in range(self.trials)
        ]


def read_space(file: str) -> Space:
    """A space from its YAML file. Raises UserError, one line, for whatever is wrong with it."""
    try:
        tree = yaml.safe_load(storage.read_bytes(file))
    except FileNotFoundError:
        raise UserError(f"tune space {file} does not exist") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"tune space {file} cannot be read: {' '.join(str(error).split())}") from None
    try:
        return Space.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"tune space {file}: {where + ': ' if where else ''}{message[0].lower()}{message[1:]}"
        ) from None


def check_space(space: Space, file: str, settings: Settings) -> None:
    """Check every setting that the space can give to a trial or to the best config, before anything starts.

    Rules between settings too: all points of a grid or a random search, as many drawn ones where Optuna will choose,
    and the corners of the space, as far as they can be counted. Raises UserError for the first that is refused.
    """
    drawn = space.model_copy(update={"trials": MOST_POINTS}) if space.search == "optuna" else space
    corners = itertools.product(*(axis.extremes for axis in space.space.values()))
    points = (dict(zip(space.space, corner, strict=True)) for corner in itertools.islice(corners, MOST_POINTS))
    for point in itertools.chain(points, drawn.points()):
        trial_settings(settings, space, file, point)
        best_settings(settings, space, file, point)


def trial_settings(settings: Settings, space: Space, file: str, point: Mapping[str, Any]) -> Settings:
    """The settings with the space's own, a point and the small budget."""
    return with_values(settings, {**space.settings, **point, "training.epochs": space.epochs}, file)


def best_settings(settings: Settings, space: Space, file: str, point: Mapping[str, Any]) -> Settings:
    """What to train at full length: the settings with the space's own and a point. When the crop and CCLoss join is
    asked for by the small budget, and is left as it was, unless it was searched."""
    kept = {key: value for key, value in space.settings.items() if key not in SCHEDULE}
    return with_values(settings, {**kept, **point}, file)


def value_of(settings: Settings, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def plain(value: Any) -> Any:
    """A sampled value as YAML and JSON write it."""
    return value.item() if isinstance(value, np.generic) else value
