"""The one exception that means: the input was wrong, nothing was changed, and the sentence says what to do."""


class InputError(ValueError):
    """A mistake in what the caller passed. Its text is one sentence: what was wrong, what was expected, what to do."""
