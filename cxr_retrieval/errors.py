"""The one error type for what a user can mend; everything else is a bug and shows its traceback."""


class UserError(Exception):
    """Something that the user can put right: one line that says what is wrong, where, and what to do."""
