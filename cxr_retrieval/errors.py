"""The one error type for what a user can mend; everything else is a bug and shows its traceback."""

from typing import Any


class UserError(Exception):
    """Something that the user can put right: one line that says what is wrong, where, and what to do."""


def user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError that an exception is or was caused by, also through Ray's wrappers; None if it is a bug."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "cause", None)  # where Ray's wrappers keep it
        if isinstance(current, UserError) and inner is None:
            return current
        # Ray's double of a UserError has a traceback for its text: its cause is what to show.
        waiting += [current.__cause__, inner, getattr(current, "controller_failure", None)]
        waiting += list(getattr(current, "worker_failures", {}).values())
    return None
