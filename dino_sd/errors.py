"""What users see when their input is wrong."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, what was expected and what to do, in one or two lines.

    The command line prints it without a traceback and exits with 2.
    """
