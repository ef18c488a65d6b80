"""How this package is installed: the one place that says so, for cards, error messages and the documentation."""

import shlex


__all__ = ["DISTRIBUTION", "install_command", "install_hint", "project_link"]

# What `pip install` is given.  On the day that the package is on PyPI, this becomes "optimum-dern", and the tests name
# every line of the documentation that says otherwise.
DISTRIBUTION = "."


def install_command(*extras: str) -> str:
    """The command that installs the package.

    Args:
        *extras: optional parts of it, such as `eval`.
    """
    parts = f"[{','.join(extras)}]" if extras else ""
    return f"pip install {shlex.quote(DISTRIBUTION + parts)}"


def install_hint(*extras: str) -> str:
    """The command and where it works, for a sentence in markdown or a message."""
    return f"`{install_command(*extras)}`" + (" in a clone of the repository" if DISTRIBUTION == "." else "")


def project_link() -> str:
    """The package's name in markdown, with a link where there is something to link to."""
    if DISTRIBUTION == ".":
        return "optimum-dern"
    return f"[optimum-dern](https://pypi.org/project/{DISTRIBUTION})"
