"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input: the message is one line that names the file and line, or the setting, and the fix.

    The command line prints it on standard error and exits with code 2; from Python it is an ordinary exception.
    """
