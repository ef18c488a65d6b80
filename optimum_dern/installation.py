"""The install command of this package, as shown by model cards, error messages and the documentation."""

import shlex


__all__ = ["DISTRIBUTION", "install_command", "install_hint", "project_link"]

# What `pip install` is given.  On the day that the package is on PyPI, this becomes "optimum-dern", and the tests name
# every line of the documentation that says otherwise.
DISTRIBUTION = "."


def install_command(*extras: str) -> str:
    """Return the command that installs the package.

    Args:
        *extras: optional dependency groups, such as `eval`.
    """
    parts = f"[{','.join(extras)}]" if extras else ""
    return f"pip install {shlex.quote(DISTRIBUTION + parts)}"


def install_hint(*extras: str) -> str:
    """Return the install command in markdown, with the folder to run it in."""
    return f"`{install_command(*extras)}`" + (" in a clone of the repository" if DISTRIBUTION == "." else "")


def project_link() -> str:
    """Return the package's name in markdown, linked to PyPI if it is published there."""
    if DISTRIBUTION == ".":
        return "optimum-dern"
    return f"[optimum-dern](https://pypi.org/project/{DISTRIBUTION})"
