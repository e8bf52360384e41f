"""``swift clone ID``: the same job once more, in a run folder of its own."""

from __future__ import annotations

from swift.cli.arguments import ArgumentParser


def run(argv: list[str]) -> int:
    """Prints the id of the copy."""
    parser = ArgumentParser(prog="swift clone", description="Queue a copy of a job under another name.")
    parser.add_argument("job", metavar="ID|NAME")
    parser.add_argument("--name", help="of the copy (default: NAME-2)")
    options = parser.parse(argv)
    from swift.experiments.client import Client
    from swift.experiments.home import Home
    from swift.experiments.lookup import find_jobs

    home = Home.find()
    find_jobs(home, [options.job])
    answer = Client(home).clone(options.job, options.name)
    for job in answer["jobs"]:
        print(f"{job['id']}  {job['name']}" + (f"  {job['run_dir']}" if job["run_dir"] else ""))
    return 0
