"""Build the documentation in build/docs: `python docs/build.py`. Warnings, such as a broken link, are errors."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main

HERE = Path(__file__).parent
SOURCES, TARGET = HERE.parent / "build" / "docs-sources", HERE.parent / "build" / "docs"

if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import generate

    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.copytree(HERE / "pages", SOURCES)
    shutil.copytree(HERE / "static", SOURCES / "static")
    generate.write(SOURCES)
    for image in (HERE.parent / "benchmarks").glob("*.svg"):
        shutil.copy(image, SOURCES / "benchmarks")
    shutil.rmtree(TARGET, ignore_errors=True)
    options = ["-q", "--fail-on-warning", "--keep-going", "--fresh-env", "-c", str(HERE)]
    sys.exit(main([*options, "-d", str(SOURCES.with_name("docs-doctrees")), str(SOURCES), str(TARGET)]))
