"""Environment of the processes that the server starts."""

import os


def environment_without_passwords() -> dict[str, str]:
    """Return the variables of this process without those that hold passwords of the server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STDIT_SERVER_")}
