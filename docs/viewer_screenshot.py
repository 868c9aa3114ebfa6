"""A picture of the viewer in a headless browser: docs/viewer_screenshot.py RUN OUT."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from epigraf_fast.tools.viewer import Viewer
from epigraf_fast.training.pretrained import load_generator

FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def main(run: str, out: str) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("no chromium or no playwright: the viewer's picture stays as it is")
        return
    config, generator = load_generator(Path(run))
    viewer = Viewer(config, generator, "127.0.0.1", 0, 256)
    viewer.truncation.value, viewer.seed.value = 0.9, 3
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 480})
        page.goto(viewer.address)
        page.get_by_text("Seed", exact=True).wait_for()
        page.mouse.move(250, 250)
        page.mouse.down()
        page.mouse.move(320, 230, steps=5)
        page.mouse.up()
        time.sleep(3)
        while any(view.painted != view.asked or view.side < 256 for view in list(viewer.views.values())):
            time.sleep(0.5)
        time.sleep(2)
        notice = page.locator(".mantine-Notification-closeButton")
        if notice.count():  # that the browser has no GPU
            notice.first.click()
            time.sleep(2)
        page.screenshot(path=out)
        browser.close()
    viewer.stop()
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
