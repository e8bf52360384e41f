"""Does what the installer asks of uv, with wheels of a folder, in a tenth of a second."""

import os
import sys
import zipfile
from pathlib import Path


def make_environment(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    (folder / "lib" / f"python{version}" / "site-packages").mkdir(parents=True, exist_ok=True)
    base = Path(os.path.realpath(sys.executable))
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    if not (folder / "bin" / "python").exists():
        (folder / "bin" / "python").symlink_to(base)


def install(words: list[str]) -> int:
    source = next((flag for flag in ("--find-links", "--extra-index-url") if flag in words), None)
    if source is None:
        print("error: the index is empty")
        return 1
    python, wheels, pins = (Path(words[words.index(flag) + 1]) for flag in ("--python", source, "-r"))
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    for pin in pins.read_text().split():
        name, _, version = pin.partition("==")
        wheel = wheels / f"{name}-{version}-py3-none-any.whl"
        if not wheel.exists():
            print(f"error: no wheel for {pin}")
            return 1
        if not (site / f"{name}-{version}.dist-info" / "RECORD").exists():
            for old in site.glob(f"{name}-*.dist-info"):
                old.rename(site / f"gone-{old.name}")
            zipfile.ZipFile(wheel).extractall(site)
            print(f"Installed {pin}")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "venv":
        make_environment(Path(sys.argv[-1]))
        sys.exit(0)
    sys.exit(install(sys.argv))
