"""Known vulnerabilities of what this package depends on (pip-audit), and risky calls in its own code (bandit)."""

import json
import subprocess
from pathlib import Path

from environments import BUILD, ROOT, install_in


__all__ = ["audit"]

TOOLS = ["pip-audit==2.10.1", "bandit[toml]==1.9.4"]


def audit(requirements: Path) -> tuple[list[str], bool]:
    """Run both tools.

    Args:
        requirements: file with exact versions.

    Returns:
        The lines to print, and whether anything was found or could not be looked up.
    """
    tools = install_in(BUILD / "audit", TOOLS).parent
    advice, unknown = known_vulnerabilities(tools, requirements)
    risks = risky_calls(tools)
    lines = [f"pip-audit: {len(advice)} known vulnerabilities, {unknown}", *advice]
    lines += [f"bandit: {len(risks)} findings beside those that pyproject.toml explains", *risks]
    return lines, bool(advice or risks or unknown != ALL_KNOWN)


ALL_KNOWN = "every package was looked up"


def known_vulnerabilities(tools: Path, requirements: Path) -> tuple[list[str], str]:
    """Ask PyPI's database for each package; returns the findings, and what could not be looked up."""
    command = [tools / "pip-audit", "--no-deps", "--disable-pip", "--format", "json", "--requirement", requirements]
    result = subprocess.run(command, capture_output=True, text=True)
    if not result.stdout:
        return [], f"nothing was looked up: {result.stderr.strip().splitlines()[-1][:200]}"
    packages = json.loads(result.stdout)["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"  {package['name']} {package['version']}: {finding['id']}, mended in {', '.join(finding['fix_versions'])}"
        for package in packages
        for finding in package.get("vulns", [])
    ]
    if not skipped:
        return found, ALL_KNOWN
    return found, f"the database does not answer for {len(skipped)} of {len(packages)} packages"


def risky_calls(tools: Path) -> list[str]:
    """Let bandit read the package, with the settings of pyproject.toml."""
    command = [tools / "bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml", "--format", "json"]
    result = subprocess.run([*command, "optimum_dern"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found = json.loads(result.stdout)
    lines = [
        f"  {item['filename']}:{item['line_number']}: {item['test_id']} {item['issue_text']}"
        for item in found["results"]
    ]
    return lines + [f"  {error['filename']}: {error['reason']}" for error in found["errors"]]
