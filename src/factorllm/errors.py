"""The one exception that users meet: every refusal says what is wrong, why, and what to do instead."""


class FactorLLMError(Exception):
    """A refusal with a message meant for the user. The CLI prints it on one line and exits with code 2."""
