"""How soon a gallery of 2,000 radiographs is on the screen: `python -m tests.bench.gallery [PICTURE.png]`.

Chromium's own figures in ms: since the page was asked for, first paint, and the end of the script that makes the cards;
`busy`, what the page cost its main thread until then, which other work on the machine hardly changes; a search. Beside
them the same page with 20 items, in the same browser.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import Browser, browser
from tests.test_gallery_in_a_browser import many

TIMES = """
const told = Object.fromEntries(performance.getEntriesByType("paint").map(each => [each.name, each.startTime]));
told["script-done"] = performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd;
return told["first-contentful-paint"] ? told : null;
"""
FILTER = """
const start = performance.now(), text = document.getElementById("text");
text.value = "number 77";
text.dispatchEvent(new Event("input", {bubbles: true}));
document.body.getBoundingClientRect();
return performance.now() - start;
"""


def main() -> None:
    paper = io.BytesIO()
    Image.effect_noise((1600, 1200), 40).convert("RGB").save(paper, "JPEG", quality=60)
    with tempfile.TemporaryDirectory() as name, browser(Path(name)) as window:
        window.resize(1400, 900)
        window.ask("/goog/cdp/execute", cmd="Performance.enable", params={"timeDomain": "threadTicks"})
        for count in (20, 2000, 2000):
            folder = Path(tempfile.mkdtemp(dir=name))
            page = many(folder, count, paper.getvalue()) / "index.html"
            told = times(window, page)
            told["size-kB"] = page.stat().st_size / 1000
            print(f"{count:>6} items  " + "  ".join(f"{key} {value:,.0f}" for key, value in told.items()))  # noqa: T201
        if sys.argv[1:]:
            Path(sys.argv[1]).write_bytes(window.picture())


def times(window: Browser, page: Path) -> dict[str, float]:
    window.open(page)
    told: dict[str, float] = window.wait(TIMES)
    metrics = window.ask("/goog/cdp/execute", cmd="Performance.getMetrics", params={})["metrics"]
    busy = next(each["value"] for each in metrics if each["name"] == "TaskDuration")
    return told | {"busy": busy * 1000, "filter": window.run(FILTER)}


if __name__ == "__main__":
    main()
