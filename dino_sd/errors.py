"""What users see when their input is wrong."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, what was expected and what to do, in one or two lines.

    The command line prints it without a traceback and exits with 2.
    """


class Halted(Exception):
    """A guard has stopped the run (exit code 3). The message says which, with its numbers, and what to do."""


class Interrupted(Exception):
    """The run was asked to stop and has saved itself (exit code 75): the same command goes on."""


class Diverged(Exception):
    """Too many steps in a row had numbers that are not finite, for the first time in a run."""
